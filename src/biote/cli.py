"""The command line: `biote list | env | embed | score | contacts | convert | export | push | verify`.

Errors are one line, exit status 1. Commands import what they need when they run: torch and transformers take seconds,
which `biote --help` need not.
"""

import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError
from typer.core import TyperCommand

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


class _ManyNumbers(TyperCommand):
    """A command whose --layers takes the numbers that follow: `--layers -1 12`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if joined[-2:-1] == ["--layers"] and arg.removeprefix("-").isdigit():
                joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


@app.command(cls=_ManyNumbers)
def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a tag, a Hub id, or a folder in any format")],
    input_file: Annotated[
        str,
        typer.Argument(metavar="INPUT", help=".fasta, .csv, .tsv (also .gz), .parquet, .h5ad; - is FASTA on stdin"),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help=".parquet, .h5, .npz, .h5ad, or a folder/")],
    pool: Annotated[list[str], typer.Option(help="mean, max, cls or std over residues; can be repeated")] = ["mean"],  # noqa: B006
    per_residue: Annotated[
        bool, typer.Option("--per-residue", help="each residue's embedding, in place of pools")
    ] = False,
    layers: Annotated[list[str], typer.Option(metavar="N...", help="hidden states by number; -1: the last")] = ["-1"],  # noqa: B006
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16, float64 or fp8; auto: the checkpoint's, or bfloat16 on a GPU"),
    ] = "auto",
    stored: Annotated[str, typer.Option(help="what OUTPUT holds: float32 or float16")] = "float32",
    long: Annotated[
        str, typer.Option(help="sequences longer than the model or --max-residues: window, truncate, skip or error")
    ] = "window",
    max_residues: Annotated[int | None, typer.Option(help="that run at once; default: what the model can")] = None,
    overlap: Annotated[int | None, typer.Option(help="residues that windows share; default: 256 or a quarter")] = None,
    engine: Annotated[str, typer.Option(help="te, torch or auto")] = "auto",
    devices: Annotated[
        str | None, typer.Option(help="GPUs to share the work, as 0,1; or cpu. Default: one, or torchrun's")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="of a Ray cluster that does the work; local, auto, ray://...")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="of the Ray cluster, with a GPU each if it has any")] = 1,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="tokens that run at once; default: what the device likes and has memory for"),
    ] = None,
    id_column: Annotated[str, typer.Option(help="of a table")] = "id",
    sequence_column: Annotated[str, typer.Option(help="of a table")] = "sequence",
    counts: Annotated[
        str | None, typer.Option(help="where an .h5ad has its counts: a layer, or raw/X; default: X")
    ] = None,
    gene_column: Annotated[str | None, typer.Option(help="of an .h5ad's var, with the names of its genes")] = None,
    port: PortName = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
) -> None:
    """Embed sequences or cells. A run that was stopped goes on where it was."""
    from .apps.embed import Wanted
    from .apps.embed_job import Job
    from .apps.workers import share

    pools = tuple(name for names in pool for name in names.split(","))
    numbers = tuple(_integer(number) for some in layers for number in some.split(","))
    wanted = Wanted(pools, numbers, per_residue, long, max_residues, overlap)
    job = Job(
        model, Path(input_file), output, wanted, dtype, engine, stored, batch_tokens, id_column, sequence_column,
        counts, gene_column, port, revision, subfolder,
    )  # fmt: skip
    if ray is not None:
        from .apps.embed_ray import embed_on_ray

        if devices:
            raise ValueError("--devices is for one host; Ray chooses its own")
        embed_on_ray(job, ray, workers)
        print(f"wrote {output}")
    elif share(job, devices):
        print(f"wrote {output}")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--layers takes whole numbers, not {text!r}") from None


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
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a tag, a Hub id, or a folder")],
    fasta: Annotated[Path, typer.Argument(metavar="FASTA", help="the wild type, or several")],
    variants: Annotated[
        Path, typer.Argument(metavar="VARIANTS", help="CSV of variants like A23V:T45S; not for --scan")
    ],
    output: Annotated[Path | None, typer.Argument(metavar="OUTPUT", help="CSV; of --scan also .parquet")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="another: the mean of all")
    ] = None,
    method: Annotated[
        str, typer.Option(help="masked-marginals, wt-marginals or pseudo-perplexity")
    ] = "masked-marginals",
    multi: Annotated[str, typer.Option(help="mask a variant's sites one at a time (sum) or together (joint)")] = "sum",
    window: Annotated[
        str | None, typer.Option(help="of long proteins: optimal or overlapping; default: the method's")
    ] = None,
    window_tokens: Annotated[
        int | None, typer.Option(min=0, help="tokens of a window; 0: none; default: as the model was trained")
    ] = None,
    mutation_column: Annotated[str, typer.Option(help="of VARIANTS")] = "mutant",
    id_column: Annotated[str | None, typer.Option(help="of VARIANTS, where FASTA holds several proteins")] = None,
    offset: Annotated[int, typer.Option(help="the number of a protein's first residue")] = 1,
    score_column: Annotated[
        str | None, typer.Option(help="of OUTPUT; default: MODEL_METHOD, or ensemble_METHOD")
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="every single substitution: MODEL FASTA OUTPUT")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="with --scan: a heat map beside OUTPUT, as .png")] = False,
    engine: Annotated[str, typer.Option(help="te, torch or auto")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: the checkpoint's")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="run at once; default: what the device likes")
    ] = None,
) -> None:
    """Score variants of a protein without training: how much likelier than the wild type each is."""
    from .apps.score import Scoring
    from .apps.score_files import Where, scan_file, score_file

    scoring = Scoring(method, multi, window, window_tokens)
    where = Where(engine, dtype, device, batch_tokens, show_progress=sys.stderr.isatty())
    models = [model, *(more or [])]
    if scan and output is not None:
        raise ValueError(f"--scan takes no VARIANTS: biote score {model} {fasta} {output} --scan")
    if not scan and output is None:
        raise ValueError(
            "OUTPUT is missing: biote score MODEL FASTA VARIANTS OUTPUT, or with --scan MODEL FASTA OUTPUT"
        )
    if plot and not scan:
        raise ValueError("--plot draws a whole scan: add --scan")
    if output is None:
        for option, given in (("mutation", mutation_column != "mutant"), ("id", id_column), ("score", score_column)):
            if given:
                raise ValueError(f"--{option}-column is of VARIANTS, which --scan has not")
        done = scan_file(models, fasta, variants, scoring, where, offset=offset, plot=plot)
    else:
        done = score_file(
            models, fasta, variants, output, scoring, where, mutation_column=mutation_column, id_column=id_column,
            offset=offset, score_column=score_column,
        )  # fmt: skip
    print(f"{done}; wrote {variants if output is None else output}")


@app.command()
def contacts(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a tag, a Hub id, or a folder")],
    fasta: Annotated[Path, typer.Argument(metavar="FASTA", help="also .gz; - is stdin")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help=".npz: an array [L, L] for each id")],
    plot: Annotated[
        bool, typer.Option("--plot", help="a picture of each protein, in a folder called like OUTPUT without .npz")
    ] = False,
    engine: Annotated[str, typer.Option(help="te, torch or auto")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: the checkpoint's")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    ] = None,
    port: PortName = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
) -> None:
    """Predict which residues of a protein touch: the probability of each pair."""
    from .apps.contacts import contacts_file

    done = contacts_file(
        model, fasta, output, plot=plot, engine=engine, dtype=dtype, device=device,
        port_name=port, revision=revision, subfolder=subfolder,
    )  # fmt: skip
    print(f"{done}; wrote {output}")


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


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Without the path and the line of Python that Python's own begin with."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: f"warning: {_one_line(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def run(command: Callable[[], None]) -> None:
    """Run a command line; a warning and an expected error become one line on stderr, the latter exit status 1."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it would say of a config.json, we say in one line
    try:
        with _stopped_by_signals(), _warnings_in_a_line():
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
