"""Rank-value encoding: a cell's counts become the list of its genes, by falling expression.

Source: Theodoris et al. 2023, Nature 618:616, and the original's tokenizer (V1 and V2 rules).
Shapes: B cells, G genes of the file, K genes of the file that the token dictionary knows.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from scipy import sparse

from biote.convert import locate
from biote.files import new_file, read_json

from .counts import (
    Source,
    by_cells,
    check_counts,
    check_shape,
    in_file,
    in_memory,
    must_be_hdf5,
    naming,
    obs_column,
    passing,
    read_counts,
    warn,
)
from .dictionaries import MEDIANS, TOKEN_IDS, dictionaries_in, read_dictionary, version_of
from .gene_ids import gene_ids
from .padding import Padding
from .special_tokens import MOST_GENES, special_tokens

CHUNK = 1024  # cells in memory at a time
MOST_CELLS = 500_000  # in a chunk: arrow counts a chunk's tokens in 32 bits
MADE = ("input_ids", "length")  # the columns that the tokenizer makes


@dataclass
class Encoded:
    """What became of a file's cells and genes."""

    genes: int = 0
    known_genes: int = 0  # different ones, in the dictionary
    ids: str = ""  # where the genes' ids stood: var_names, var['gene_ids'], ...
    cells: int = 0
    written: int = 0
    filtered: int = 0  # obs["filter_pass"] is not 1
    without_genes: int = 0  # no count in any gene that the dictionary knows


class GeneformerTokenizer(Padding):
    """Encodes cells by the V1 or V2 rules.

    token_ids, medians: by Ensembl id, as dictionaries or as JSON files. `token_ids` holds the special tokens too
    (V1: <pad> 0, <mask> 1; V2: also <cls> 2, <eos> 3). A gene's median is that of its normalised counts over the cells
    of the original's corpus.

    The rules: Ensembl ids in capitals, counts of equal ids summed, genes outside the dictionary left out; each count
    over the cell's total of all genes, times 10,000, over the gene's median; zeros dropped; by falling value. Total
    and 10,000 are the same for all genes of a cell and cannot change their order, so they are not computed, and their
    rounding makes no difference between equal values: those go by rising token id, whatever the order of genes in the
    file. V1 keeps the first 2048 genes; V2 keeps 4094, between <cls> and <eos>.

    Ids are those of var["ensembl_id"]; without it, or where it holds none that the dictionary knows, var's names, or
    the column of text that has the most known ids (10x: var["gene_ids"]), which a warning then names. `id_column` says
    where they are.

    An id is all of its name: ENSG00000000003.15 (a version) and ENSG00000000003-1 (by var_names_make_unique) are other
    genes than ENSG00000000003, and are left out. A warning counts those that the dictionary knows without the suffix,
    with the line that strips it (then the counts of equal ids are summed); without such, a warning says if less than a
    tenth of the genes is in the dictionary. It is an error if none is.
    """

    def __init__(
        self, token_ids: Mapping[str, int] | Path | str, medians: Mapping[str, float] | Path | str, version: str = "V2"
    ):
        expected = special_tokens(version)
        self.version = version
        self.token_ids = dict(read_dictionary(token_ids))
        wrong = [f"{name}: {number!r}" for name, number in self.token_ids.items() if not _is_token_id(number)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} token ids are no whole numbers below 2^31, among them {', '.join(wrong[:3])}"
            )
        self.medians = {key.upper(): value for key, value in read_dictionary(medians).items()}
        special = {key: number for key, number in self.token_ids.items() if key.startswith("<")}
        if special != expected:
            raise ValueError(f"the special tokens of {version} are {expected}; the dictionary has {special}")
        self.genes = {key.upper(): number for key, number in self.token_ids.items() if not key.startswith("<")}
        self.first, self.last = (np.array([special.get(name, 0)], np.int32) for name in ("<cls>", "<eos>"))  # of V2
        numbers = set(self.genes.values())
        if len(numbers) + len(special) < len(self.token_ids) or min(numbers, default=len(special)) < len(special):
            raise ValueError(
                "the dictionary gives one token id, or one gene, to several genes, or a special id to one"
            )
        lacking = sorted(gene for gene in self.genes if not _is_positive(self.medians.get(gene)))
        if lacking:
            raise ValueError(f"{len(lacking)} genes have no positive median, among them {', '.join(lacking[:3])}")

    @classmethod
    def from_pretrained(cls, source: Path | str, revision: str | None = None) -> "GeneformerTokenizer":
        """The tokenizer whose dictionaries lie beside a checkpoint; their special tokens tell V1 from V2.

        source: a folder that `save_pretrained` wrote or that was converted from one, a tag or a Hub id.
        FileNotFoundError where there are no dictionaries, ValueError where they have ids past the model's vocabulary.
        """
        folder = locate(source, revision)
        token_ids, medians = dictionaries_in(folder)
        numbers = dict(read_dictionary(token_ids))
        tokenizer = cls(numbers, medians, version_of(numbers, token_ids))
        if (folder / "config.json").is_file():
            tokenizer._check_vocabulary(read_json(folder / "config.json").get("vocab_size"), folder)
        return tokenizer

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the dictionaries beside a checkpoint, as JSON, over those that are there; each appears whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        token_ids = {token: int(number) for token, number in self.token_ids.items()}
        medians = {gene: float(median) for gene, median in self.medians.items() if gene in self.genes}
        for name, dictionary in ((TOKEN_IDS, token_ids), (MEDIANS, medians)):
            with open(folder / f"{name}.new", "w", encoding="utf-8") as file:
                file.write(json.dumps(dictionary) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, folder / name)

    def _check_vocabulary(self, vocabulary: Any, folder: Path) -> None:
        """Held against the size that a model's config.json says."""
        largest = max(map(int, self.token_ids.values()))
        if not isinstance(vocabulary, int) or largest >= vocabulary:
            raise ValueError(
                f"{folder / TOKEN_IDS} has token ids up to {largest}, but the model's vocab_size is {vocabulary!r}: "
                "it is another model's dictionary"
            )
        if len(self.token_ids) < vocabulary:
            warn(
                f"{len(self.token_ids)} token ids for a model of {vocabulary}: is this its dictionary?",
                folder / TOKEN_IDS,
                4,
            )

    @property
    def specials_around(self) -> tuple[int, int]:
        """How many special tokens stand before and after the genes of each cell."""
        return (0, 0) if self.version == "V1" else (1, 1)

    def encode(
        self,
        cells: anndata.AnnData,
        obs_columns: Sequence[str] | Mapping[str, str] = (),
        layer: str | None = None,
        id_column: str | None = None,
    ) -> pa.Table:
        """Cells in memory -> table with input_ids (list of int32), length (int32) and the chosen columns of obs.

        obs_columns: names of columns, or those by the name that the table gives them; "obs_names" stands for the
        cells' own names, "obs_index" for their places in obs (int64).
        layer: where the raw counts are, if not in X: a layer, or "raw/X" for the counts in `raw`, whose genes are
        those of raw.var. Nothing but what is named is read; if it holds no counts, the error says which table does.
        id_column: the column of var (or "var_names") with the Ensembl ids; see `gene_ids.py` for what is read without.
        ValueError for what cannot be counts; cells that have none of the dictionary's genes are left out.
        Warnings count these cells, Ensembl ids that occur several times, and genes that are left out by mistake.
        """
        path = Path(cells.filename) if cells.isbacked else None
        with naming(path):
            source = in_memory(cells, layer)
        report = Encoded()
        tables = list(self._tables(source, obs_columns, report, CHUNK, id_column))
        _warn_of_cells(report, path)
        return pa.concat_tables(tables)

    def encode_file(
        self,
        h5ad: Path | str,
        parquet: Path | str,
        obs_columns: Sequence[str] | Mapping[str, str] = (),
        layer: str | None = None,
        chunk_cells: int = CHUNK,
        id_column: str | None = None,
    ) -> Encoded:
        """An .h5ad file -> a parquet file as `datasets.load_dataset("parquet", ...)` reads it; see `encode`.

        Only `chunk_cells` cells are in memory at a time, if the counts are stored dense or by cells (CSR). The file is
        read twice: all of it is checked before anything is written. The parquet file appears whole or not at all.
        """
        h5ad, parquet = Path(h5ad), Path(parquet)
        if not 1 <= chunk_cells <= MOST_CELLS:
            raise ValueError(f"chunk_cells={chunk_cells} must be between 1 and {MOST_CELLS:,}")
        if parquet.exists():
            raise FileExistsError(f"{parquet} exists already; remove it or choose another name")
        must_be_hdf5(h5ad)
        report = Encoded()
        with ExitStack() as stack:
            with naming(h5ad):
                source = in_file(stack.enter_context(h5py.File(h5ad)), h5ad, layer)
            tables = self._tables(source, obs_columns, report, chunk_cells, id_column)
            _write(tables, parquet)
        _warn_of_cells(report, h5ad)
        return report

    def _tables(
        self,
        source: Source,
        obs_columns: Sequence[str] | Mapping[str, str],
        report: Encoded,
        chunk_cells: int,
        id_column: str | None,
    ) -> Iterator[pa.Table]:
        """Check all of the source at once; then a table for each chunk of cells, as it is asked for."""
        with naming(source.path):
            check_shape(source)
            columns = _obs_columns(source, obs_columns)
            passes = passing(source.obs)
            genes = self._known_genes(source, report, id_column)
            check_counts(source)
            source.counts = by_cells(source)
        return self._encoded(source, columns, passes, genes, report, chunk_cells)

    def _encoded(
        self,
        source: Source,
        columns: dict[str, pa.ChunkedArray],
        passes: np.ndarray,
        genes: tuple[sparse.csr_matrix, np.ndarray, np.ndarray],
        report: Encoded,
        chunk_cells: int,
    ) -> Iterator[pa.Table]:
        selector, token_ids, medians = genes
        starts = range(0, max(len(source.obs), 1), chunk_cells)  # one empty table if there is no cell
        quiet = not sys.stderr.isatty()
        for start in track(starts, "encoding cells", console=Console(stderr=True), disable=quiet, transient=True):
            rows = slice(start, min(start + chunk_cells, len(source.obs)))
            with naming(source.path):
                counts = read_counts(source, rows)
            ranked = self._ranked(counts @ selector, token_ids, medians)
            kept = [index for index, tokens in enumerate(ranked) if passes[start + index] and len(tokens)]
            report.cells += len(ranked)
            report.written += len(kept)
            report.filtered += int((~passes[rows]).sum())
            report.without_genes += int(passes[rows].sum()) - len(kept)
            cells = [self._with_specials(ranked[index]) for index in kept]
            lengths = np.array([len(cell) for cell in cells], dtype=np.int32)
            ends = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
            flat = np.concatenate([np.empty(0, np.int32), *cells])
            made = {"input_ids": pa.ListArray.from_arrays(ends, flat), "length": pa.array(lengths)}
            places = pa.array([start + index for index in kept], pa.int64())
            yield pa.table({**made, **{name: column.take(places) for name, column in columns.items()}})

    def _known_genes(
        self, source: Source, report: Encoded, id_column: str | None
    ) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
        """A 0/1 matrix [G, K] that picks and sums the known genes, by rising token id; their ids and medians [K]."""
        found = gene_ids(source, self.genes, id_column)
        names = found.ids
        known = [(self.genes[name], column) for column, name in enumerate(names) if name in self.genes]
        tokens, places = (np.array(part) for part in zip(*known, strict=True))
        token_ids, columns = np.unique(tokens.astype(np.int32), return_inverse=True)
        if len(token_ids) < len(known):
            repeated = len(known) - len(token_ids)
            warn(f"{repeated} genes repeat the Ensembl id of another: their counts are summed", source.path, 5)
        ones = np.ones(len(places))
        selector = sparse.csr_matrix((ones, (places, columns)), shape=(len(names), len(token_ids)))
        report.ids, (report.genes, report.known_genes) = found.place, selector.shape
        by_id = {number: gene for gene, number in self.genes.items()}
        return selector, token_ids, np.array([self.medians[by_id[number]] for number in token_ids])

    def _ranked(self, counts: sparse.csr_matrix, token_ids: np.ndarray, medians: np.ndarray) -> list[np.ndarray]:
        """Counts of known genes [B, K] -> each cell's token ids, by falling value."""
        counts.sort_indices()
        counts.eliminate_zeros()
        falling = -counts.data / medians[counts.indices]
        ranked = []
        for start, end in zip(counts.indptr, counts.indptr[1:], strict=False):
            order = np.argsort(falling[start:end], kind="stable")[: MOST_GENES[self.version]]
            ranked.append(token_ids[counts.indices[start:end][order]])
        return ranked

    def _with_specials(self, tokens: np.ndarray) -> np.ndarray:
        if self.version == "V1":
            return tokens
        return np.concatenate((self.first, tokens, self.last))


def _is_token_id(number: Any) -> bool:
    return isinstance(number, Integral) and 0 <= int(number) < 2**31


def _is_positive(median: Any) -> bool:
    return isinstance(median, Real) and 0 < float(median) < math.inf


def _obs_columns(source: Source, asked: Sequence[str] | Mapping[str, str]) -> dict[str, pa.ChunkedArray]:
    names = [asked] if isinstance(asked, str) else asked
    columns = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    taken = [name for name in MADE if name in columns]
    if taken:
        raise ValueError(f"the output has a column {taken[0]} of its own: rename that of obs")
    return {name: obs_column(source.obs, column) for name, column in columns.items()}


def _write(tables: Iterator[pa.Table], parquet: Path) -> None:
    """Write a file that appears whole or not at all."""
    parquet.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_file(parquet) as partial, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            writer = writer or stack.enter_context(pq.ParquetWriter(partial, table.schema))
            if table.num_rows:  # datasets cannot read a file whose first row group is empty
                writer.write_table(table)


def _warn_of_cells(report: Encoded, path: Path | None) -> None:
    if report.filtered and report.filtered == report.cells:
        warn("no cell passes obs['filter_pass']", path, 4)
    if report.without_genes:
        left_out = f"{report.without_genes} of {report.cells} cells have no gene of the dictionary and were left out"
        warn(left_out, path, 4)
