"""What a job runs over: sequences of a file, or cells of an .h5ad, one token row each.

L: residues of a sequence, or genes of a cell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from ..data.sequences import Cleaner, read_records
from .embed import special_ids, tokenize


@dataclass(frozen=True)
class Item:
    """One sequence or cell. content: its residues, or token ids int32 [L]; place: its row in the input, from 0."""

    id: str
    place: int
    content: str | np.ndarray

    def __len__(self) -> int:
        return len(self.content)


class Items(Protocol):
    """An input that can be gone through several times. before, after: the special ids around a row."""

    before: np.ndarray
    after: np.ndarray

    def __iter__(self) -> Iterator[Item]: ...

    def rows(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Token ids without special ones, int32 [L] each."""

    def report(self) -> str:
        """What was changed while reading, in a line; empty if nothing was."""


class Sequences:
    """The sequences of a FASTA file or table; the columns are a table's."""

    def __init__(self, path: Path, tokenizer: Any, id_column: str, sequence_column: str, name: str):
        self.path, self.tokenizer, self.columns, self.name = path, tokenizer, (id_column, sequence_column), name
        self.before, self.after = special_ids(tokenizer)
        self.clean = Cleaner(tokenizer)

    def __iter__(self) -> Iterator[Item]:
        self.clean = Cleaner(self.tokenizer)
        for place, record in enumerate(read_records(self.path, *self.columns, self.name)):
            try:
                clean = self.clean(record)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
            yield Item(clean.id, place, clean.sequence)

    def rows(self, items: Sequence[Item]) -> list[np.ndarray]:
        return tokenize(self.tokenizer, [str(item.content) for item in items])

    def report(self) -> str:
        return self.clean.report()


class Cells:
    """Cells as a port's `read_cells` has written them to a parquet file. before, after: how many ids are special."""

    def __init__(self, parquet: Path, before: int, after: int):
        self.parquet = parquet
        with pq.ParquetFile(parquet) as file:
            first = next(file.iter_batches(1, columns=["input_ids"]), None)
        if first is None:
            raise ValueError("no cell has a gene that the model knows")
        ids = np.array(first["input_ids"][0].as_py(), np.int32)
        self.before, self.after = ids[:before], ids[len(ids) - after :]

    def __iter__(self) -> Iterator[Item]:
        first, last = len(self.before), len(self.after)
        with pq.ParquetFile(self.parquet) as file:
            for batch in file.iter_batches(1024, columns=["obs_index", "id", "input_ids"]):
                ids = batch["input_ids"]
                flat, ends = ids.flatten().to_numpy(), np.cumsum(ids.value_lengths().to_numpy())
                places, names = batch["obs_index"].to_pylist(), batch["id"].to_pylist()
                for place, name, end, start in zip(places, names, ends, [0, *ends[:-1]], strict=True):
                    yield Item(name, place, flat[start + first : end - last].astype(np.int32))

    def rows(self, items: Sequence[Item]) -> list[np.ndarray]:
        return [np.asarray(item.content) for item in items]

    def report(self) -> str:
        return ""  # the reader has warned of what it left out


@dataclass(frozen=True)
class Chunk:
    """Items that are worked at together, and written together."""

    number: int
    items: list[Item]

    @property
    def residues(self) -> int:
        return sum(map(len, self.items))

    @cached_property
    def digest(self) -> str:
        """Of ids and contents: whether an input is the one that a finished chunk was made of."""
        hashed = blake2b(digest_size=16)
        for item in self.items:
            content = item.content.encode() if isinstance(item.content, str) else item.content.tobytes()
            hashed.update(f"{item.place} {len(content)} {item.id}\0".encode())
            hashed.update(content)
        return hashed.hexdigest()


def chunked(items: Iterator[Item], most_items: int, most_residues: int) -> Iterator[Chunk]:
    """Chunks of at most so many items and residues, or of a single longer item: a pure function of the arguments."""
    chunk: list[Item] = []
    number = residues = 0
    for item in items:
        if chunk and (len(chunk) == most_items or residues + len(item) > most_residues):
            yield Chunk(number, chunk)
            number, chunk, residues = number + 1, [], 0
        chunk.append(item)
        residues += len(item)
    if chunk:
        yield Chunk(number, chunk)
