"""What both drivers need: commands run in children of this process, checkpoints, and the record of what was found."""

import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging

from biote import cli
from biote.files import CheckpointReader, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SECONDS, SPARE_BYTES = 20, 2**30  # a child that needs more is a finding
Content = dict[str, bytes]


@dataclass(frozen=True)
class Ended:
    """How a child came to its end. status: its exit status, or minus the signal that killed it."""

    status: int
    out: str
    error: str
    seconds: float


@dataclass
class Record:
    """Counts by outcome, and what should not be."""

    driver: str
    seed: int
    runs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def found(self, **finding: Any) -> None:
        """Print at once, as the rest of a run may take long."""
        self.findings.append(finding)
        print(json.dumps(finding, indent=2), flush=True)

    def close(self, begun: float, output: Path | None) -> int:
        """Print, write into the folder `output` if one is named, and give the exit status."""
        print(f"{self.driver}: {self.runs} runs from seed {self.seed} in {time.monotonic() - begun:.0f} s,", end=" ")
        print(", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items())), end="; ")
        print(f"{len(self.findings)} findings")
        if output is not None:
            self._write(output, round(time.monotonic() - begun))
        return bool(self.findings)

    def _write(self, output: Path, seconds: int) -> None:
        file = output / "fuzz.json"
        drivers = json.loads(file.read_text()) if file.exists() else {}
        packages = {name: version(name) for name in ("biote", "torch", "transformers", "safetensors", "tokenizers")}
        here = {"seconds": seconds, "python": platform.python_version(), "versions": packages}
        drivers[self.driver] = {**asdict(self), **here}
        file.write_text(json.dumps(drivers, indent=2) + "\n")
        (output / "fuzz.md").write_text((ROOT / "fuzz" / "README.md").read_text() + _table(drivers))


def _table(drivers: dict[str, Any]) -> str:
    lines = [
        "",
        "## Measured",
        "",
        "| driver | seed | runs | seconds | outcomes | findings |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in sorted(drivers.items()):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found["outcomes"].items()))
        cells = (name, found["seed"], found["runs"], found["seconds"], outcomes, len(found["findings"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    used = next(iter(drivers.values()))
    versions = ", ".join(f"{package} {number}" for package, number in used["versions"].items())
    return "\n".join([*lines, "", f"Python {used['python']}, {versions}; [data](fuzz.json).", ""])


def start(arguments: list[str], scratch: Path) -> int:
    """`biote ARGUMENTS` in a child of this process, which has imported all it needs: its moments are those of work."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        for number, name in ((1, "out"), (2, "error")):
            os.dup2(os.open(scratch / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv = ["biote", *arguments]
        cli.main()
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, begun: float, scratch: Path) -> Ended:
    """How a child that was started ends."""
    _, status = os.waitpid(child, 0)
    out, error = ((scratch / name).read_text(errors="replace") for name in ("out", "error"))
    return Ended(os.waitstatus_to_exitcode(status), out, error, time.monotonic() - begun)


def run(arguments: list[str], scratch: Path) -> Ended:
    """The same to its end, within limits of time and memory."""
    begun = time.monotonic()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, before[1]))
    try:
        child = start(arguments, scratch)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    deadline = signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(SECONDS)
    try:
        return wait(child, begun, scratch)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, deadline)


def content(folder: Path) -> Content:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def shard(source: Path, destination: Path) -> None:
    """A copy of a checkpoint, its weights in three shards."""
    reader = CheckpointReader(source)
    total = sum(spec.numel() * spec.element_size() for spec in reader.specs.values())
    destination.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (destination / file.name).write_bytes(file.read_bytes())
    write_checkpoint(destination, reader.specs, ((key, reader.read([key])[0]) for key in reader.specs), total // 2)


disable_progress_bars()  # as the command line does before its imports, which are done here
logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)  # threads do not outlive a fork
