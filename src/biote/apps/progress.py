"""How far a job has come: a bar on a terminal, now and then a line in a pipe."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between two lines


@contextmanager
def progress(what: str, total: int, already: int = 0, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Yield what is told of residues done: `told(count)`, and `told(count, already=True)` of those done before.

    total: residues in all; already: those that an earlier run did, which say nothing of this one's speed.
    """
    speed = _Speed(total, already)
    if not shown:
        yield speed
        return
    if not sys.stderr.isatty():
        yield _Lines(what, speed)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=already, speed="")

        def told(count: int, already: bool = False) -> None:
            speed(count, already)
            bar.update(task, advance=count, speed=speed.text())

        yield told


class _Speed:
    """Counts residues and seconds."""

    def __init__(self, total: int, already: int):
        self.total, self.before, self.done, self.start = total, already, 0, time.monotonic()

    def __call__(self, count: int, already: bool = False) -> None:
        if already:
            self.before += count
        else:
            self.done += count

    def a_second(self) -> float:
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def text(self) -> str:
        return f"{self.a_second():,.0f} residues/s"


class _Lines:
    def __init__(self, what: str, speed: _Speed):
        self.what, self.speed, self.last = what, speed, time.monotonic()

    def __call__(self, count: int, already: bool = False) -> None:
        speed = self.speed
        speed(count, already)
        if time.monotonic() - self.last < EVERY or not speed.done:
            return
        self.last = time.monotonic()
        done = speed.before + speed.done
        left = max(speed.total - done, 0) / speed.a_second()
        share = f"{done:,} of {speed.total:,} residues"
        print(f"{self.what}: {share}, {speed.text()}, {left:,.0f} s left", file=sys.stderr, flush=True)
