"""Counts of cells, of an AnnData or an .h5ad file: found, checked whole, and read some cells at a time.

Shapes: B cells, G genes of the file.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem
from scipy import sparse

BLOCK = 2**18  # counts checked at a time: they stay in the processor's cache
EXACT = 2**53  # float64 holds every whole number up to here
RAW = "raw/X"  # what `layer` calls the counts that AnnData keeps in raw, with genes of their own
Tables = dict[str | None, Callable[[], Any]]  # by `layer`, fetched when asked for: a view's would be copied


@dataclass
class Sparse:
    """Counts [B, G] stored by cells (csr) or genes (csc), in arrays or in datasets of a file.

    N counts, M cells or genes that they are stored by: data [N]; indices [N], the genes or cells; indptr [M + 1].
    """

    format: str
    shape: tuple[Any, ...]
    indptr: Any
    indices: Any
    data: Any


@dataclass
class Source:
    """Counts [B, G], dense or sparse, with their annotation."""

    path: Path | None  # of the file that they are in
    place: str  # X, a layer, or raw/X
    counts: Any
    obs: pd.DataFrame
    var: pd.DataFrame  # of raw, for raw/X
    others: Tables  # which `layer` could have named, but did not


@contextmanager
def naming(path: Path | None) -> Iterator[None]:
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


def warn(message: str, path: Path | None, stacklevel: int) -> None:
    """A UserWarning that begins with the file's name; stacklevel as of `warnings.warn` in the place of this call."""
    warnings.warn(f"{path}: {message}" if path else message, stacklevel=stacklevel)


def must_be_hdf5(path: Path) -> None:
    """FileNotFoundError, or ValueError that says what to make of another kind of file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if ".zarr" in path.suffixes or any((path / name).exists() for name in (".zgroup", "zarr.json")):
        raise ValueError(f"{path} is zarr, which is not read: write .h5ad by anndata.read_zarr(...).write_h5ad(...)")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no .h5ad file, which is HDF5: write one by AnnData.write_h5ad(...)")


def in_memory(cells: anndata.AnnData, layer: str | None) -> Source:
    """The counts that `layer` names: None is X, "raw/X" is that, else a layer. ValueError if it is not there."""
    tables: Tables = {None: lambda: cells.X}
    tables |= {name: partial(cells.layers.__getitem__, name) for name in cells.layers if name != RAW}
    if cells.raw is not None:
        tables[RAW] = lambda: cells.raw.X
    counts = _taken(tables, layer, "the cells have")
    place = f"layers[{layer!r}]" if layer not in (None, RAW) else layer or "X"
    var = cells.raw.var if layer == RAW else cells.var
    path = Path(cells.filename) if cells.isbacked else None
    return Source(path, place, _parts(counts, place), cells.obs, var, tables)


def in_file(file: h5py.File, path: Path, layer: str | None) -> Source:
    """As `in_memory`, of an open .h5ad file; its counts are not read yet."""
    if not {"obs", "var"} <= set(file):
        raise ValueError("no .h5ad file, it lacks obs or var; scanpy reads other kinds, as scanpy.read_10x_h5")
    if any(isinstance(file[name], h5py.Dataset) for name in ("obs", "var")):
        raise ValueError("anndata before 0.7 wrote the file; write it anew: anndata.read_h5ad(...).write_h5ad(...)")
    layers = file.get("layers", {})
    tables: Tables = {name: partial(layers.__getitem__, name) for name in layers if name != RAW}
    tables |= {layer: partial(file.__getitem__, name) for layer, name in ((None, "X"), (RAW, RAW)) if name in file}
    counts = _taken(tables, layer, "the file has")
    place = f"layers/{layer}" if layer not in (None, RAW) else layer or "X"
    if layer == RAW and "raw/var" not in file:
        raise ValueError("raw has counts but no var: write the file anew")
    var = _annotation(file, "raw/var" if layer == RAW else "var")
    return Source(path, place, _parts(counts, place), _annotation(file, "obs"), var, tables)


def _taken(tables: Tables, layer: str | None, who_has: str) -> Any:
    counts = tables.pop(layer)() if layer in tables else None
    if counts is not None:
        return counts
    names = ", ".join(name for name in tables if name is not None)
    if layer is None:
        raise ValueError(f"{who_has} no X: choose a layer{f' of {names}' if names else ''}")
    raise ValueError(f"there is no {layer if layer == RAW else f'layer {layer!r}'}; there is {names or 'none'}")


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
        return Sparse(rows.format, rows.shape, rows.indptr, rows.indices, rows.data)
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
    return Sparse(layout, tuple(shape.tolist()), *(group[name] for name in ("indptr", "indices", "data")))


def check_shape(source: Source) -> None:
    """ValueError where counts and annotation are not of one size."""
    shape, expected = tuple(source.counts.shape), (len(source.obs), len(source.var))
    if shape != expected:
        raise ValueError(
            f"the counts in {source.place} are {shape}, but obs and var have {expected} cells and genes: they are not "
            "of one file, or damaged"
        )


def check_counts(source: Source) -> None:
    """Read all counts once, by blocks; ValueError over damage, or that names a cell for what is no count."""
    counts = source.counts
    if isinstance(counts, Sparse):
        _check_sparse(source)
        return
    _check_kind(counts, source.place, "biuf")
    height = max(1, BLOCK // max(1, len(source.var)))
    for start in range(0, len(source.obs), height):
        wrong = _first_wrong(np.asarray(counts[start : start + height]).reshape(-1))
        if wrong:
            raise _no_count(source, start + wrong[0] // len(source.var), wrong[1])


def _check_sparse(source: Source) -> None:
    """Check the parts against each other: wrong ones would read memory that is not theirs, or lose counts."""
    counts = source.counts
    counts.indptr = indptr = _checked_indptr(source)
    if counts.format == "csc" and not isinstance(counts.data, np.ndarray):
        warn("the counts are stored by genes (CSC): all are read into memory at once", source.path, 6)
        counts.indices, counts.data = counts.indices[:], counts.data[:]
    for first, last in _blocks(indptr):
        start, end = indptr[first], indptr[last]
        indices = counts.indices[start:end]
        _check_indices(source, indices, first, last)
        wrong = _first_wrong(counts.data[start:end])
        if wrong:
            by_cells = counts.format == "csr"
            raise _no_count(source, _owner(indptr, start + wrong[0]) if by_cells else int(indices[wrong[0]]), wrong[1])


def _checked_indptr(source: Source) -> np.ndarray:
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


def _check_indices(source: Source, indices: np.ndarray, first: int, last: int) -> None:
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
            "counts that are no whole numbers: pass raw counts",
            values != np.floor(values),
        ),
    ):
        if bad.any():
            return int(np.argmax(bad)), problem
    return None


def _no_count(source: Source, cell: int, problem: str) -> ValueError:
    """Says also which other tables hold whole numbers, as far as their beginnings tell."""
    whole = [f"layer={layer!r}" for layer, table in source.others.items() if _seems_counts(table)]
    hint = f"; whole numbers are in {' and in '.join(whole)}" if whole else ""
    return ValueError(f"cell {source.obs.index[cell]!r} has {problem}{hint}")


def _seems_counts(table: Callable[[], Any]) -> bool:
    with suppress(Exception):  # whatever is wrong with a table that nobody asked for
        counts = _parts(table(), "")
        values = counts.data if isinstance(counts, Sparse) else counts
        rows = BLOCK if isinstance(counts, Sparse) else max(1, BLOCK // counts.shape[1])
        first = np.asarray(values[:rows]).reshape(-1)
        return first.dtype.kind in "biuf" and len(first) > 0 and _first_wrong(first) is None
    return False


def _damaged(what: str) -> ValueError:
    return ValueError(f"the sparse counts are damaged: {what}; fetch them again or make them anew")


def _check_kind(values: Any, name: str, kinds: str) -> None:
    if values.dtype.kind not in kinds:
        raise ValueError(f"{name} holds {values.dtype}, not {'whole numbers' if kinds == 'iu' else 'real numbers'}")


def _axes(source: Source) -> tuple[tuple[str, pd.Index], tuple[str, pd.Index]]:
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


def by_cells(source: Source) -> Any:
    """Checked counts as `read_counts` slices them."""
    counts = source.counts
    if not isinstance(counts, Sparse) or counts.format == "csr":
        return counts
    rows = _sound(sparse.csc_matrix((counts.data, counts.indices, counts.indptr), shape=counts.shape)).tocsr()
    return Sparse("csr", rows.shape, rows.indptr, rows.indices, rows.data)


def read_counts(source: Source, rows: slice) -> sparse.csr_matrix:
    """Checked counts [B, G] of some cells."""
    counts = source.counts
    if not isinstance(counts, Sparse):
        return sparse.csr_matrix(np.asarray(counts[rows], dtype=np.float64))
    indptr = counts.indptr[rows.start : rows.stop + 1]
    start, end = indptr[0], indptr[-1]
    data, shape = counts.data[start:end].astype(np.float64), (len(indptr) - 1, counts.shape[1])
    return _sound(sparse.csr_matrix((data, counts.indices[start:end], indptr - start), shape=shape))


def _sound(counts: Any) -> Any:
    """What has been checked already, again: the file may have changed since, and wrong indices read foreign memory."""
    counts.check_format(full_check=True)
    return counts


def passing(obs: pd.DataFrame) -> np.ndarray:
    """bool [cells]: obs["filter_pass"] == 1, where there is such a column; ValueError if it is not all 0 and 1."""
    if "filter_pass" not in obs:
        return np.ones(len(obs), dtype=bool)
    passing = pd.to_numeric(obs["filter_pass"].astype(object), errors="coerce")
    if not passing.isin((0, 1)).all():
        raise ValueError("obs['filter_pass'] holds something other than 0 and 1")
    return passing.to_numpy() == 1


def obs_column(obs: pd.DataFrame, name: str) -> pa.ChunkedArray:
    """A column of obs, categories as their values; "obs_names" are the cells' names, "obs_index" their places."""
    if name == "obs_index":
        return pa.chunked_array([pa.array(np.arange(len(obs)))])
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
