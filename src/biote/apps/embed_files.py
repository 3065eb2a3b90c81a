"""`biote embed`: embeddings of a whole file, by any number of processes, that goes on where it was killed."""

import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..convert import locate
from ..data.batches import Budget, SequenceTooLongError, default_budget
from ..files import check_destination, flush, lock_file, unchanged
from ..loading import load
from ..port import ModelPort, port_of
from .embed import Embedder, Wanted, encoder_of, states_kept
from .items import Cells, Chunk, Item, Items, Sequences, chunked
from .outputs import MOST_ROWS, assemble, h5_name, kind_of, table
from .progress import progress
from .work import Work

STORED = ("float32", "float16")
BATCHES_A_CHUNK = 64  # enough that sorting fills batches, few enough that a kill costs seconds
MOST_ITEMS = 8192  # in a chunk
MOST_BYTES = 2**28  # of residues' states in a chunk
NAMED = 5  # of sequences in a message
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What `biote embed` is asked for; `wanted` says what is made of each sequence.

    model: tag, Hub id or folder. input, output: as docs/embed.md has them; an output whose name ends in "/" is a
    folder of parquet files. dtype, engine: as of `biote.load`. stored: of STORED. batch_tokens: how many run at once;
    None is what suits the device. layer, gene_column: where an .h5ad has its counts and the names of its genes.
    """

    model: str
    input: Path
    output: str
    wanted: Wanted = field(default_factory=Wanted)
    dtype: str = "auto"
    engine: str = "auto"
    stored: str = "float32"
    batch_tokens: int | None = None
    id_column: str = "id"
    sequence_column: str = "sequence"
    layer: str | None = None
    gene_column: str | None = None
    port_name: str | None = None
    revision: str | None = None
    subfolder: str | None = None


@dataclass
class _Scan:
    """What a look at the whole input finds, before anything runs."""

    items: int = 0
    residues: int = 0
    long: list[str] = field(default_factory=list)  # the first of them, by id
    long_count: int = 0
    report: str = ""


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
        self.kind = "/" if job.output.endswith(("/", os.sep)) else kind_of(self.output)
        self.work_folder = self.output.with_name(f"{self.output.name}.unfinished")
        if job.stored not in STORED:
            raise ValueError(f"stored={job.stored!r} is unknown; choose one of {', '.join(STORED)}")
        if not self.work_folder.is_dir():
            check_destination(self.output)
        if str(job.input) != "-" and not job.input.is_file():
            raise FileNotFoundError(f"{job.input} is no file")
        self.folder = locate(job.model, job.revision, job.subfolder)
        with unchanged(self.folder):
            loaded = load(
                self.folder, "embedding", engine=job.engine, dtype=job.dtype, device=device, port_name=job.port_name
            )
            self.weights = _fingerprint(self.folder)
        self.model, self.tokenizer = loaded
        self.encoder = encoder_of(self.model)
        port = port_of(type(self.model))
        assert port is not None  # it was loaded by one
        self.port: ModelPort = port

    def run(self) -> None:
        self.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        kept = states_kept(self.encoder, self.job.wanted.layers)
        budget = {} if self.job.batch_tokens is None else {"batch_tokens": self.job.batch_tokens}
        defaults = {"batch_tokens": default_budget(self.encoder, kept)}
        self.work = Work(self.work_folder, {**self._plan(), **budget}, defaults, self._place())
        self.budget = Budget(self.work.plan["batch_tokens"], self.work.halvings)
        self.items = self._items()
        items, wanted = self.items, self.job.wanted
        self.embedder = Embedder(self.model, items.before, items.after, wanted, self.budget)
        scan = self._scan()
        self._announce(scan)
        with progress("embedding", scan.residues, shown=self.rank == 0) as told:
            elsewhere = self._pass(told, None)
            self._pass(told, elsewhere)  # wait for what others claimed, and do what they did not live to do
        self._finish(scan)

    def _plan(self) -> dict[str, Any]:
        """What decides the numbers, and must be the same when a run goes on."""
        job, config = self.job, self.encoder.config
        precision = "bfloat16, products in fp8" if job.dtype == "fp8" else str(self.model.dtype).removeprefix("torch.")
        columns = [job.layer, job.gene_column] if self._reads_cells() else [job.id_column, job.sequence_column]
        wanted = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(job.wanted).items()}
        return {
            "weights": self.weights, "engine": self.encoder.engine, "precision": precision, "port": self.port.name,
            "hidden_size": config.hidden_size, **wanted, "stored": job.stored, "columns": columns,
        }  # fmt: skip

    def _place(self) -> dict[str, Any]:
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        model = Path(self.job.model).absolute().name if Path(self.job.model).is_dir() else self.job.model
        versions = {package: version(package) for package in ("biote", "torch", "transformers")}
        return {"model": model, "revision": self.job.revision, "device": name, **versions}

    def _reads_cells(self) -> bool:
        if self.job.input.suffix == ".h5ad" and self.port.read_cells is None:
            raise ValueError(f"{self.port.title} reads sequences, not the cells of {self.job.input}")
        if self.port.read_cells is not None and self.job.input.suffix != ".h5ad":
            raise ValueError(f"{self.port.title} reads the cells of an .h5ad file, not {self.job.input}")
        if self.kind == ".h5ad" and self.port.read_cells is None:
            raise ValueError(f"{self.output}: an .h5ad is for cells; sequences go into .parquet, .h5 or .npz")
        return self.port.read_cells is not None

    def _items(self) -> Items:
        job = self.job
        if self._reads_cells():
            return self._cells()
        path = job.input
        if str(path) == "-":
            path = self.work.folder / ".stdin"  # the input is gone through twice
            with path.open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        return Sequences(path, self.tokenizer, job.id_column, job.sequence_column, str(job.input))

    def _cells(self) -> Cells:
        assert self.port.read_cells is not None
        parquet, around, job = self.work.folder / ".cells.parquet", self.work.folder / ".cells.around", self.job
        with lock_file(self.work.folder / ".cells.lock"):
            if self.rank == 0:
                parquet.unlink(missing_ok=True)  # the input may be another than when the run began
            if not parquet.exists():
                read = self.port.read_cells(job.input, self.folder, parquet, job.layer, job.gene_column)
                around.write_text(f"{read.before} {read.after}")
        return Cells(parquet, *map(int, around.read_text().split()))

    def _kept(self) -> Iterator[Item]:
        """The items without those that are left out for their length."""
        skip = self.job.wanted.long == "skip"
        return (item for item in self.items if not (skip and self.embedder.is_long(len(item))))

    def _chunks(self) -> Iterator[Chunk]:
        tokens = self.work.plan["batch_tokens"] * BATCHES_A_CHUNK
        if self.job.wanted.per_residue:
            tokens = min(tokens, MOST_BYTES // (4 * self.embedder.width * len(self.embedder.layers)))
        return chunked(self._kept(), MOST_ITEMS, max(tokens, 1))

    def _scan(self) -> _Scan:
        """Read all of the input. ValueError for what cannot be embedded, or cannot stand in the output."""
        scan, names = _Scan(), set[str]()
        long, most = self.job.wanted.long, self.embedder.most
        for item in self.items:
            if self.embedder.is_long(len(item)):
                if long == "error":
                    raise ValueError(f"{item.id} has {len(item):,} residues, more than the {most:,} that run at once")
                scan.long_count += 1
                scan.long += [item.id] if len(scan.long) < NAMED else []
                if long == "skip":
                    continue
            scan.items += 1
            scan.residues += len(item)
            self._check_name(item, scan.items, names)
        if not scan.items:
            raise ValueError(f"{self.job.input} has nothing to embed: all is longer than {most}")
        scan.report = self.items.report()
        return scan

    def _check_name(self, item: Item, count: int, names: set[str]) -> None:
        if self.kind in (".h5", ".npz", ".h5ad") and count > MOST_ROWS:
            raise ValueError(f"{self.output} would have more than {MOST_ROWS:,} rows: write .parquet, or a folder/")
        if self.kind == ".h5":
            name = h5_name(item.id)
            if name in names or name == ".":
                raise ValueError(
                    f"{item.id} cannot be a name in {self.output}: another has it, or has it once / is written as _; "
                    "make ids unique, or write .parquet"
                )
            names.add(name)

    def _announce(self, scan: _Scan) -> None:
        plan, place = self.work.plan, self.work.place
        if self.rank:
            return
        said = [f"{place['model']}: {plan['engine']} engine, {plan['precision']}, on {place['device']}, "
                f"batches of {plan['batch_tokens']:,} tokens"]  # fmt: skip
        if self.work.moved:
            said.append(f"note: the run began elsewhere ({'; '.join(self.work.moved)}): last bits may differ")
        if scan.report:
            said.append(f"note: {self.job.input}: {scan.report}")
        if scan.long_count:
            done = {"window": "run in windows", "truncate": "are truncated", "skip": "are left out"}
            more = ", ..." if scan.long_count > len(scan.long) else ""
            said.append(
                f"note: {scan.long_count:,} of more than {self.embedder.most:,} residues "
                f"{done[self.job.wanted.long]}: {', '.join(scan.long)}{more}"
            )
        print("\n".join(said), file=sys.stderr, flush=True)

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
                    self._do(chunk, rows, told)
        return elsewhere

    def _claimed(
        self, told: Callable[..., None], only: list[int] | None, elsewhere: list[int]
    ) -> Iterator[tuple[Chunk, list[np.ndarray], ExitStack]]:
        """Chunks for us to do, their token ids, and what to close when it is done."""
        for chunk in self._chunks():
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

    def _do(self, chunk: Chunk, rows: list[np.ndarray], told: Callable[..., None]) -> None:
        while True:  # a chunk is made by one budget, so that it is the same whenever a run goes on
            halvings, count = self.budget.halvings, 0

            def done(residues: int) -> None:
                nonlocal count
                count += residues
                told(residues)

            try:
                columns = self.embedder(rows, done)
            except SequenceTooLongError as error:
                item = chunk.items[error.row]
                raise RuntimeError(
                    f"{item.id}, {len(item):,} residues, does not fit into the device's memory by itself: cut it with "
                    "--max-residues, or leave it out with --long skip"
                ) from error
            if self.budget.halvings == halvings:
                break
            told(-count)
            self.work.note_halvings(self.budget.halvings)
        named = dict(zip(self.embedder.columns, columns, strict=True))
        made = table(chunk.items, named, self.job.stored, with_place=isinstance(self.items, Cells))
        self.work.write(chunk.number, made, chunk.digest())

    def _finish(self, scan: _Scan) -> None:
        """Make the output of the chunks, if this is the process that does."""
        if self.rank:
            return
        numbers = [int(shard.stem) for shard in self.work.shards()]
        if self.output.exists():  # a run was killed after its last step but one
            shutil.rmtree(self.work.folder)
            return
        assert numbers == list(range(len(numbers)))
        if self.kind == "/":
            self.work.sweep()
            flush(self.work.folder)
            self.work.folder.rename(self.output)
            flush(self.output.absolute().parent)
            return
        obs = _obs_of(self.job.input) if self.kind == ".h5ad" else None
        assemble(self.work.shards(), self.output, {**self.work.place, **self.work.plan}, obs)
        shutil.rmtree(self.work.folder)


def _obs_of(h5ad: Path) -> Any:
    import anndata

    return anndata.read_h5ad(h5ad, backed="r").obs


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's files, by configuration, name, size and time: whether it is the one that a run began with."""
    hashed = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        stat = file.stat()
        hashed.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\0".encode())
    return hashed.hexdigest()


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each made in another thread while the one before is worked at."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
