"""`biote embed` on one host: any number of processes, that go on where they were killed."""

import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..files import check_destination, flush, lock_file, remove_folder
from .embed_job import Job, Session
from .items import Chunk
from .outputs import assemble
from .progress import progress
from .work import WRITTEN, Work

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
    except (FileNotFoundError, FileExistsError):
        if not rank or not Path(job.output).exists():
            raise


class _Run:
    def __init__(self, job: Job, device: str | None, rank: int):
        self.job, self.rank, self.output = job, rank, Path(job.output)
        self.count = 0  # of the input's chunks
        work_folder = self.output.with_name(f"{self.output.name}.unfinished")
        if not (work_folder / WRITTEN).exists():
            check_destination(self.output)
        self.session = session = Session(job, device)
        self.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        asked = {} if job.batch_tokens is None else {"batch_tokens": job.batch_tokens}
        defaults = {"batch_tokens": session.batch_tokens()}
        self.work = Work(work_folder, {**session.plan(), **asked}, defaults, session.place())

    def run(self) -> None:
        if self.rank and self.output.exists():  # the first finished while we loaded
            if not self.work.shards():
                remove_folder(self.work.folder, self.output)
            return
        try:
            self._work()
        except BaseException:
            if not self.rank and self.work.shards():
                done = f"note: what is done stays in {self.work.folder}: the same command goes on from there"
                print(done, file=sys.stderr, flush=True)
            elif not self.rank:  # nothing is lost, and other options can be given
                remove_folder(self.work.folder, self.output)
            raise

    def _work(self) -> None:
        work = self.work
        with lock_file(work.folder / ".input.lock"):
            self.items = self.session.items(work.folder)
        self.embedder = self.session.embedder(self.items.before, self.items.after, work.plan["batch_tokens"])
        scan = self.session.scan(self.items, self.embedder)
        if self.rank == 0:
            plan, place = work.plan, work.place
            how = f"{plan['engine']} engine, {plan['precision']}, on {place['device']}"
            said = [f"{place['model']}: {how}, batches of {plan['batch_tokens']:,} tokens"]
            said += self.session.notes(scan, self.embedder)
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
                    self.work.write(chunk.number, self.session.make(self.embedder, chunk, rows, told), chunk.digest)
        return elsewhere

    def _claimed(
        self, told: Callable[..., None], only: list[int] | None, elsewhere: list[int]
    ) -> Iterator[tuple[Chunk, list[np.ndarray], ExitStack]]:
        """Chunks for us to do, their token ids, and what to close when it is done."""
        for chunk in self.session.chunks(self.items, self.embedder):
            self.count = max(self.count, chunk.number + 1)
            if only is not None and chunk.number not in only:
                continue
            if self.work.is_done(chunk.number, chunk.digest):
                told(chunk.residues, already=True)
                continue
            held = ExitStack()
            if held.enter_context(self.work.claim(chunk.number, wait=only is not None)):
                yield chunk, self.items.rows(chunk.items), held
            else:
                held.close()
                elsewhere.append(chunk.number)

    def _finish(self) -> None:
        """Make the output of the chunks, of which all are there."""
        if not self.work.folder.exists() and self.output.exists():  # the same command, given twice, was faster there
            return
        if [int(shard.stem) for shard in self.work.shards()] != list(range(self.count)):
            raise ValueError(
                f"{self.work.folder} holds chunks past the end of the input, or lost some: remove it to begin anew"
            )
        if self.output.exists():  # ours: a run was killed after its last step but one
            remove_folder(self.work.folder, self.output)
            return
        if self.job.kind == "/":
            self.work.sweep()
            flush(self.work.folder)
            self.work.folder.rename(self.output)
            flush(self.output.absolute().parent)
            return
        obs = _obs_of(self.job.input) if self.job.kind == ".h5ad" else None
        self.work.mark_written()
        assemble(self.work.shards(), self.output, {**self.work.place, **self.work.plan}, obs)
        remove_folder(self.work.folder, self.output)


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
