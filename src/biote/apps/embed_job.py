"""What `biote embed` is asked for, and what is loaded and checked for it, wherever it runs."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..convert import locate
from ..data.batches import SequenceTooLongError, default_budget
from ..loading import load
from ..port import Json, ModelPort, port_of
from .embed import Embedder, Wanted, encoder_of, states_kept
from .items import Cells, Chunk, Item, Items, Sequences, chunked
from .outputs import MOST_ROWS, h5_name, kind_of, table

STORED = ("float32", "float16")
BATCHES_A_CHUNK = 64  # enough that sorting fills batches, few enough that a kill costs seconds
MOST_ITEMS = 8192  # in a chunk
MOST_BYTES = 2**28  # of residues' states in a chunk
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAMED = 5  # of sequences in a message


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

    def __post_init__(self) -> None:
        if self.stored not in STORED:
            raise ValueError(f"stored={self.stored!r} is unknown; choose one of {', '.join(STORED)}")
        if self.kind == ".h5ad" and self.wanted.per_residue:
            raise ValueError(f"{self.output}: an .h5ad has one embedding a cell; write .parquet, .h5 or .npz")
        if str(self.input) != "-" and not self.input.is_file():
            raise FileNotFoundError(f"{self.input} is no file")

    @property
    def kind(self) -> str:
        """The output's, by its name: "/" is a folder."""
        return "/" if self.output.endswith(("/", os.sep)) else kind_of(Path(self.output))


@dataclass
class Scan:
    """What a look at the whole input finds, before anything runs."""

    items: int = 0
    residues: int = 0
    long: list[str] = field(default_factory=list)  # the first of them, by id
    long_count: int = 0
    report: str = ""


class Session:
    """A job's model, loaded on a device, and what depends on nothing else.

    ValueError, FileNotFoundError or RuntimeError for what cannot be.
    """

    def __init__(self, job: Job, device: str | None = None):
        self.job = job
        self.folder = locate(job.model, job.revision, job.subfolder)
        self.model, self.tokenizer = load(
            self.folder, "embedding", engine=job.engine, dtype=job.dtype, device=device, port_name=job.port_name
        )
        self.encoder = encoder_of(self.model)
        self.weights = _fingerprint(self.folder, self.encoder)
        port = port_of(type(self.model))
        assert port is not None  # it was loaded by one
        self.port: ModelPort = port
        self.reads_cells = self._reads_cells()

    def plan(self) -> Json:
        """What decides the numbers, and must be the same when a run goes on."""
        job, config = self.job, self.encoder.config
        precision = "bfloat16, products in fp8" if job.dtype == "fp8" else str(self.model.dtype).removeprefix("torch.")
        columns = [job.layer, job.gene_column] if self.reads_cells else [job.id_column, job.sequence_column]
        wanted = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(job.wanted).items()}
        return {
            "engine": self.encoder.engine, "precision": precision, "port": self.port.name,
            "hidden_size": config.hidden_size, **wanted, "stored": job.stored, "columns": columns,
            "weights": self.weights,
        }  # fmt: skip

    def place(self) -> Json:
        """Where it runs, and by what, which may change a result's last bits."""
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
        if self.job.kind == ".h5ad" and self.port.read_cells is None:
            raise ValueError(f"{self.job.output}: an .h5ad is for cells; sequences go into .parquet, .h5 or .npz")
        return self.port.read_cells is not None

    def batch_tokens(self) -> int:
        """How many run at once, if nobody says."""
        return default_budget(self.encoder, states_kept(self.encoder, self.job.wanted.layers))

    def items(self, scratch: Path) -> Items:
        """The input. scratch: where what cannot be gone through twice is copied to, one process after the other."""
        job, path, name = self.job, self.job.input, str(self.job.input)
        if self.reads_cells:
            return self._cells(scratch)
        if str(path) == "-":
            path, name = scratch / ".stdin", "stdin"
            with path.open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        return Sequences(path, self.tokenizer, job.id_column, job.sequence_column, name)

    def _cells(self, scratch: Path) -> Cells:
        assert self.port.read_cells is not None
        job, stat = self.job, self.job.input.stat()
        parquet = scratch / f".cells-{stat.st_size}-{stat.st_mtime_ns}.parquet"  # the input may change between runs
        around = parquet.with_suffix(".around")
        if not around.exists():
            parquet.unlink(missing_ok=True)
            read = self.port.read_cells(job.input, self.folder, parquet, job.layer, job.gene_column)
            around.write_text(f"{read.before} {read.after}")
        return Cells(parquet, *map(int, around.read_text().split()))

    def embedder(self, before: np.ndarray, after: np.ndarray, batch_tokens: int) -> Embedder:
        return Embedder(self.model, before, after, self.job.wanted, batch_tokens)

    def scan(self, items: Items, embedder: Embedder) -> Scan:
        """Read all of the input. ValueError for what cannot be embedded, or cannot stand in the output."""
        scan, names = Scan(), set[str]()
        long, most = self.job.wanted.long, embedder.most
        for item in items:
            if embedder.is_long(len(item)):
                if long == "error":
                    raise ValueError(f"{item.id} has {len(item):,} residues, more than the {most:,} that run at once")
                scan.long_count += 1
                scan.long += [item.id] if len(scan.long) < NAMED else []
                if long == "skip":
                    continue
            scan.items += 1
            scan.residues += min(len(item), most or len(item)) if long == "truncate" else len(item)
            self._check_name(item, scan.items, names)
        if not scan.items:
            raise ValueError(f"{self.job.input} has nothing to embed: all is longer than {most}")
        scan.report = items.report()
        return scan

    def _check_name(self, item: Item, count: int, names: set[str]) -> None:
        if self.job.kind in (".h5", ".npz", ".h5ad") and count > MOST_ROWS:
            raise ValueError(
                f"{self.job.output} would have more than {MOST_ROWS:,} rows: write .parquet, or a folder/"
            )
        if self.job.kind == ".h5":
            name = h5_name(item.id)
            if name in names or name == "." or "\0" in name:
                raise ValueError(
                    f"{item.id} cannot be a name in {self.job.output}: another has it, or has it once / is written "
                    "as _; make ids unique, or write .parquet"
                )
            names.add(name)

    def chunks(self, items: Items, embedder: Embedder) -> Iterator[Chunk]:
        """The input in pieces: a pure function of it and of the options. What is too long may be left out, or cut."""
        tokens = embedder.batch_tokens * BATCHES_A_CHUNK
        if self.job.wanted.per_residue:
            tokens = min(tokens, MOST_BYTES // (4 * embedder.width * len(embedder.layers)))
        return chunked(self._kept(items, embedder), MOST_ITEMS, max(tokens, 1))

    def _kept(self, items: Items, embedder: Embedder) -> Iterator[Item]:
        for item in items:
            if self.job.wanted.long == "window" or not embedder.is_long(len(item)):
                yield item
            elif self.job.wanted.long == "truncate":
                yield replace(item, content=item.content[: embedder.most])

    def make(self, embedder: Embedder, chunk: Chunk, rows: list[np.ndarray], told: Callable[[int], None]) -> pa.Table:
        """A chunk's results: the same whenever and wherever it is done, on one kind of device."""
        try:
            columns = embedder(rows, told)
        except SequenceTooLongError as error:
            item = chunk.items[error.row]
            raise RuntimeError(
                f"{item.id}, {len(item):,} residues, does not fit into the device's memory by itself: cut it with "
                "--max-residues, or leave it out with --long skip"
            ) from error
        named = dict(zip(embedder.columns, columns, strict=True))
        return table(chunk.items, named, self.job.stored, with_place=self.reads_cells)

    def notes(self, scan: Scan, embedder: Embedder) -> list[str]:
        """What a user should know of the input before it runs, a line each."""
        said = []
        if scan.report:
            said.append(f"note: {self.job.input}: {scan.report}")
        if scan.long_count:
            done = {"window": "run in windows", "truncate": "are truncated", "skip": "are left out"}
            more = ", ..." if scan.long_count > len(scan.long) else ""
            said.append(
                f"note: {scan.long_count:,} of more than {embedder.most:,} residues "
                f"{done[self.job.wanted.long]}: {', '.join(scan.long)}{more}"
            )
        return said


def _fingerprint(folder: Path, encoder: Any) -> str:
    """Of the configuration and the weights as they run, by sums of their bits: the same on every machine."""
    hashed = blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for name, tensor in chain(encoder.named_parameters(), encoder.named_buffers()):
        bits = tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])
        rows = bits.reshape(len(bits) if bits.dim() else 1, -1).sum(1, dtype=torch.int64)
        places = torch.arange(1, len(rows) + 1, device=rows.device)
        hashed.update(f"{name} {tuple(tensor.shape)} {int((rows * places).sum())}\0".encode())
    return hashed.hexdigest()
