"""Rank-value encoding: a cell's counts become the list of its genes, by falling expression.

Source: Theodoris et al. 2023, Nature 618:616, and the original's tokenizer (V1 and V2 rules).
Shapes: B cells, G genes of the file, K genes of the file that the token dictionary knows.
"""

import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata.io import read_elem, sparse_dataset
from rich.console import Console
from rich.progress import track
from scipy import sparse

from .special_tokens import special_tokens

MOST_GENES = {"V1": 2048, "V2": 4094}
CHUNK = 1024  # cells in memory at a time
PICKLE = b"\x80"  # what pickles begin with, since their second protocol
MOST_CELLS = 500_000  # in a chunk: arrow counts a chunk's tokens in 32 bits


@dataclass
class Encoded:
    """What became of a file's cells and genes."""

    genes: int = 0
    known_genes: int = 0  # different ones, in the dictionary
    cells: int = 0
    written: int = 0
    filtered: int = 0  # obs["filter_pass"] is not 1
    without_genes: int = 0  # no count in any gene that the dictionary knows


@dataclass
class _Source:
    """Counts [B, G], sliced by rows, with their annotation."""

    counts: Any
    obs: pd.DataFrame
    var: pd.DataFrame


class GeneformerTokenizer:
    """Encodes cells by the V1 or V2 rules.

    token_ids, medians: by Ensembl id, as dictionaries or as JSON files. `token_ids` holds the special tokens too
    (V1: <pad> 0, <mask> 1; V2: also <cls> 2, <eos> 3). A gene's median is that of its normalised counts over the cells
    of the original's corpus.

    The rules: Ensembl ids in capitals, counts of equal ids summed, genes outside the dictionary left out; each count
    over the cell's total of all genes, times 10,000, over the gene's median; zeros dropped; by falling value. Total
    and 10,000 are the same for all genes of a cell and cannot change their order, so they are not computed, and their
    rounding makes no difference between equal values: those go by rising token id, whatever the order of genes in the
    file. V1 keeps the first 2048 genes; V2 keeps 4094, between <cls> and <eos>.
    """

    def __init__(
        self, token_ids: Mapping[str, int] | Path | str, medians: Mapping[str, float] | Path | str, version: str = "V2"
    ):
        expected = special_tokens(version)
        self.version = version
        self.token_ids = dict(_read(token_ids))
        wrong = [f"{name}: {number!r}" for name, number in self.token_ids.items() if not _is_token_id(number)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} token ids are no whole numbers below 2^31, among them {', '.join(wrong[:3])}"
            )
        self.medians = {key.upper(): value for key, value in _read(medians).items()}
        special = {key: number for key, number in self.token_ids.items() if key.startswith("<")}
        if special != expected:
            raise ValueError(f"the special tokens of {version} are {expected}; the dictionary has {special}")
        self.genes = {key.upper(): number for key, number in self.token_ids.items() if not key.startswith("<")}
        numbers = set(self.genes.values())
        if len(numbers) + len(special) < len(self.token_ids) or min(numbers, default=len(special)) < len(special):
            raise ValueError(
                "the dictionary gives one token id, or one gene, to several genes, or a special id to one"
            )
        lacking = sorted(gene for gene in self.genes if not _is_positive(self.medians.get(gene)))
        if lacking:
            raise ValueError(f"{len(lacking)} genes have no positive median, among them {', '.join(lacking[:3])}")

    def encode(self, cells: anndata.AnnData, obs_columns: Sequence[str] = (), layer: str | None = None) -> pa.Table:
        """Cells in memory -> table with input_ids (list of int32), length (int32) and the chosen columns of obs.

        obs_columns: names of columns; "obs_names" stands for the cells' own names. layer: where the raw counts are, if
        not in X. ValueError for what cannot be counts; cells that have none of the dictionary's genes are left out.
        Warnings count these cells, Ensembl ids that occur several times, and those unknown for a version suffix.
        """
        counts = cells.X if layer is None else _layer(cells.layers, layer)
        if counts is None:
            raise ValueError("the cells have no X: choose a layer")
        source = _Source(counts, cells.obs, cells.var)
        report = Encoded()
        tables = list(self._tables(source, obs_columns, report, CHUNK))
        _warn(report)
        return pa.concat_tables(tables)

    def encode_file(
        self,
        h5ad: Path | str,
        parquet: Path | str,
        obs_columns: Sequence[str] = (),
        layer: str | None = None,
        chunk_cells: int = CHUNK,
    ) -> Encoded:
        """An .h5ad file -> a parquet file as `datasets.load_dataset("parquet", ...)` reads it; see `encode`.

        Only `chunk_cells` cells are in memory at a time, if the counts are stored dense or by cells (CSR). The parquet
        file appears whole or not at all.
        """
        h5ad, parquet = Path(h5ad), Path(parquet)
        if not 1 <= chunk_cells <= MOST_CELLS:
            raise ValueError(f"chunk_cells={chunk_cells} must be between 1 and {MOST_CELLS:,}")
        if parquet.exists():
            raise FileExistsError(f"{parquet} exists already; remove it or choose another name")
        if not h5ad.is_file():
            raise FileNotFoundError(f"{h5ad} does not exist")
        parquet.absolute().parent.mkdir(parents=True, exist_ok=True)
        report = Encoded()
        with tempfile.TemporaryDirectory(prefix=f".{parquet.name}.partial-", dir=parquet.absolute().parent) as scratch:
            partial = Path(scratch) / parquet.name
            with h5py.File(h5ad) as file, ExitStack() as stack:
                writer: pq.ParquetWriter | None = None
                for table in self._tables(_open(file, layer), obs_columns, report, chunk_cells):
                    writer = writer or stack.enter_context(pq.ParquetWriter(partial, table.schema))
                    if table.num_rows:  # datasets cannot read a file whose first row group is empty
                        writer.write_table(table)
            os.replace(partial, parquet)
        _warn(report)
        return report

    def _tables(
        self, source: _Source, obs_columns: Sequence[str], report: Encoded, chunk_cells: int
    ) -> Iterator[pa.Table]:
        expected = (len(source.obs), len(source.var))
        if source.counts.shape != expected:
            raise ValueError(f"the counts are {source.counts.shape}, but obs and var have {expected} cells and genes")
        names = [obs_columns] if isinstance(obs_columns, str) else obs_columns
        columns = {name: _obs_column(source.obs, name) for name in names}
        passing = _passing(source.obs)
        selector, token_ids, medians = self._known_genes(source.var)
        report.genes, report.known_genes = selector.shape
        starts = range(0, max(len(source.obs), 1), chunk_cells)  # one empty table if there is no cell
        quiet = not sys.stderr.isatty()
        for start in track(starts, "encoding cells", console=Console(stderr=True), disable=quiet, transient=True):
            rows = slice(start, min(start + chunk_cells, len(source.obs)))
            ranked = self._ranked(_checked_counts(source, rows) @ selector, token_ids, medians)
            kept = [index for index, tokens in enumerate(ranked) if passing[start + index] and len(tokens)]
            report.cells += len(ranked)
            report.written += len(kept)
            report.filtered += int((~passing[rows]).sum())
            report.without_genes += int(passing[rows].sum()) - len(kept)
            cells = [self._with_specials(ranked[index]) for index in kept]
            lengths = np.array([len(cell) for cell in cells], dtype=np.int32)
            ends = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
            flat = np.concatenate([np.empty(0, np.int32), *cells])
            made = {"input_ids": pa.ListArray.from_arrays(ends, flat), "length": pa.array(lengths)}
            places = pa.array([start + index for index in kept], pa.int64())
            yield pa.table({**made, **{name: column.take(places) for name, column in columns.items()}})

    def _known_genes(self, var: pd.DataFrame) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
        """A 0/1 matrix [G, K] that picks and sums the known genes, by rising token id; their ids and medians [K]."""
        names = _ensembl_ids(var, self.genes)
        known = [(self.genes[name], column) for column, name in enumerate(names) if name in self.genes]
        if not known:
            raise ValueError(
                f"no gene of the file is in the token dictionary: its ids are like {', '.join(names[:3])}, the "
                f"dictionary's like {', '.join(list(self.genes)[:3])}; var['ensembl_id'] is read, or var's names"
            )
        tokens, places = (np.array(part) for part in zip(*known, strict=True))
        token_ids, columns = np.unique(tokens.astype(np.int32), return_inverse=True)
        if len(token_ids) < len(known):
            warnings.warn(
                f"{len(known) - len(token_ids)} genes repeat the Ensembl id of another: their counts are summed",
                stacklevel=4,
            )
        ones = np.ones(len(places))
        selector = sparse.csr_matrix((ones, (places, columns)), shape=(len(names), len(token_ids)))
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
        first, last = (np.array([self.token_ids[name]], dtype=np.int32) for name in ("<cls>", "<eos>"))
        return np.concatenate((first, tokens, last))


def _read(dictionary: Mapping[str, Any] | Path | str) -> Mapping[str, Any]:
    if isinstance(dictionary, Mapping):
        return dictionary
    path = Path(dictionary)
    content = path.read_bytes()
    if path.suffix in (".pkl", ".pickle") or content.startswith(PICKLE):
        code = (
            f"import json, pickle; text = json.dumps(pickle.load(open('{path}', 'rb')), default=lambda x: x.item()); "
            f"open('{path.stem}.read.json', 'w').write(text)"
        )
        raise ValueError(
            f'{path} is a pickle, which can run any code, and is not read. If you trust it: python -c "{code}"'
        )
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object of values by gene")
    return found


def _is_token_id(number: Any) -> bool:
    return isinstance(number, Integral) and 0 <= int(number) < 2**31


def _is_positive(median: Any) -> bool:
    return isinstance(median, Real) and 0 < float(median) < math.inf


def _open(file: h5py.File, layer: str | None) -> _Source:
    if not {"obs", "var"} <= set(file):
        raise ValueError(f"{file.filename} is no .h5ad file; scanpy reads other kinds, as scanpy.read_10x_h5")
    if any(isinstance(file[name], h5py.Dataset) for name in ("obs", "var")):
        raise ValueError("anndata before 0.7 wrote the file; write it anew: anndata.read_h5ad(...).write_h5ad(...)")
    if layer is None and "X" not in file:
        raise ValueError("the file has no X: choose a layer")
    element = file["X"] if layer is None else _layer(file.get("layers", {}), layer)
    counts: Any = element
    if isinstance(element, h5py.Group):
        counts = sparse_dataset(element)
        if counts.format == "csc":
            warnings.warn("the counts are stored by genes (CSC): all are read into memory at once", stacklevel=3)
            counts = _sound(counts.to_memory()).tocsr()
    return _Source(counts, read_elem(file["obs"]), read_elem(file["var"]))


def _ensembl_ids(var: pd.DataFrame, genes: Mapping[str, int]) -> pd.Series:
    """Each gene's id in capitals; a warning counts those that are unknown for their version suffix alone."""
    ids, place = var.index.to_series(), "var_names"
    if "ensembl_id" in var:
        ids, place = var["ensembl_id"], "var['ensembl_id']"
    names = ids.astype(str).str.upper()
    versioned = names[~names.isin(genes) & names.str.split(".").str[0].isin(genes)]
    if len(versioned):
        warnings.warn(
            f"{len(versioned)} genes are left out that the dictionary knows without their version suffix, as "
            f"{versioned.iloc[0]}: adata.var['ensembl_id'] = adata.{place}.str.split('.').str[0] strips it",
            stacklevel=5,
        )
    return names


def _layer(layers: Mapping[str, Any], name: str) -> Any:
    if name not in layers:
        raise ValueError(f"there is no layer {name!r}; there is {', '.join(layers) or 'none'}")
    return layers[name]


def _checked_counts(source: _Source, rows: slice) -> sparse.csr_matrix:
    """Raw counts [B, G] of some cells; ValueError that names a cell for what cannot be counts."""
    counts = _sound(sparse.csr_matrix(source.counts[rows], dtype=np.float64))
    names = source.obs.index[rows]
    for problem, bad in (
        ("NaN or infinite counts", ~np.isfinite(counts.data)),
        ("negative counts", counts.data < 0),
        (
            "counts that are no whole numbers: pass raw counts, perhaps layer='counts', or adata.raw.to_adata()",
            counts.data != np.floor(counts.data),
        ),
    ):
        if bad.any():
            cell = int(np.searchsorted(counts.indptr, np.flatnonzero(bad)[0], side="right")) - 1
            raise ValueError(f"cell {names[cell]!r} has {problem}")
    return counts


def _sound(counts: Any) -> Any:
    """A sparse matrix, its indices checked: wrong ones would read memory that is not the matrix's."""
    try:
        counts.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"the sparse counts are damaged: {error}") from error
    return counts


def _passing(obs: pd.DataFrame) -> np.ndarray:
    """bool [cells]: obs["filter_pass"] == 1, where there is such a column; ValueError if it is not all 0 and 1."""
    if "filter_pass" not in obs:
        return np.ones(len(obs), dtype=bool)
    passing = pd.to_numeric(obs["filter_pass"].astype(object), errors="coerce")
    if not passing.isin((0, 1)).all():
        raise ValueError("obs['filter_pass'] holds something other than 0 and 1")
    return passing.to_numpy() == 1


def _obs_column(obs: pd.DataFrame, name: str) -> pa.ChunkedArray:
    """A column of obs, categories as what they stand for; "obs_names" are the cells' names."""
    if name in ("input_ids", "length"):
        raise ValueError(f"the output has a column {name} of its own: rename that of obs")
    if name not in obs and name != "obs_names":
        raise ValueError(f"obs has no column {name}; it has {', '.join(obs.columns)}")
    values = obs.index.to_series() if name == "obs_names" else obs[name]
    if isinstance(values, pd.DataFrame):
        raise ValueError(f"obs has several columns {name}: rename them")
    try:
        column = pa.table({name: pa.array(values, from_pandas=True)})[name]
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"the column {name} of obs cannot be written to parquet: {error}") from error


def _warn(report: Encoded) -> None:
    if report.filtered and report.filtered == report.cells:
        warnings.warn("no cell passes obs['filter_pass']", stacklevel=3)
    if report.without_genes:
        warnings.warn(
            f"{report.without_genes} of {report.cells} cells have no gene of the dictionary and were left out",
            stacklevel=3,
        )
