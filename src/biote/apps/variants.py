"""Variants like `A23V:T45S` of a protein, and the CSV files that hold them."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..data.sequences import Record

SUBSTITUTION = re.compile(r"([A-Z])(-?[0-9]+)([A-Z])")


class Substitution(NamedTuple):
    """One residue for another, at a place that counts from 0."""

    wild: str
    place: int
    mutant: str


@dataclass(frozen=True)
class Variant:
    """Substitutions of one protein, by place; those that change nothing (`A23A`) are left out.

    protein: its number among the proteins.
    """

    protein: int
    substitutions: tuple[Substitution, ...]

    def applied(self, sequence: str) -> str:
        """The mutant's sequence."""
        letters = list(sequence)
        for _, place, mutant in self.substitutions:
            letters[place] = mutant
        return "".join(letters)


def read_variant(text: str, protein: int, sequence: str, offset: int = 1) -> Variant:
    """`A23V:T45S` -> Variant; offset: the number that the first residue has. ValueError for what does not fit."""
    found: dict[int, Substitution] = {}
    for part in text.strip().split(":"):
        match = SUBSTITUTION.fullmatch(part.strip())
        if not match:
            raise ValueError(f"{text!r} is no variant like A23V or A23V:T45S")
        wild, number, mutant = match[1], int(match[2]), match[3]
        place = number - offset
        if not 0 <= place < len(sequence):
            raise ValueError(
                f"{part} is outside the protein, whose residues are {offset} to {len(sequence) + offset - 1}"
            )
        if sequence[place] != wild:
            raise ValueError(f"{part} says {wild}, but residue {number} of the protein is {sequence[place]}")
        if place in found:
            raise ValueError(f"{text} has residue {number} twice")
        found[place] = Substitution(wild, place, mutant)
    return Variant(protein, tuple(found[place] for place in sorted(found) if found[place].wild != found[place].mutant))


@dataclass(frozen=True)
class Table:
    """A CSV file as it is: every field a text. lines: where in the file each row ends."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """The fields of a column; ValueError if there is none of that name."""
        if name not in self.header:
            raise ValueError(f"{self.path} has no column {name!r}; it has {', '.join(self.header)}")
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def with_columns(self, columns: Mapping[str, Sequence[str]]) -> list[list[str]]:
        """Header and rows with further columns at the end."""
        added = zip(*columns.values(), strict=True)
        rows = (row + list(more) for row, more in zip(self.rows, added, strict=True))
        return [self.header + list(columns), *rows]


def read_table(path: Path) -> Table:
    """A CSV file with a header; empty lines are left out. FileNotFoundError or ValueError that name path and line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    csv.field_size_limit(2**31 - 1)
    rows, lines = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            for row in filter(None, reader):
                rows.append(row)
                lines.append(reader.line_num)
                if len(row) != len(rows[0]):
                    raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(rows[0])}")
    except (csv.Error, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has no variants: it needs a header and rows below it")
    return Table(path, rows[0], rows[1:], lines[1:])


def read_variants(
    table: Table, proteins: Sequence[Record], mutation_column: str, id_column: str | None, offset: int
) -> list[Variant]:
    """The variants of a table. id_column: says which protein each is of; None: there is one protein.

    ValueError that names the first line that does not fit, and says how many there are.
    """
    number_of = {protein.id: number for number, protein in enumerate(proteins)}
    if id_column is None and len(proteins) > 1:
        raise ValueError(f"there are {len(proteins):,} proteins: --id-column says which one a variant is of")
    if id_column is not None and len(number_of) < len(proteins):
        twice = next(name for name, count in Counter(protein.id for protein in proteins).items() if count > 1)
        raise ValueError(f"there are several proteins with the id {twice!r}")
    ids = table.column(id_column) if id_column is not None else [proteins[0].id] * len(table.rows)
    variants, wrong = [], []
    for line, name, text in zip(table.lines, ids, table.column(mutation_column), strict=True):
        try:
            if name not in number_of:
                raise ValueError(f"there is no protein with the id {name!r}")
            number = number_of[name]
            variants.append(read_variant(text, number, proteins[number].sequence, offset))
        except ValueError as error:
            wrong.append(f"line {line}: {error}")
    if wrong:
        others = f" (and {len(wrong) - 1:,} more such lines)" if len(wrong) > 1 else ""
        raise ValueError(f"{table.path}, {wrong[0]}{others}")
    return variants


def scan_of(number: int, protein: Record, letters: str) -> Iterator[Variant]:
    """Every single substitution of a protein by `letters`, residue by residue; a residue by itself changes nothing."""
    for place, wild in enumerate(protein.sequence):
        for mutant in letters:
            yield Variant(number, (Substitution(wild, place, mutant),) if wild != mutant else ())
