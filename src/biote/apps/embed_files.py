"""`biote embed` on one host: any number of processes, that go on where they were killed."""

import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..files import check_destination, flush, lock_file
from .embed_job import Job, Session
from .items import Chunk
from .outputs import assemble
from .progress import progress
from .work import Work

T = TypeVar("T")


def embed_file(job: Job, device: str | None = None, rank: int = 0) -> None:
    """Do the job, or this process's share of it if others run the same; that of rank 0 writes the output.

    A run that was killed, whenever, goes on where it was, and the result is the same bit for bit. ValueError,
    FileNotFoundError or RuntimeError say what was wrong; what is finished stays in OUTPUT.unfinished.
    """
    if rank and Path(job.output).exists():  # the first has finished without us
        return
    try:
        _Run(job, device, rank).run()
    except FileNotFoundError:
        if not rank or not Path(job.output).exists():
            raise


class _Run:
    def __init__(self, job: Job, device: str | None, rank: int):
        self.job, self.rank, self.output = job, rank, Path(job.output)
        work_folder = self.output.with_name(f"{self.output.name}.unfinished")
        if not work_folder.is_dir():
            check_destination(self.output)
        self.session = session = Session(job, device)
        self.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        asked = {} if job.batch_tokens is None else {"batch_tokens": job.batch_tokens}
        defaults = {"batch_tokens": session.batch_tokens()}
        self.work = Work(work_folder, {**session.plan(), **asked}, defaults, session.place())
        with lock_file(work_folder / ".input.lock"):
            self.items = session.items(work_folder, fresh=rank == 0)
        self.embedder = session.embedder(self.items, self.work.plan["batch_tokens"])

    def run(self) -> None:
        work, scan = self.work, self.session.scan(self.items, self.embedder)
        if self.rank == 0:
            said = self.session.notes(scan, self.embedder, work.plan, work.place)
            if work.moved:
                said.append(f"note: the run began elsewhere ({'; '.join(work.moved)}): last bits may differ")
            print("\n".join(said), file=sys.stderr, flush=True)
        with progress("embedding", scan.residues, shown=self.rank == 0) as told:
            elsewhere = self._pass(told, None)
            self._pass(told, elsewhere)  # wait for what others claimed, and do what they did not live to do
        if self.rank == 0:
            self._finish()

    def _pass(self, told: Callable[..., None], only: list[int] | None) -> list[int]:
        """Do the chunks that nobody has done or claimed, and return those that others claimed.

        only: wait for these, and do those that are not done then.
        """
        elsewhere: list[int] = []
        if only == []:
            return elsewhere
        with closing(_ahead(self._claimed(told, only, elsewhere))) as claimed:
            for chunk, rows, held in claimed:
                with held:
                    self.work.write(chunk.number, self.session.make(self.embedder, chunk, rows, told), chunk.digest())
        return elsewhere

    def _claimed(
        self, told: Callable[..., None], only: list[int] | None, elsewhere: list[int]
    ) -> Iterator[tuple[Chunk, list[np.ndarray], ExitStack]]:
        """Chunks for us to do, their token ids, and what to close when it is done."""
        for chunk in self.session.chunks(self.items, self.embedder):
            if only is not None and chunk.number not in only:
                continue
            if self.work.is_done(chunk.number, chunk.digest()):
                told(chunk.residues if only is None else 0, already=True)
                continue
            held = ExitStack()
            if held.enter_context(self.work.claim(chunk.number, wait=only is not None)):
                yield chunk, self.items.rows(chunk.items), held
            else:
                held.close()
                elsewhere.append(chunk.number)
                told(chunk.residues if only is None else 0, already=True)

    def _finish(self) -> None:
        """Make the output of the chunks, of which all are there."""
        numbers = [int(shard.stem) for shard in self.work.shards()]
        if self.output.exists():  # a run was killed after its last step but one
            shutil.rmtree(self.work.folder)
            return
        assert numbers == list(range(len(numbers)))
        if self.session.kind == "/":
            self.work.sweep()
            flush(self.work.folder)
            self.work.folder.rename(self.output)
            flush(self.output.absolute().parent)
            return
        obs = _obs_of(self.job.input) if self.session.kind == ".h5ad" else None
        assemble(self.work.shards(), self.output, {**self.work.place, **self.work.plan}, obs)
        shutil.rmtree(self.work.folder)


def _obs_of(h5ad: Path) -> Any:
    import anndata

    return anndata.read_h5ad(h5ad, backed="r").obs


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each made in another thread while the one before is worked at."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
