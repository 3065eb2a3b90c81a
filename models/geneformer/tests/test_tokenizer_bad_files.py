"""A damaged .h5ad file, or damaged counts in memory: one error, never a crash, other counts or half a file."""

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

anndata = pytest.importorskip(
    "anndata", reason="the tokenizer reads AnnData; pip install -e models/geneformer brings it"
)
from biote_geneformer import GeneformerTokenizer  # noqa: E402 (it imports anndata)

CELLS, KNOWN = 7, 5
GENES = [f"ENSG{number:011}" for number in range(KNOWN)]
IDS = {name: number for number, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *GENES])}
PARTS = ("indptr", "indices", "data")
STORED = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
pytestmark = pytest.mark.filterwarnings("ignore:.*the counts are stored by genes")


@pytest.fixture
def tokenizer():
    return GeneformerTokenizer(IDS, dict.fromkeys(GENES, 1.0))


def cells_of(counts, stored="csr"):
    counts = np.asarray(counts)
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(len(counts))])
    return anndata.AnnData(STORED[stored](counts), obs=obs, var=pd.DataFrame(index=GENES))


def ones(stored="csr", dtype=np.float32):
    """Every cell has one count in every gene: indptr rises by 5 (csr) or 7 (csc)."""
    return cells_of(np.ones((CELLS, KNOWN), dtype), stored)


def refused(tokenizer, path: Path, message: str, error: type[Exception] = ValueError, **options: object) -> None:
    """One error, which names the file, and nothing beside the file."""
    there = sorted(path.parent.iterdir())
    with pytest.raises(error, match=message) as found:
        tokenizer.encode_file(path, path.parent / "out.parquet", **options)
    assert str(found.value).startswith(str(path))
    own = error is ValueError and "cannot be read" not in str(found.value)
    assert not own or found.value.__cause__ is None  # no second message above it
    assert sorted(path.parent.iterdir()) == there


def put(part: str, place: object, value: object) -> Callable[[h5py.Group], None]:
    return lambda group: group[part].__setitem__(place, value)


def make(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.Group], None]:
    """A part written anew, so that its length or dtype can change."""

    def changed(group: h5py.Group) -> None:
        values = change(group[part][:])
        del group[part]
        group[part] = values

    return changed


DAMAGE = {
    "indptr ends at -1": (put("indptr", -1, -1), r"X/indptr goes from 0 to -1, but the counts from 0 to 35"),
    "indptr ends too early": (put("indptr", -1, 34), r"X/indptr goes from 0 to 34, but"),
    "indptr ends too late": (put("indptr", -1, 36), r"X/indptr goes from 0 to 36, but"),
    "indptr begins late": (put("indptr", 0, 1), r"X/indptr goes from 1 to 35, but"),
    "indptr begins at -1": (put("indptr", 0, -1), r"X/indptr goes from -1 to 35, but"),
    "indptr falls": (put("indptr", 2, 0), r"X/indptr goes from \d to 0 at (cell|gene) '(cell1|ENSG00000000001)'"),
    "indptr falls at a chunk's edge": (put("indptr", 3, 1), r"X/indptr goes from \d+ to 1 at"),
    "indptr is negative within": (put("indptr", 3, -(2**31)), r"X/indptr goes from \d+ to -2147483648 at"),
    "indptr is beyond within": (put("indptr", 3, 2**31 - 1), r"X/indptr goes from \d+ to 2147483647 at"),
    "indptr stops growing": (put("indptr", slice(3, None), 10), r"X/indptr goes from 0 to 10, but"),
    "indptr gives all to one": (put("indptr", slice(1, -1), 0), r"from 0 to 35 at .* can have 0 to \d (cell|gene)s"),
    "indptr moves a count": (put("indptr", 2, 9), r"(from 5 to 9|has several|from 9 to 15|from 7 to 9|from 9 to 21)"),
    "indptr is short": (make("indptr", lambda x: x[:-1]), r"X/indptr has \d numbers, but \d (cell|gene)s need \d"),
    "indptr is long": (make("indptr", lambda x: np.append(x, x[-1])), r"X/indptr has \d numbers, but"),
    "indptr is empty": (make("indptr", lambda x: x[:0]), r"X/indptr has 0 numbers, but"),
    "indptr is 2-D": (make("indptr", lambda x: x[None]), r"X/indptr is no list of numbers"),
    "indptr wraps": (make("indptr", lambda x: x.astype(np.uint64) + (x == 0) * np.uint64(2**63)), r"goes from -922"),
    "indptr is fractions": (make("indptr", lambda x: x + 0.5), r"X/indptr holds float64, not whole numbers"),
    "indptr is words": (make("indptr", lambda x: x.astype("S")), r"X/indptr holds \|S\d+, not whole numbers"),
    "an index is beyond": (put("indices", 17, 10**8), r"X/indices\[17\] is 100000000, at .*, but there are \d"),
    "an index is one too far": (put("indices", 34, 7), r"X/indices\[34\] is 7, at .*'(cell6|ENSG00000000004)'"),
    "an index is negative": (put("indices", 0, -5), r"X/indices\[0\] is -5, at (cell 'cell0'|gene 'ENSG00000000000')"),
    "an index is twice": (put("indices", 1, 0), r"has several counts for (gene 'ENSG00000000000'|cell 'cell0') in X"),
    "an index is twice, apart": (put("indices", 4, 0), r"has several counts for .*'(ENSG00000000000|cell0)'"),
    "indices are short": (make("indices", lambda x: x[:-1]), r"X/indices has 34 numbers, X/data 35"),
    "indices are fractions": (make("indices", lambda x: x + 0.5), r"X/indices holds float64, not whole numbers"),
    "data is short": (make("data", lambda x: x[:-1]), r"X/indices has 35 numbers, X/data 34"),
    "data is long": (make("data", lambda x: np.append(x, x)), r"X/indices has 35 numbers, X/data 70"),
    "data is 2-D": (make("data", lambda x: x[None]), r"X/data is no list of numbers"),
    "data is complex": (make("data", lambda x: x + 1j), r"X/data holds complex\d+, not real numbers"),
    "data is words": (make("data", lambda x: x.astype("S")), r"X/data holds \|S\d+, not real numbers"),
    "data is a group": (lambda x: (x.__delitem__("data"), x.create_group("data")), r"X/data is no list of numbers"),
    "data is missing": (lambda x: x.__delitem__("data"), r"X is neither .* it lacks data"),
    "no encoding": (lambda x: x.attrs.__delitem__("encoding-type"), r"X is neither .* encoding-type is ''"),
    "other encoding": (lambda x: x.attrs.__setitem__("encoding-type", "coo_matrix"), r"encoding-type is 'coo'"),
    "no shape": (lambda x: x.attrs.__delitem__("shape"), r"X are \(\), but obs and var have \(7, 5\)"),
    "a cell too many": (lambda x: x.attrs.__setitem__("shape", (8, 5)), r"X are \(8, 5\), but .* have \(7, 5\)"),
    "a gene too few": (lambda x: x.attrs.__setitem__("shape", (7, 4)), r"X are \(7, 4\), but .* have \(7, 5\)"),
    "a negative shape": (lambda x: x.attrs.__setitem__("shape", (7, -5)), r"X are \(7, -5\), but"),
    "a shape of three": (lambda x: x.attrs.__setitem__("shape", (7, 5, 1)), r"X are \(7, 5, 1\), but"),
    "genes by cells": (lambda x: x.attrs.__setitem__("shape", (5, 7)), r"X are \(5, 7\), but"),
}  # fmt: skip


@pytest.mark.parametrize("stored", ["csr", "csc"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_sparse_counts(tmp_path, tokenizer, name, stored):
    change, message = DAMAGE[name]
    path = tmp_path / "cells.h5ad"
    ones(stored).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        change(file["X"])
    refused(tokenizer, path, message, chunk_cells=3)


@pytest.mark.parametrize("stored", ["csr", "csc"])
@pytest.mark.parametrize("name", [x for x, (change, _) in DAMAGE.items() if change.__qualname__.startswith("put")])
def test_damaged_counts_in_memory(tokenizer, name, stored):
    change, message = DAMAGE[name]
    cells = ones(stored)
    change({part: getattr(cells.X, part) for part in PARTS})
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(cells)


def test_counts_in_a_file_that_anndata_has_open(tmp_path, tokenizer):
    path = tmp_path / "cells.h5ad"
    ones().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indptr"][-1] = -1
    backed = anndata.read_h5ad(path, backed="r")
    with pytest.raises(ValueError, match=r"cells\.h5ad: .*X/indptr goes from 0 to -1"):
        tokenizer.encode(backed)
    backed.file.close()


def test_a_damaged_layer_is_named(tmp_path, tokenizer):
    cells = ones()
    cells.layers["raw"] = cells.X.copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["layers/raw/indptr"][-1] = -1
    refused(tokenizer, tmp_path / "cells.h5ad", "layers/raw/indptr goes from 0 to -1", layer="raw")
    assert tokenizer.encode_file(tmp_path / "cells.h5ad", tmp_path / "out.parquet").written == CELLS


@pytest.mark.parametrize("block", [1, 8, 2**18])
@pytest.mark.parametrize("place", range(0, CELLS * KNOWN, 4))
def test_each_place_is_checked_whatever_the_block(tmp_path, tokenizer, monkeypatch, block, place):
    monkeypatch.setattr(sys.modules["biote_geneformer.counts"], "BLOCK", block)
    cell, gene = divmod(place, KNOWN)
    for part, value, message in (("indices", -1, rf"X/indices\[{place}\] is -1, at "), ("data", -1, "has negative")):
        cells = ones()
        getattr(cells.X, part)[place] = value
        with pytest.raises(ValueError, match=message) as found:
            tokenizer.encode(cells)
        assert f"cell 'cell{cell}'" in str(found.value)
    cells = ones("dense")
    cells.X[cell, gene] = -1
    with pytest.raises(ValueError, match=f"^cell 'cell{cell}' has negative counts"):
        tokenizer.encode(cells)
    cells = ones()
    cells.X.indices[place] = (gene + 2) % KNOWN
    with pytest.raises(ValueError, match=f"'cell{cell}' has several counts for gene '{GENES[(gene + 2) % KNOWN]}'"):
        tokenizer.encode(cells)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "f4", "NaN or infinite counts"), (np.inf, "f4", "NaN or infinite counts"),
        (-np.inf, "f8", "NaN or infinite counts"), (np.inf, "f2", "NaN or infinite counts"),
        (-1, "f4", "negative counts"), (-1, "i1", "negative counts"), (-(2**40), "i8", "negative counts"),
        (0.5, "f4", "counts that are no whole numbers: pass raw"), (2.0**60, "f8", r"counts of 2\^53 or more"),
        (2**63, "u8", r"counts of 2\^53 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_counts_is_refused(tmp_path, tokenizer, value, dtype, message, stored):
    path = tmp_path / "cells.h5ad"
    ones(stored, np.dtype("f4" if dtype == "f2" else dtype)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if stored == "dense":
            make("X", lambda x: x.astype(dtype))(file)
            file["X"][4, 2] = value
        else:
            make("data", lambda x: x.astype(dtype))(file["X"])
            file["X/data"][4 * KNOWN + 2 if stored == "csr" else 2 * CELLS + 4] = value
        file["X"].attrs.setdefault("encoding-type", "array")
    refused(tokenizer, path, f"cell 'cell4' has {message}", chunk_cells=3)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i8", "u8", "f2", ">f4", "f8", "g"])
def test_counts_of_every_dtype(tmp_path, tokenizer, dtype, stored):
    counts = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    path = tmp_path / "cells.h5ad"
    cells_of(counts.astype(np.float32), stored).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for part in ("X",) if stored == "dense" else ("X/data", "X/indices", "X/indptr"):
            kind = dtype if part in ("X", "X/data") else "u8" if dtype == "u8" else "i8"
            make(part, lambda x, kind=kind: x.astype(kind))(file)
    tokenizer.encode_file(path, tmp_path / "out.parquet", chunk_cells=2)
    found = pq.read_table(tmp_path / "out.parquet")["input_ids"].to_pylist()
    assert found == [tokens(row) for row in counts.tolist()]


@pytest.mark.parametrize("stored", ["csr", "csc"])
def test_indices_in_any_order(tmp_path, tokenizer, stored):
    generator = np.random.default_rng(5)
    counts = generator.poisson(2.0, (CELLS, KNOWN)).astype(np.float32)
    counts[:, 0] += 1
    cells = cells_of(counts, stored)
    for start, end in pairwise(cells.X.indptr):
        order = start + generator.permutation(end - start)
        cells.X.indices[start:end], cells.X.data[start:end] = cells.X.indices[order], cells.X.data[order]
    cells.X.has_sorted_indices = False
    expected = [tokens(row) for row in counts.tolist()]
    assert tokenizer.encode(cells)["input_ids"].to_pylist() == expected
    cells.write_h5ad(tmp_path / "cells.h5ad")
    tokenizer.encode_file(tmp_path / "cells.h5ad", tmp_path / "out.parquet", chunk_cells=3)
    assert pq.read_table(tmp_path / "out.parquet")["input_ids"].to_pylist() == expected


def plain_reading(
    stored: str, shape: list[int], indptr: list[int], indices: list[int], data: list[float]
) -> list | None:
    """Counts [cells][genes] by the format's definition, one number at a time; None where it is broken."""
    major, minor = (CELLS, KNOWN) if stored == "csr" else (KNOWN, CELLS)
    if shape != [CELLS, KNOWN] or len(indptr) != major + 1 or len(indices) != len(data):
        return None
    if indptr[0] != 0 or indptr[-1] != len(data) or any(a > b for a, b in pairwise(indptr)):
        return None
    rows: list[list[float | None]] = [[None] * KNOWN for _ in range(CELLS)]
    for owner in range(major):
        for place in range(indptr[owner], indptr[owner + 1]):
            other, count = indices[place], data[place]
            if not 0 <= other < minor or not math.isfinite(count) or count != int(count) or not 0 <= count < 2**53:
                return None
            cell, gene = (owner, other) if stored == "csr" else (other, owner)
            if rows[cell][gene] is not None:
                return None
            rows[cell][gene] = count
    return rows


def tokens(row: list[float | None]) -> list[int]:
    counts = {gene: count for gene, count in enumerate(row) if count}
    return [2, *(4 + gene for gene in sorted(counts, key=lambda gene: (-counts[gene], gene))), 3]


WHOLE = st.sampled_from([-(2**31), -7, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 30, 2**31 - 1])
COUNT = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.5, 0.0, 1.0, 9.0, 2.0**53, 1e30])
PLACE = st.integers(0, CELLS * KNOWN)


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, str, int, float | int]:
    """A part of the counts, what is done to it, and where: a number replaced, added, removed, or two swapped."""
    part = draw(st.sampled_from([*PARTS, "shape"]))
    kind = draw(st.sampled_from(["replace", "replace", "add", "remove", "swap"]))
    return part, kind, draw(PLACE), draw(COUNT if part == "data" else WHOLE)


def damaged(values: list, kind: str, place: int, value: float) -> list:
    place = place % max(1, len(values))
    if kind == "swap" and values:
        place = max(1, place) % len(values)
        values[place - 1], values[place] = values[place], values[place - 1]
        return values
    return values[:place] + [value] * (kind in ("replace", "add")) + values[place + (kind in ("replace", "remove")) :]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    counts = np.random.default_rng(3).poisson(1.0, (CELLS, KNOWN)).astype(np.float32)
    for stored in ("csr", "csc"):
        cells_of(counts, stored).write_h5ad(folder / f"{stored}.h5ad")
    return folder


@pytest.mark.filterwarnings("ignore:.*have no gene of the dictionary")
@settings(deadline=None, max_examples=250)
@given(
    stored=st.sampled_from(["csr", "csc"]), changes=st.lists(damage(), max_size=2), chunk=st.integers(1, CELLS),
    wide=st.booleans(),
)  # fmt: skip
def test_damage_is_refused_or_read_by_the_definition(template, stored, changes, chunk, wide):
    path, out = template / "cells.h5ad", template / "out.parquet"
    path.write_bytes((template / f"{stored}.h5ad").read_bytes())
    with h5py.File(path, "r+") as file:
        group = file["X"]
        parts = {"shape": group.attrs["shape"].tolist(), **{part: group[part][:].tolist() for part in PARTS}}
        for part, kind, place, value in changes:
            parts[part] = damaged(parts[part], kind, place, value)
        group.attrs["shape"] = parts["shape"]
        for part in PARTS:
            del group[part]
            group[part] = np.array(parts[part], "f8" if part == "data" else "i8" if wide else "i4")
    rows = plain_reading(stored, **parts)
    tokenizer = GeneformerTokenizer(IDS, dict.fromkeys(GENES, 1.0))
    if rows is None:
        refused(tokenizer, path, r"cells\.h5ad: (the (sparse )?counts|cell)", chunk_cells=chunk)
        return
    try:
        tokenizer.encode_file(path, out, ["obs_names"], chunk_cells=chunk)
        found = pq.read_table(out)
    finally:
        out.unlink(missing_ok=True)
    full = {f"cell{number}": tokens(row) for number, row in enumerate(rows) if any(row)}
    assert dict(zip(found["obs_names"].to_pylist(), found["input_ids"].to_pylist(), strict=True)) == full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.__delitem__("obs"), r"no \.h5ad file, it lacks obs or var; .*scanpy\.read_10x_h5"),
        (lambda file: file.__delitem__("X"), "the file has no X: choose a layer"),
        (lambda file: (file.__delitem__("X"), file.__setitem__("X", 3.0)), r"X are \(\), but obs and var"),
        (lambda file: (file.__delitem__("X"), file.__setitem__("X", h5py.Empty("f4"))), "X is no table of numbers"),
        (lambda file: (file.__delitem__("X"), file.__setitem__("X", np.ones(35))), r"X are \(35,\), but obs and var"),
        (
            lambda file: (file.__delitem__("X"), file.__setitem__("X", np.ones((7, 5), "S"))),
            r"X holds \|S\d, not real",
        ),
        (lambda file: (file.__delitem__("var"), file.__setitem__("var", [1])), "anndata before 0.7"),
        (lambda file: file["obs"].__delitem__("_index"), "obs cannot be read: .*; write the file anew"),
        (lambda file: make("_index", lambda x: x[:-1])(file["var"]), "var cannot be read|obs and var have"),
        (lambda file: file["var"].attrs.__setitem__("encoding-type", "dict"), "var is no table|var cannot be read"),
    ],
)
def test_a_file_that_lacks_something(tmp_path, tokenizer, change, message):
    path = tmp_path / "cells.h5ad"
    ones().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        change(file)
    refused(tokenizer, path, message)


def test_what_is_no_h5ad_file_at_all(tmp_path, tokenizer):
    refused(tokenizer, tmp_path / "no.h5ad", "does not exist", FileNotFoundError)
    refused(tokenizer, tmp_path / "no.zarr", "does not exist", FileNotFoundError)
    for name, member in (("cells.zarr", ".zgroup"), ("cells", "zarr.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / member).write_text("{}")
        refused(
            tokenizer, tmp_path / name, r"is zarr, which is not read: write \.h5ad by anndata\.read_zarr\(\.\.\.\)"
        )
    (tmp_path / "cells.zarr.zip").write_bytes(b"PK")
    refused(tokenizer, tmp_path / "cells.zarr.zip", "is zarr, which is not read")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.h5ad").write_text("cell,gene\n")
    for name in ("folder", "text.h5ad"):
        refused(tokenizer, tmp_path / name, r"is no \.h5ad file, which is HDF5")
    ones().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "half.h5ad").write_bytes((tmp_path / "cells.h5ad").read_bytes()[:4000])
    refused(tokenizer, tmp_path / "half.h5ad", "cannot be read, it may be damaged: copy or write it anew", OSError)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stored", ["csr", "csc"])
def test_bytes_that_do_not_unpack(tmp_path, tokenizer, stored, part):
    path = tmp_path / "cells.h5ad"
    ones(stored).write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["X"][part].id.write_direct_chunk((0,), b"no gzip at all")
    refused(tokenizer, path, "cannot be read, it may be damaged: copy or write it anew", OSError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_nothing_is_left_of_a_run_that_ends_early(tmp_path, tokenizer, monkeypatch, error):
    path = tmp_path / "cells.h5ad"
    ones().write_h5ad(path)
    ranked, chunks = tokenizer._ranked, []

    def until_the_third(*given):
        chunks.append(given)
        if len(chunks) == 3:
            assert len(list(tmp_path.glob(".out.parquet.partial-*/out.parquet"))) == 1
            raise error("now")
        return ranked(*given)

    monkeypatch.setattr(tokenizer, "_ranked", until_the_third)
    with pytest.raises(error, match="now"):
        tokenizer.encode_file(path, tmp_path / "out.parquet", chunk_cells=2)
    assert [x.name for x in tmp_path.iterdir()] == ["cells.h5ad"]


def test_nothing_is_written_before_all_is_checked(tmp_path, tokenizer):
    cells = ones()
    cells.X.data[-1] = -1
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="cell 'cell6' has negative counts"):
        tokenizer.encode_file(tmp_path / "cells.h5ad", tmp_path / "new" / "out.parquet", chunk_cells=1)
    assert [x.name for x in tmp_path.iterdir()] == ["cells.h5ad"]
