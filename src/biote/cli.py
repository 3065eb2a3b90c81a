"""The command line: `biote list | env | convert | export | push | verify`. Errors are one line, exit status 1.

Commands import what they need when they run: torch and transformers take seconds, which `biote --help` need not.
"""

import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError

from . import __version__

if TYPE_CHECKING:
    import torch

HELP = {"help_option_names": ["-h", "--help"]}
LONGEST_MESSAGE = 1200  # characters
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, context_settings=HELP)
console = Console()

DTYPES = ("float64", "float32", "float16", "bfloat16")

Source = Annotated[str, typer.Argument(metavar="SRC", help="a tag (see `biote list`), a Hub id, or a folder")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="a folder that does not exist yet")]
PortName = Annotated[str | None, typer.Option("--port", help="which port, where the folder does not say")]
Revision = Annotated[str | None, typer.Option(help="Hub revision (branch, tag or commit)")]
Subfolder = Annotated[str | None, typer.Option(help="folder within the Hub repository or SRC")]
Dtype = Annotated[str | None, typer.Option(help=f"cast to one of {', '.join(DTYPES)}; default: keep")]
ShardSize = Annotated[
    float, typer.Option("--max-shard-gb", min=0.001, max=1e6, help="largest weights file, in 10^9 bytes")
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"biote {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command("list")
def list_ports() -> None:
    """Show the ports installed, their tags and formats."""
    from .port import installed_ports

    tag_column = Column("tag", no_wrap=True)  # whole, it is there to be typed
    table = Table(
        Column("port", no_wrap=True),
        tag_column,
        *(Column(name, overflow="fold") for name in ("original", "parameters", "formats")),
    )
    for port in installed_ports().values():
        for tag, checkpoint in port.tags.items():
            parameters = checkpoint.facts.get("parameters", "")
            table.add_row(port.name, tag, checkpoint.repo_id, parameters, ", ".join(port.format_names))
    (console if console.is_terminal else Console(width=200)).print(table)  # in a pipe: nothing cut or folded


@app.command()
def env() -> None:
    """Show versions, the device, and which engine a model would get here."""
    import torch

    from .runtime.engine import why_not_te

    table = Table("what", "here")
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    for package in ("biote", "transformers", "safetensors", "huggingface_hub", "transformer_engine"):
        table.add_row(package, _version(package))
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    reason = why_not_te()
    table.add_row("engine", f"torch; not te: {reason}" if reason else "te (engine='torch' also works)")
    console.print(table)


@app.command()
def convert(
    source: Source,
    destination: Destination,
    to: Annotated[str, typer.Option(help="te, hf or nvidia")],
    port: PortName = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    dtype: Dtype = None,
    max_shard_gb: ShardSize = 5.0,
) -> None:
    """Convert a checkpoint's weights and config from one layout to another."""
    from .convert import convert_folder, locate
    from .files import check_destination

    check_destination(destination)
    convert_folder(
        locate(source, revision, subfolder), destination, to,
        port_name=port, dtype=_dtype(dtype), max_shard_bytes=int(max_shard_gb * 1e9),
    )  # fmt: skip
    print(f"wrote {destination}")


@app.command()
def export(
    source: Source,
    destination: Destination,
    port: PortName = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    dtype: Dtype = None,
    max_shard_gb: ShardSize = 5.0,
    push: Annotated[str | None, typer.Option(metavar="REPO_ID", help="upload to this Hub repository")] = None,
) -> None:
    """Make a self-contained Hub folder, verified where biote cannot be imported."""
    from .export import export as export_folder

    address = export_folder(
        source, destination, port_name=port, revision=revision, subfolder=subfolder,
        dtype=_dtype(dtype), max_shard_bytes=int(max_shard_gb * 1e9), push=push,
    )  # fmt: skip
    print(f"wrote {destination}")
    if address:
        print(f"uploaded to {address}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an exported folder")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="a Hub repository, made if it is new")],
) -> None:
    """Upload an exported folder to the Hub."""
    from .push import push as push_folder

    print(f"uploaded to {push_folder(folder, repo_id)}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an exported folder")],
    run_code: Annotated[
        bool, typer.Option("--run-code", help="by the folder's own code, where neither biote nor your tokens are")
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="instead, tensor by tensor with this original")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
) -> None:
    """Check an exported folder's weights against its golden values, or against an original. It runs biote's code."""
    from .verification import compare, verify_by_its_own_code, verify_golden

    if against is not None:
        count = compare(folder, against, revision, subfolder)
        print(f"{folder} has {against}'s configuration and its {count} tensors")
    elif run_code:
        verify_by_its_own_code(folder)
        print(f"{folder} reproduces the golden values in it, by its own code and verifier")
    else:
        verify_golden(folder)
        print(f"{folder} reproduces the golden values in it; its own code was not run")


def port_export(port_name: str) -> typer.Typer:
    """The command that a port's export.py is: SRC --output DIR."""
    command = typer.Typer(pretty_exceptions_enable=False, add_completion=False, context_settings=HELP)

    @command.command()
    def main(
        source: Source,
        output: Annotated[Path, typer.Option(help="a folder that does not exist yet")],
        push: Annotated[str | None, typer.Option(metavar="REPO_ID", help="upload to this Hub repository")] = None,
    ) -> None:
        """Convert, bundle and verify an original checkpoint."""
        from .export import export as export_folder

        address = export_folder(source, output, port_name=port_name, push=push)
        if address:
            print(f"uploaded to {address}")

    return command


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name) if name else None


class _Stopped(BaseException):
    """Raised where a signal arrives, so that what is being written is removed."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    last = -60.0

    def stop(number: int, frame: object) -> None:
        nonlocal last
        if time.monotonic() - last > 10:  # `timeout` sends two, and the first one's cleaning up must come to its end
            last = time.monotonic()
            raise _Stopped(number)

    names = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP
    before = {number: signal.getsignal(number) for number in (getattr(signal, name, None) for name in names) if number}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup's
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: Callable[[], None]) -> None:
    """Run a command line; an expected error becomes one line on stderr and exit status 1."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it would say of a config.json, we say in one line
    try:
        with _stopped_by_signals():
            command()
    except (_Stopped, KeyboardInterrupt) as stopped:  # the latter before or after we listen
        number = stopped.signal if isinstance(stopped, _Stopped) else signal.SIGINT
        print(f"error: stopped by {number.name}", file=sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        if os.environ.get("BIOTE_TRACEBACK"):
            raise
        expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError, SafetensorError))
        where = "" if expected else f" (unexpected {type(error).__name__}; BIOTE_TRACEBACK=1 shows where it came from)"
        print(f"error: {_one_line(str(error)) or type(error).__name__}{where}", file=sys.stderr)
        sys.exit(1)


def _one_line(message: str) -> str:
    """A message without line breaks, control characters and C++ stacks, and of a readable length."""
    text = " ".join(message.partition("Exception raised from")[0].split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 4]} ..."


def main() -> None:
    """Entry point of the `biote` command."""
    run(app)


if __name__ == "__main__":
    main()
