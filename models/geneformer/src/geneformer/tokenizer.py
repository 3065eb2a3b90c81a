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
from contextlib import ExitStack, contextmanager
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
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem
from rich.console import Console
from rich.progress import track
from scipy import sparse

from .special_tokens import special_tokens

MOST_GENES = {"V1": 2048, "V2": 4094}
CHUNK = 1024  # cells in memory at a time
PICKLE = b"\x80"  # what pickles begin with, since their second protocol
MOST_CELLS = 500_000  # in a chunk: arrow counts a chunk's tokens in 32 bits
BLOCK = 2**18  # counts checked at a time: they stay in the processor's cache
EXACT = 2**53  # float64 holds every whole number up to here
FEW_GENES = 0.1  # of a file's genes in the dictionary: less is no transcriptome of the dictionary's kind
SUFFIX = r"\..*$|-\d+$"  # what stands behind an Ensembl id: a version, or the number that makes a name unique


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
class _Sparse:
    """Counts [B, G] stored by cells (csr) or genes (csc), in arrays or in datasets of a file.

    N counts, M cells or genes that they are stored by: data [N]; indices [N], the genes or cells; indptr [M + 1].
    """

    format: str
    shape: tuple[Any, ...]
    indptr: Any
    indices: Any
    data: Any


@dataclass
class _Source:
    """Counts [B, G], dense or sparse, with their annotation."""

    path: Path | None  # of the file that they are in
    place: str  # X or a layer
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
        self.first, self.last = (np.array([special.get(name, 0)], np.int32) for name in ("<cls>", "<eos>"))  # of V2
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
        Warnings count these cells, Ensembl ids that occur several times, and genes that are left out by mistake.
        """
        path = Path(cells.filename) if cells.isbacked else None
        with _naming(path):
            counts = cells.X if layer is None else _layer(cells.layers, layer)
            if counts is None:
                raise ValueError("the cells have no X: choose a layer")
            place = "X" if layer is None else f"layers[{layer!r}]"
            source = _Source(path, place, _parts(counts, place), cells.obs, cells.var)
        report = Encoded()
        tables = list(self._tables(source, obs_columns, report, CHUNK))
        _warn_of_cells(report, path)
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

        Only `chunk_cells` cells are in memory at a time, if the counts are stored dense or by cells (CSR). The file is
        read twice: all of it is checked before anything is written. The parquet file appears whole or not at all.
        """
        h5ad, parquet = Path(h5ad), Path(parquet)
        if not 1 <= chunk_cells <= MOST_CELLS:
            raise ValueError(f"chunk_cells={chunk_cells} must be between 1 and {MOST_CELLS:,}")
        if parquet.exists():
            raise FileExistsError(f"{parquet} exists already; remove it or choose another name")
        _must_be_hdf5(h5ad)
        report = Encoded()
        with ExitStack() as stack:
            with _naming(h5ad):
                source = _open(stack.enter_context(h5py.File(h5ad)), h5ad, layer)
            tables = self._tables(source, obs_columns, report, chunk_cells)
            _write(tables, parquet)
        _warn_of_cells(report, h5ad)
        return report

    def _tables(
        self, source: _Source, obs_columns: Sequence[str], report: Encoded, chunk_cells: int
    ) -> Iterator[pa.Table]:
        """Check all of the source at once; then a table for each chunk of cells, as it is asked for."""
        with _naming(source.path):
            _check_shape(source)
            names = [obs_columns] if isinstance(obs_columns, str) else obs_columns
            columns = {name: _obs_column(source.obs, name) for name in names}
            passing = _passing(source.obs)
            genes = self._known_genes(source)
            _check_counts(source)
            source.counts = _by_cells(source)
        report.genes, report.known_genes = genes[0].shape
        return self._encoded(source, columns, passing, genes, report, chunk_cells)

    def _encoded(
        self,
        source: _Source,
        columns: dict[str, pa.ChunkedArray],
        passing: np.ndarray,
        genes: tuple[sparse.csr_matrix, np.ndarray, np.ndarray],
        report: Encoded,
        chunk_cells: int,
    ) -> Iterator[pa.Table]:
        selector, token_ids, medians = genes
        starts = range(0, max(len(source.obs), 1), chunk_cells)  # one empty table if there is no cell
        quiet = not sys.stderr.isatty()
        for start in track(starts, "encoding cells", console=Console(stderr=True), disable=quiet, transient=True):
            rows = slice(start, min(start + chunk_cells, len(source.obs)))
            with _naming(source.path):
                counts = _read_cells(source, rows)
            ranked = self._ranked(counts @ selector, token_ids, medians)
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

    def _known_genes(self, source: _Source) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
        """A 0/1 matrix [G, K] that picks and sums the known genes, by rising token id; their ids and medians [K]."""
        names = _ensembl_ids(source, self.genes)
        known = [(self.genes[name], column) for column, name in enumerate(names) if name in self.genes]
        tokens, places = (np.array(part) for part in zip(*known, strict=True))
        token_ids, columns = np.unique(tokens.astype(np.int32), return_inverse=True)
        if len(token_ids) < len(known):
            repeated = len(known) - len(token_ids)
            _warn(f"{repeated} genes repeat the Ensembl id of another: their counts are summed", source.path, 5)
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
        return np.concatenate((self.first, tokens, self.last))


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


@contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Errors over what a file holds begin with its name, which HDF5 and AnnData do not say."""
    try:
        yield
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {error}") from error.__cause__
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises
        if path is None:
            raise
        raise OSError(f"{path} cannot be read, it may be damaged: copy or write it anew ({error})") from error


def _warn(message: str, path: Path | None, stacklevel: int) -> None:
    warnings.warn(f"{path}: {message}" if path else message, stacklevel=stacklevel)


def _must_be_hdf5(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if ".zarr" in path.suffixes or any((path / name).exists() for name in (".zgroup", "zarr.json")):
        raise ValueError(f"{path} is zarr, which is not read: write .h5ad by anndata.read_zarr(...).write_h5ad(...)")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no .h5ad file, which is HDF5: write one by AnnData.write_h5ad(...)")


def _open(file: h5py.File, path: Path, layer: str | None) -> _Source:
    if not {"obs", "var"} <= set(file):
        raise ValueError("no .h5ad file, it lacks obs or var; scanpy reads other kinds, as scanpy.read_10x_h5")
    if any(isinstance(file[name], h5py.Dataset) for name in ("obs", "var")):
        raise ValueError("anndata before 0.7 wrote the file; write it anew: anndata.read_h5ad(...).write_h5ad(...)")
    if layer is None and "X" not in file:
        raise ValueError("the file has no X: choose a layer")
    place = "X" if layer is None else f"layers/{layer}"
    element = file["X"] if layer is None else _layer(file.get("layers", {}), layer)
    return _Source(path, place, _parts(element, place), _annotation(file, "obs"), _annotation(file, "var"))


def _annotation(file: h5py.File, name: str) -> pd.DataFrame:
    try:
        table = read_elem(file[name])
    except Exception as error:  # AnnData raises many kinds over a damaged table
        raise ValueError(f"{name} cannot be read: {error}; write the file anew") from error
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"{name} is no table: write the file anew")
    return table


def _parts(counts: Any, place: str) -> Any:
    """Sparse counts as their parts, of which none is read yet; dense ones as they are."""
    if sparse.issparse(counts):
        rows = counts if counts.format in ("csr", "csc") else counts.tocsr()
        return _Sparse(rows.format, rows.shape, rows.indptr, rows.indices, rows.data)
    group = counts.group if isinstance(counts, CSRDataset | CSCDataset) else counts
    if not isinstance(counts, CSRDataset | CSCDataset | h5py.Group):
        if getattr(counts, "shape", None) is None:
            raise ValueError(f"{place} is no table of numbers: choose a layer or write the file anew")
        return counts
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", b""))
    layout = (kind.decode() if isinstance(kind, bytes) else str(kind)).removesuffix("_matrix")
    lacking = [name for name in ("indptr", "indices", "data") if name not in group]
    if layout not in ("csr", "csc") or lacking:
        raise ValueError(
            f"{place} is neither a table of numbers nor csr_matrix or csc_matrix with indptr, indices and data: its "
            f"encoding-type is {layout!r}, it lacks {', '.join(lacking) or 'nothing'}; write the file anew"
        )
    shape = np.ravel(group.attrs.get("shape", group.attrs.get("h5sparse_shape", ())))
    return _Sparse(layout, tuple(shape.tolist()), *(group[name] for name in ("indptr", "indices", "data")))


def _ensembl_ids(source: _Source, genes: Mapping[str, int]) -> pd.Series:
    """Each gene's id in capitals; ValueError if none is known, one warning if some seem to be lost by mistake."""
    ids, place = source.var.index.to_series(), "var_names"
    if "ensembl_id" in source.var:
        ids, place = source.var["ensembl_id"], "var['ensembl_id']"
    if isinstance(ids, pd.DataFrame):
        raise ValueError("var has several columns ensembl_id: rename them")
    names = ids.astype(str).str.upper()
    known = names.isin(genes)
    unknown = names[~known]
    suffixed = unknown[unknown.str.replace(SUFFIX, "", regex=True).isin(genes)]
    message = f"{known.sum()} of {len(names)} genes are in the token dictionary"
    if len(suffixed):
        message += (
            f"; {len(suffixed)} more would be without the suffix of their ids, as in {_some(suffixed)}: "
            f'adata.var["ensembl_id"] = adata.{place}.str.replace(r"{SUFFIX}", "", regex=True) strips it'
        )
    elif known.sum() < FEW_GENES * len(names) or not known.any():
        message += (
            f": the ids in {place} are like {_some(unknown)}, the dictionary's like {_some(list(genes))}; Ensembl ids "
            "are read from var['ensembl_id'], else from var_names"
        )
    else:
        return names
    if not known.any():
        raise ValueError(message)
    _warn(message, source.path, 6)
    return names


def _some(names: Sequence[str] | pd.Series) -> str:
    return ", ".join(names[:3]) or "none"


def _layer(layers: Mapping[str, Any], name: str) -> Any:
    if name not in layers:
        raise ValueError(f"there is no layer {name!r}; there is {', '.join(layers) or 'none'}")
    return layers[name]


def _check_shape(source: _Source) -> None:
    shape, expected = tuple(source.counts.shape), (len(source.obs), len(source.var))
    if shape != expected:
        raise ValueError(
            f"the counts in {source.place} are {shape}, but obs and var have {expected} cells and genes: they are not "
            "of one file, or damaged"
        )


def _check_counts(source: _Source) -> None:
    """Read all counts once, by blocks; ValueError over damage, or that names a cell for what is no count."""
    counts = source.counts
    if isinstance(counts, _Sparse):
        _check_sparse(source)
        return
    _check_kind(counts, source.place, "biuf")
    height = max(1, BLOCK // max(1, len(source.var)))
    for start in range(0, len(source.obs), height):
        wrong = _first_wrong(np.asarray(counts[start : start + height]).reshape(-1))
        if wrong:
            raise _no_count(source, start + wrong[0] // len(source.var), wrong[1])


def _check_sparse(source: _Source) -> None:
    """Check the parts against each other: wrong ones would read memory that is not theirs, or lose counts."""
    counts = source.counts
    counts.indptr = indptr = _checked_indptr(source)
    if counts.format == "csc" and not isinstance(counts.data, np.ndarray):
        _warn("the counts are stored by genes (CSC): all are read into memory at once", source.path, 6)
        counts.indices, counts.data = counts.indices[:], counts.data[:]
    for first, last in _blocks(indptr):
        start, end = indptr[first], indptr[last]
        indices = counts.indices[start:end]
        _check_indices(source, indices, first, last)
        wrong = _first_wrong(counts.data[start:end])
        if wrong:
            by_cells = counts.format == "csr"
            raise _no_count(source, _owner(indptr, start + wrong[0]) if by_cells else int(indices[wrong[0]]), wrong[1])


def _checked_indptr(source: _Source) -> np.ndarray:
    """indptr in memory, checked by itself and against the lengths of the rest."""
    counts, place = source.counts, source.place
    for name, kinds in (("indptr", "iu"), ("indices", "iu"), ("data", "biuf")):
        values = getattr(counts, name)
        if getattr(values, "ndim", None) != 1:
            raise _damaged(f"{place}/{name} is no list of numbers")
        _check_kind(values, f"{place}/{name}", kinds)
    (kind, names), (other, others) = _axes(source)
    size, total = len(counts.indptr), len(counts.data)
    if len(counts.indices) != total:
        raise _damaged(f"{place}/indices has {len(counts.indices)} numbers, {place}/data {total}")
    if size != len(names) + 1:
        raise _damaged(f"{place}/indptr has {size} numbers, but {len(names)} {kind}s need {len(names) + 1}")
    indptr = counts.indptr[:].astype(np.int64)
    if indptr[0] != 0 or indptr[-1] != total:
        raise _damaged(f"{place}/indptr goes from {indptr[0]} to {indptr[-1]}, but the counts from 0 to {total}")
    falling = (indptr[1:] < indptr[:-1]) | (indptr[1:] > indptr[:-1] + len(others))
    if falling.any():
        at = int(np.argmax(falling))
        raise _damaged(
            f"{place}/indptr goes from {indptr[at]} to {indptr[at + 1]} at {kind} {names[at]!r}, which can have 0 to "
            f"{len(others)} {other}s"
        )
    return indptr


def _check_indices(source: _Source, indices: np.ndarray, first: int, last: int) -> None:
    """The indices of the cells (csr) or genes (csc) from `first` up to `last`."""
    if not len(indices):
        return
    (kind, names), (other, others) = _axes(source)
    indptr = source.counts.indptr
    start = indptr[first]
    if indices.min() < 0 or indices.max() >= len(others):
        at = int(np.argmax((indices < 0) | (indices >= len(others))))
        raise _damaged(
            f"{source.place}/indices[{start + at}] is {indices[at]}, at {kind} {names[_owner(indptr, start + at)]!r}, "
            f"but there are {len(others)} {other}s"
        )
    rising = indices[1:] > indices[:-1]
    inner = indptr[first + 1 : last] - start
    rising[inner[(inner > 0) & (inner < len(indices))] - 1] = True  # the next cell or gene begins there
    if rising.all():
        return
    owners = np.repeat(np.arange(first, last), np.diff(indptr[first : last + 1]))
    places = np.sort(owners * len(others) + indices.astype(np.int64))  # in any order is fine, twice is not
    same = places[1:] == places[:-1]
    if same.any():
        at, index = divmod(int(places[np.argmax(same)]), len(others))
        raise _damaged(
            f"{kind} {names[at]!r} has several counts for {other} {others[index]!r} in {source.place} (if all are "
            "meant, X.sum_duplicates() adds them up)"
        )


def _first_wrong(values: np.ndarray) -> tuple[int, str] | None:
    """Where the first number stands that is no count, and why it is none."""
    whole = values.dtype.kind != "f" or bool((values == np.floor(values)).all())
    if not len(values) or (whole and float(values.min()) >= 0 and float(values.max()) < EXACT):  # never so for NaN
        return None
    numbers = values.astype(np.float64)
    for problem, bad in (
        ("NaN or infinite counts", ~np.isfinite(numbers)),
        ("negative counts", numbers < 0),
        ("counts of 2^53 or more, which float64 cannot tell apart", numbers >= EXACT),
        (
            "counts that are no whole numbers: pass raw counts, perhaps layer='counts', or adata.raw.to_adata()",
            values != np.floor(values),
        ),
    ):
        if bad.any():
            return int(np.argmax(bad)), problem
    return None


def _no_count(source: _Source, cell: int, problem: str) -> ValueError:
    return ValueError(f"cell {source.obs.index[cell]!r} has {problem}")


def _damaged(what: str) -> ValueError:
    return ValueError(f"the sparse counts are damaged: {what}; fetch them again or make them anew")


def _check_kind(values: Any, name: str, kinds: str) -> None:
    if values.dtype.kind not in kinds:
        raise ValueError(f"{name} holds {values.dtype}, not {'whole numbers' if kinds == 'iu' else 'real numbers'}")


def _axes(source: _Source) -> tuple[tuple[str, pd.Index], tuple[str, pd.Index]]:
    """What the counts are stored by, with its names, and the other."""
    cells, genes = ("cell", source.obs.index), ("gene", source.var.index)
    return (cells, genes) if source.counts.format == "csr" else (genes, cells)


def _blocks(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """From which to which cell (csr) or gene (csc): at most BLOCK counts, or one cell or gene."""
    first = 0
    while first < len(indptr) - 1:
        last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + BLOCK, side="right")) - 1)
        yield first, last
        first = last


def _owner(indptr: np.ndarray, place: int) -> int:
    return int(np.searchsorted(indptr, place, side="right")) - 1


def _by_cells(source: _Source) -> Any:
    """Checked counts as `_read_cells` slices them."""
    counts = source.counts
    if not isinstance(counts, _Sparse) or counts.format == "csr":
        return counts
    rows = _sound(sparse.csc_matrix((counts.data, counts.indices, counts.indptr), shape=counts.shape)).tocsr()
    return _Sparse("csr", rows.shape, rows.indptr, rows.indices, rows.data)


def _read_cells(source: _Source, rows: slice) -> sparse.csr_matrix:
    """Checked counts [B, G] of some cells."""
    counts = source.counts
    if not isinstance(counts, _Sparse):
        return sparse.csr_matrix(np.asarray(counts[rows], dtype=np.float64))
    indptr = counts.indptr[rows.start : rows.stop + 1]
    start, end = indptr[0], indptr[-1]
    data, shape = counts.data[start:end].astype(np.float64), (len(indptr) - 1, counts.shape[1])
    return _sound(sparse.csr_matrix((data, counts.indices[start:end], indptr - start), shape=shape))


def _sound(counts: Any) -> Any:
    """What has been checked already, again: the file may have changed since, and wrong indices read foreign memory."""
    counts.check_format(full_check=True)
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


def _write(tables: Iterator[pa.Table], parquet: Path) -> None:
    """Write a file that appears whole or not at all."""
    parquet.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{parquet.name}.partial-", dir=parquet.absolute().parent) as scratch:
        partial = Path(scratch) / parquet.name
        with ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for table in tables:
                writer = writer or stack.enter_context(pq.ParquetWriter(partial, table.schema))
                if table.num_rows:  # datasets cannot read a file whose first row group is empty
                    writer.write_table(table)
        os.replace(partial, parquet)


def _warn_of_cells(report: Encoded, path: Path | None) -> None:
    if report.filtered and report.filtered == report.cells:
        _warn("no cell passes obs['filter_pass']", path, 4)
    if report.without_genes:
        left_out = f"{report.without_genes} of {report.cells} cells have no gene of the dictionary and were left out"
        _warn(left_out, path, 4)
