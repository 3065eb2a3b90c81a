"""Sequences from FASTA files and tables, and what has to be done to a sequence before a tokenizer reads it."""

import csv
import gzip
import io
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TextIO

import pyarrow.parquet as pq
from Bio.SeqIO.FastaIO import SimpleFastaParser
from pyarrow import ArrowException, types

GZIP = b"\x1f\x8b"
TABLES = {".csv": ",", ".tsv": "\t"}
ROWS = 4096  # of a parquet file at a time
UNKNOWN_RESIDUE = "X"  # IUPAC


@dataclass(frozen=True)
class Record:
    """A sequence with its name."""

    id: str
    sequence: str


def read_records(
    path: Path | str, id_column: str = "id", sequence_column: str = "sequence", name: str | None = None
) -> Iterator[Record]:
    """The records of a FASTA, CSV, TSV (each also gzipped) or parquet file, as written; "-" is FASTA on stdin.

    Which kind is said by the name's ending (.csv, .tsv, .parquet); all others are FASTA, whose ids are what stands
    before the first white space. The columns are those of a table. One record is in memory at a time (of parquet
    4,096). name: what errors call the file, if not by its path. FileNotFoundError or ValueError, with that and the
    record, for what is missing, damaged or empty.
    """
    columns, path, number = (id_column, sequence_column), Path(path), 0
    with _naming(name or ("stdin" if str(path) == "-" else str(path))):
        kind = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
        if kind == ".parquet":
            records = _parquet(path, *columns)
        elif kind in TABLES:
            records = _table(path, TABLES[kind], *columns)
        else:
            records = _fasta(path)
        for number, record in enumerate(records, 1):
            if not record.id:
                raise ValueError(f"record {number} has no id")
            yield record
        if not number:
            raise ValueError("there is no sequence in it")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors over what a file holds begin with its name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is a damaged gzip file ({error}): copy it again") from error
    except (ValueError, csv.Error, ArrowException) as error:
        raise ValueError(f"{name}: {error}") from error


@contextmanager
def _open(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file's text, unpacked if it is gzipped, without the mark that some editors begin it with."""
    with ExitStack() as stack:
        raw: Any = sys.stdin.buffer if str(path) == "-" else stack.enter_context(path.open("rb"))
        buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
        unpacked: Any = gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == GZIP else buffered
        yield io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline=newline)


def _fasta(path: Path) -> Iterator[Record]:
    with _open(path) as text:
        first = next((line for line in text if line.strip()), "")
        if first and not first.startswith(">"):
            raise ValueError(f"the first line of a FASTA file begins with '>', not with {first.strip()[:20]!r}")
        for title, sequence in SimpleFastaParser(chain([first] if first else [], text)):
            yield Record((title.split(maxsplit=1) or [""])[0], "".join(sequence.split()))


def _table(path: Path, delimiter: str, id_column: str, sequence_column: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # titin is longer than the default
    with _open(path, newline="") as text:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        _check_columns(rows.fieldnames or [], id_column, sequence_column)
        for row in rows:
            if row[id_column] is None or row[sequence_column] is None:
                raise ValueError(f"line {rows.line_num} has fewer fields than the header")
            if None in row:
                raise ValueError(
                    f"line {rows.line_num} has more fields than the header: quote those with a {delimiter!r}"
                )
            yield Record(row[id_column].strip(), "".join(row[sequence_column].split()))


def _parquet(path: Path, id_column: str, sequence_column: str) -> Iterator[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, id_column, sequence_column)
        for column in (id_column, sequence_column):
            kind = file.schema_arrow.field(column).type
            if not _is_text(kind) and not (column == id_column and types.is_integer(kind)):
                raise ValueError(f"the column {column} holds {kind}, not text")
        number = 0
        for batch in file.iter_batches(ROWS, columns=list(dict.fromkeys((id_column, sequence_column)))):
            for name, sequence in zip(
                *(batch[column].to_pylist() for column in (id_column, sequence_column)), strict=True
            ):
                number += 1
                if name is None or sequence is None:
                    raise ValueError(f"row {number} lacks its {id_column if name is None else sequence_column}")
                yield Record(str(name).strip(), "".join(sequence.split()))


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind  # as pandas writes categories
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _check_columns(names: Sequence[str], *wanted: str) -> None:
    for name in wanted:
        if name not in names:
            raise ValueError(f"there is no column {name!r}; it has {', '.join(names) or 'none'}")
        if names.count(name) > 1:
            raise ValueError(f"there are {names.count(name)} columns {name!r}")


@dataclass
class Cleaner:
    """Writes sequences as a tokenizer with one token a letter reads them, and counts what it changes.

    Small letters become capitals; gaps ("-", "." and "~") are left out, and one "*" at the end; letters that the
    tokenizer does not know become X, or stay where it does not know X either, one unknown token each. Anything else
    that is no letter is an error: digits, a "*" within, a sequence of nothing.
    """

    tokenizer: Any
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        vocabulary = self.tokenizer.get_vocab()
        foreign = [letter for letter in ascii_uppercase if letter not in vocabulary]
        self._has_x = UNKNOWN_RESIDUE in vocabulary
        self._foreign = re.compile(f"[{''.join(foreign)}]") if foreign else None

    def __call__(self, record: Record) -> Record:
        """The record as it is tokenized. ValueError naming record and place."""
        text = record.sequence
        if not text.isupper():
            small = sum(map(str.islower, text))
            self._count(small, "small letters read as capitals")
            text = text.upper() if text.isascii() else text
        if not text.isalpha():
            kept = text.replace("-", "").replace(".", "").replace("~", "")
            self._count(len(text) - len(kept), "gaps left out")
            text = kept.removesuffix("*")
            self._count(len(kept) - len(text), "stops (*) at the end left out")
        if not text:
            raise ValueError(f"{record.id} has no residues")
        if not (text.isascii() and text.isalpha()):
            place, letter = next(
                (at, one)
                for at, one in enumerate(record.sequence, 1)
                if not (one.isascii() and (one.isalpha() or one in "-.~"))
            )
            raise ValueError(f"{record.id} has {letter!r} at position {place}, which is no residue")
        if self._foreign is not None:
            found = len(self._foreign.findall(text))
            if found and self._has_x:
                text = self._foreign.sub(UNKNOWN_RESIDUE, text)
            self._count(found, f"residues that the model does not know read as {'X' if self._has_x else '<unk>'}")
        return Record(record.id, text)

    def _count(self, number: int, what: str) -> None:
        if number:
            self.counts[what] += number

    def report(self) -> str:
        """What was changed, in a line; empty if nothing was."""
        return ", ".join(f"{number:,} {what}" for what, number in self.counts.items())
