"""Where files keep counts and Ensembl ids: 10x's columns, CELLxGENE's raw."""

import warnings

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

anndata = pytest.importorskip(
    "anndata", reason="the tokenizer reads AnnData; pip install -e models/geneformer brings it"
)
from biote_geneformer import GeneformerTokenizer  # noqa: E402 (it imports anndata)

GENES = [f"ENSG{number:011}" for number in range(6)]
IDS = {name: number for number, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *GENES])}
COUNTS = np.array([[6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]], np.float32)
EXPECTED = [[2, 4, 5, 6, 7, 8, 9, 3], [2, 9, 8, 7, 6, 5, 4, 3]]


@pytest.fixture
def tokenizer():
    return GeneformerTokenizer(IDS, dict.fromkeys(GENES, 1.0))


def cells_of(names, counts=COUNTS, **var):
    return anndata.AnnData(counts.copy(), var=pd.DataFrame(var, index=pd.Index(names, dtype=object)))


def encoded(tokenizer, cells, path, message=None, **options):
    """Token lists, the same from memory and from a file, each with one warning that matches `message`, or none."""
    cells.write_h5ad(path / "cells.h5ad")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = tokenizer.encode(cells, **options)["input_ids"].to_pylist()
        report = tokenizer.encode_file(path / "cells.h5ad", path / "out.parquet", **options)
    assert pq.read_table(path / "out.parquet")["input_ids"].to_pylist() == found
    assert len(warned) == (2 if message else 0), [str(one.message) for one in warned]
    assert all(message in str(one.message) and one.filename == __file__ for one in warned)
    (path / "out.parquet").unlink()
    return found, report


SYMBOLS = ["TP53", "MYC", "ACTB", GENES[3], "GAPDH", "CD4"]  # 10x: a gene without a symbol has its id for a name


@pytest.mark.parametrize("kind", ["category", object])
@pytest.mark.parametrize("column", ["gene_ids", "anything"])
def test_the_column_that_the_dictionary_knows_is_found_and_named(tmp_path, tokenizer, column, kind):
    types = pd.Categorical(["Gene Expression"] * 6)
    var = {"feature_types": types, column: pd.Series(GENES, SYMBOLS, dtype=kind), "n_cells": range(6)}
    cells = cells_of(SYMBOLS, **var)
    message = (
        f"the genes' ids are read from var['{column}'], where the dictionary knows 6 of 6 (in var_names, like TP53, "
        f"MYC, ACTB, 1); id_column='{column}' says so without this warning"
    )
    found, report = encoded(tokenizer, cells, tmp_path, message)
    assert (found, report.ids, report.known_genes) == (EXPECTED, f"var['{column}']", 6)
    found, report = encoded(tokenizer, cells, tmp_path, id_column=column)
    assert (found, report.ids) == (EXPECTED, f"var['{column}']")
    if kind is object:
        cells.var[column] = cells.var[column].astype("string")  # which anndata does not write
        with pytest.warns(UserWarning, match="6 of 6"):
            assert tokenizer.encode(cells)["input_ids"].to_pylist() == EXPECTED
        cells.var[column] = cells.var[column].astype(object)
    found, report = encoded(tokenizer, cells, tmp_path, id_column="var_names")
    assert (found, report.ids) == ([[2, 7, 3]] * 2, "var_names")


def test_names_go_before_columns_and_ensembl_id_before_both(tmp_path, tokenizer):
    found, report = encoded(tokenizer, cells_of(GENES, other=GENES[::-1]), tmp_path)
    assert (found, report.ids) == (EXPECTED, "var_names")
    some = [*GENES[:2], "", "", "", ""]
    found, report = encoded(tokenizer, cells_of(GENES, ensembl_id=some), tmp_path)
    assert (found[0], report.ids) == ([2, 4, 5, 3], "var['ensembl_id']")
    message = "ids are read from var['gene_ids']"
    found, report = encoded(
        tokenizer, cells_of(SYMBOLS, ensembl_id=["x"] * 6, gene_ids=[*GENES[:5], None]), tmp_path, message
    )
    assert (found[0], report.ids) == ([*EXPECTED[0][:-2], 3], "var['gene_ids']")


def test_versions_in_the_column_that_was_found(tmp_path, tokenizer):
    """One name is known, but six ids would be without their versions: those are what is lost by mistake."""
    cells = cells_of(SYMBOLS, gene_ids=[f"{gene}.{number}" for number, gene in enumerate(GENES)])
    with pytest.raises(ValueError, match=r"0 of 6 genes .*; 6 more would be without .*: adata.var") as refused:
        tokenizer.encode(cells)
    exec(str(refused.value).partition("2.2: ")[2].removesuffix(" strips it"), {"adata": cells})
    assert encoded(tokenizer, cells, tmp_path)[0] == EXPECTED


def test_an_id_column_that_is_not_to_be_had(tmp_path, tokenizer):
    cells = cells_of(SYMBOLS, gene_ids=GENES, name=SYMBOLS)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"cells\.h5ad: var has no column x; it has gene_ids, name"):
        tokenizer.encode_file(tmp_path / "cells.h5ad", tmp_path / "out", id_column="x")
    with pytest.raises(ValueError, match=r"0 of 6 .* ids in var\['n'\] are like A, A, A.* id_column= names a column"):
        tokenizer.encode(cells_of(SYMBOLS, gene_ids=GENES, n=["A"] * 6), id_column="n")
    twice = cells_of(SYMBOLS)
    twice.var = pd.DataFrame(np.array([GENES, GENES]).T, SYMBOLS, ["gene_ids", "gene_ids"])
    with pytest.raises(ValueError, match="var has several columns gene_ids: rename them"):
        tokenizer.encode(twice, id_column="gene_ids")
    message = (
        r"the dictionary's like ENSG.*; var\['ensembl_id'\], var_names and the columns of text in var were looked"
    )
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(cells_of(["A", "B", "C", "D", "E", "F"], name=SYMBOLS[:3] * 2))


def cellxgene(normalised, raw=COUNTS, names=GENES):
    """Normalised X of three genes; counts of all in raw."""
    cells = cells_of(names, raw)
    full = anndata.AnnData(sparse.csr_matrix(cells.X), var=cells.var)
    cells = cells[:, [4, 0, 2]].copy()
    cells.raw = full
    cells.X = normalised
    return cells


@pytest.mark.parametrize("stored", [np.asarray, sparse.csr_matrix])
def test_counts_in_raw_are_read_if_asked_for(tmp_path, tokenizer, stored):
    cells = cellxgene(stored(np.log1p(COUNTS[:, :3])))
    found, report = encoded(tokenizer, cells, tmp_path, layer="raw/X")
    assert (found, report.ids, report.genes) == (EXPECTED, "raw.var_names", 6)
    hint = r"cell '0' has counts that are no whole numbers: pass raw counts; whole numbers are in layer='raw/X'$"
    with pytest.raises(ValueError, match=hint):
        tokenizer.encode(cells)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'cells.h5ad'}: {hint}"):
        tokenizer.encode_file(tmp_path / "cells.h5ad", tmp_path / "out.parquet")
    assert tokenizer.encode(cells[[1]], layer="raw/X")["input_ids"].to_pylist() == EXPECTED[1:]
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert tokenizer.encode(backed, layer="raw/X")["input_ids"].to_pylist() == EXPECTED
    backed.file.close()


def test_a_hint_names_what_holds_counts_and_nothing_else(tmp_path, tokenizer):
    scaled = COUNTS[:, :3] - 3
    cells = cellxgene(scaled, np.log1p(COUNTS))  # scanpy's usual: scaled X, log-normalised raw
    with pytest.raises(ValueError, match=r"has negative counts$"):
        tokenizer.encode(cells)
    with pytest.raises(ValueError, match=r"no whole numbers: pass raw counts$"):
        tokenizer.encode(cells, layer="raw/X")
    cells.layers["counts"], cells.layers["words"] = COUNTS[:, :3], np.full((2, 3), "x", object)
    with pytest.raises(ValueError, match=r"has negative counts; whole numbers are in layer='counts'$"):
        tokenizer.encode(cells)
    cells.X = COUNTS[:, :3]
    with pytest.raises(ValueError, match=r"whole numbers are in layer=None and in layer='counts'$"):
        tokenizer.encode(cells, layer="raw/X")
    del cells.layers["words"], cells.layers["counts"]
    found, report = encoded(tokenizer, cells, tmp_path)  # X, since nothing else was named
    assert (found[0], report.ids) == ([2, 8, 4, 6, 3], "var_names")


def test_raw_that_is_not_there_or_is_broken(tmp_path, tokenizer):
    path = tmp_path / "cells.h5ad"
    for layers, there in (({}, "none"), ({"counts": COUNTS}, "counts")):
        cells = cells_of(GENES)
        cells.layers.update(layers)
        cells.write_h5ad(path)
        with pytest.raises(ValueError, match=f"there is no raw/X; there is {there}$"):
            tokenizer.encode(cells, layer="raw/X")
        with pytest.raises(ValueError, match=f"there is no raw/X; there is {there}$"):
            tokenizer.encode_file(path, tmp_path / "out.parquet", layer="raw/X")
    cells = cellxgene(COUNTS[:, :3])
    with pytest.raises(ValueError, match="there is no layer 'raw'; there is raw/X"):
        tokenizer.encode(cells, layer="raw")
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["raw/var"]
    with pytest.raises(ValueError, match="raw has counts but no var: write the file anew"):
        tokenizer.encode_file(path, tmp_path / "out.parquet", layer="raw/X")
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["raw/X/indptr"][-1] = 99
        del file["X"]
    with pytest.raises(ValueError, match="raw/X/indptr goes from 0 to 99, but the counts from 0 to 12"):
        tokenizer.encode_file(path, tmp_path / "out.parquet", layer="raw/X")
    with pytest.raises(ValueError, match="the file has no X: choose a layer of raw/X"):
        tokenizer.encode_file(path, tmp_path / "out.parquet")


def test_ids_of_raw_are_those_of_its_own_var(tmp_path, tokenizer):
    cells = cellxgene(COUNTS[:, :3], names=SYMBOLS)
    cells.raw.var["gene_ids"] = [f"{gene}.1" for gene in GENES]
    with pytest.raises(ValueError, match="6 more would be without") as refused:
        tokenizer.encode(cells, layer="raw/X")
    line = str(refused.value).partition("2.1: ")[2].removesuffix(" strips it")
    assert line.startswith("adata.raw.var[")
    exec(line, {"adata": cells})
    assert encoded(tokenizer, cells, tmp_path, layer="raw/X")[0] == EXPECTED


def test_columns_of_obs_by_new_names(tokenizer):
    cells = cells_of(GENES)
    cells.obs["type"] = ["T", "B"]
    found = tokenizer.encode(cells, {"label": "type", "row": "obs_index"})
    assert found.column_names == ["input_ids", "length", "label", "row"]
    assert (found["label"].to_pylist(), found["row"].to_pylist()) == (["T", "B"], [0, 1])
    with pytest.raises(ValueError, match="a column length of its own"):
        tokenizer.encode(cells, {"length": "type"})
