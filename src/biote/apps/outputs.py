"""The files that embeddings end up in: parquet, HDF5, NumPy's .npz, AnnData's .h5ad. docs/embed.md has the layouts.

Shapes: B rows, N hidden size, L residues of one row.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import new_file
from .items import Item
from .work import NOTE

MOST_ROWS = 10**6  # of files that are no table: each row costs as much as a small file, or memory
H5_ENDINGS = (".h5", ".hdf5")
KINDS = (".parquet", *H5_ENDINGS, ".npz", ".h5ad")


def kind_of(output: Path) -> str:
    """The ending that says what an output is: "/" for a folder of parquet files; ValueError for an unknown one."""
    ending = output.suffix.lower()
    if ending not in KINDS:
        raise ValueError(f"{output} should end in one of {', '.join(KINDS)}, or in / for a folder of parquet files")
    return ".h5" if ending in H5_ENDINGS else ending


def h5_name(name: str) -> str:
    """An id as HDF5 can have it: "/" would make groups."""
    return name.replace("/", "_")


def table(items: Sequence[Item], columns: dict[str, list[np.ndarray]], dtype: str, with_place: bool) -> pa.Table:
    """A chunk's results, as shards have them.

    id string, length int32, obs_index int64 (if with_place), and each column: lists of N numbers; per residue, lists
    of L such lists. ValueError for a number that the dtype cannot hold.
    """
    fields: dict[str, Any] = {
        "id": pa.array([item.id for item in items], pa.string()),
        "length": pa.array([len(item) for item in items], pa.int32()),
    }
    if with_place:
        fields["obs_index"] = pa.array([item.place for item in items], pa.int64())
    for name, arrays in columns.items():
        flat = np.concatenate(arrays) if arrays[0].ndim == 2 else np.stack(arrays)
        with np.errstate(over="ignore"):
            stored = flat.astype(dtype)
        if not np.isfinite(stored).all():
            ends = np.cumsum([len(array) if array.ndim == 2 else 1 for array in arrays])
            row = int(np.argmin(np.isfinite(stored).all(1)))
            odd = items[int(np.searchsorted(ends, row, side="right"))].id
            if not np.isfinite(flat).all():
                raise ValueError(f"the model gives for {odd}: NaN or infinite numbers")
            raise ValueError(f"{dtype} cannot hold what the model gives for {odd}: store float32")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), flat.shape[1])
        if arrays[0].ndim == 2:
            ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            vectors = pa.ListArray.from_arrays(pa.array(ends), vectors)
        fields[name] = vectors
    return pa.table(fields)


def assemble(shards: list[Path], output: Path, about: dict[str, Any], obs: Any) -> None:
    """Write the output from its shards, one in memory at a time; it appears whole or not at all.

    about: what the output's metadata say. obs: the annotation of an .h5ad's cells.
    """
    writers = {".parquet": _parquet, ".h5": _h5, ".npz": _npz, ".h5ad": _h5ad}
    with new_file(output) as partial:
        try:
            writers[kind_of(output)](shards, partial, about, obs)
        except OSError as error:  # of a library that does not say where there is no room
            raise OSError(f"{output} cannot be written: {error}") from error


def _tables(shards: list[Path]) -> Iterator[pa.Table]:
    for shard in shards:
        yield pq.read_table(shard, memory_map=False)


def _parquet(shards: list[Path], partial: Path, about: dict[str, Any], obs: Any) -> None:
    schema = pq.read_schema(shards[0]).with_metadata({NOTE: json.dumps(about)})
    with pq.ParquetWriter(partial, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for one in _tables(shards):
            writer.write_table(one.replace_schema_metadata(schema.metadata))


def _h5(shards: list[Path], partial: Path, about: dict[str, Any], obs: Any) -> None:
    names = value_columns(pq.read_schema(shards[0]))
    with _Disk(partial) as disk, h5py.File(disk, "w") as file:
        file.attrs["model_name"], file.attrs["biote"] = about["model"], json.dumps(about)
        for one in _tables(shards):
            ids = one["id"].to_pylist()
            for name in names:
                group = file if len(names) == 1 else file.require_group(name)
                for key, array in zip(ids, arrays_of(one[name]), strict=True):
                    dataset = group.create_dataset(h5_name(key), data=array)
                    if h5_name(key) != key:
                        dataset.attrs["original_id"] = key
                    if disk.error is not None:
                        return


class _Disk(io.FileIO):
    """A file for HDF5, whose library does not survive a write that fails: the first such is raised at the end.

    As h5py's file objects have it; what is written after that is lost.
    """

    def __init__(self, path: Path):
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        rest = memoryview(content)
        while self.error is None and len(rest):
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def __exit__(self, *raised: Any) -> None:
        self.close()
        if self.error is not None:
            raise self.error


def _npz(shards: list[Path], partial: Path, about: dict[str, Any], obs: Any) -> None:
    schema = pq.read_schema(shards[0])
    names = value_columns(schema)
    heads = [pq.read_table(shard, columns=["id", "length"]) for shard in shards]
    ids = np.array([key for head in heads for key in head["id"].to_pylist()])
    lengths = np.concatenate([head["length"].to_numpy() for head in heads]).astype(np.int32)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
        for name, array in (("ids", ids), ("lengths", lengths), ("about", np.array(json.dumps(about)))):
            _add_array(file, name, array.shape, array.dtype, iter([array]))
        for name in names:
            kind = schema.field(name).type
            vectors = kind if pa.types.is_fixed_size_list(kind) else kind.value_type
            rows = len(ids) if vectors is kind else int(lengths.sum())
            dtype = np.dtype(vectors.value_type.to_pandas_dtype())
            arrays = (np.concatenate(list(map(np.atleast_2d, arrays_of(one[name])))) for one in _tables(shards))
            _add_array(file, "embeddings" if len(names) == 1 else name, (rows, vectors.list_size), dtype, arrays)


def _add_array(file: zipfile.ZipFile, name: str, shape: tuple, dtype: np.dtype, pieces: Iterator[np.ndarray]) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy")  # without the time, which would differ from run to run
    with file.open(entry, "w", force_zip64=True) as sink:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(sink, header)
        for piece in pieces:
            sink.write(np.ascontiguousarray(piece).tobytes())


def _h5ad(shards: list[Path], partial: Path, about: dict[str, Any], obs: Any) -> None:
    import anndata

    found: dict[str, np.ndarray] = {}
    for one in _tables(shards):
        places = one["obs_index"].to_numpy()
        for name in value_columns(one.schema):
            arrays = np.stack(arrays_of(one[name]))
            whole = found.setdefault(name, np.full((len(obs), arrays.shape[1]), np.nan, arrays.dtype))
            whole[places] = arrays
    obsm = {"X_embedding" if name == "embedding" else f"X_{name}": array for name, array in found.items()}
    made = anndata.AnnData(obs=obs, obsm=obsm, uns={"biote": json.dumps(about)})
    with _Disk(partial) as disk, h5py.File(disk, "w") as file:
        anndata.io.write_elem(file, "/", made)


def value_columns(schema: pa.Schema) -> list[str]:
    """The columns of a result that hold embeddings."""
    return [name for name in schema.names if name not in ("id", "length", "obs_index")]


def arrays_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column's arrays, [N] or [L, N] each."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    vectors = whole if pa.types.is_fixed_size_list(whole.type) else whole.flatten()
    flat = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.type.list_size)
    if vectors is whole:
        return list(flat)
    return np.split(flat, np.cumsum(whole.value_lengths().to_numpy())[:-1])
