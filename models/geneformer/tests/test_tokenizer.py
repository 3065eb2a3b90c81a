"""The tokenizer against a plain reading of its rules, cell by cell, gene by gene."""

import json
import pickle
import subprocess
import sys
import warnings
from collections import defaultdict
from fractions import Fraction

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

SPECIAL = {"V1": ["<pad>", "<mask>"], "V2": ["<pad>", "<mask>", "<cls>", "<eos>"]}
GENES = [f"ENSG{number:011}" for number in range(40)]


def dictionaries(version="V2", genes=GENES[:30]):
    names = [*SPECIAL[version], *genes]
    generator = np.random.default_rng(1)
    token_ids = {name: number for number, name in enumerate(names)}
    medians = {gene: float(generator.choice([0.5, 1.0, 2.0, 3.7])) for gene in genes}
    return token_ids, medians


def cells_of(counts, names=None, **obs):
    counts = np.asarray(counts, dtype=np.float32)
    obs = pd.DataFrame(obs, index=[f"cell{number}" for number in range(len(counts))])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=names or GENES[: counts.shape[1]]))


def by_the_rules(row, names, token_ids, medians, version):
    """One cell, in exact fractions, with the total and the 10,000."""
    summed = defaultdict(int)
    for name, count in zip(names, row, strict=True):
        summed[name.upper()] += int(count)
    total = sum(summed.values())
    values = {
        gene: Fraction(count, total) * 10_000 / Fraction(medians[gene])
        for gene, count in summed.items()
        if gene in medians and count
    }
    ranked = sorted(values, key=lambda gene: (-values[gene], token_ids[gene]))
    tokens = [token_ids[gene] for gene in ranked]
    return tokens[:2048] if version == "V1" else [token_ids["<cls>"], *tokens[:4094], token_ids["<eos>"]]


@pytest.mark.filterwarnings("ignore:.* repeat the Ensembl id")
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6), version=st.sampled_from(["V1", "V2"]), kind=st.sampled_from(["dense", "csr", "csc"])
)
def test_random_cells(seed, version, kind):
    generator = np.random.default_rng(seed)
    token_ids, medians = dictionaries(version)
    counts = generator.poisson(0.8, (6, 40)) * generator.integers(1, 4, (6, 40))
    counts[:, 3] += 1  # no empty cell
    names = list(generator.permutation(GENES))
    names[7] = names[3].lower()  # a duplicate, spelt otherwise
    cells = cells_of(counts, names)
    if kind != "dense":
        cells.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](cells.X)
    cells = cells[[row for row in range(6) if set(np.array(names)[counts[row] > 0]) & set(GENES[:30])]]
    found = GeneformerTokenizer(token_ids, medians, version).encode(cells)
    dense = cells.X if kind == "dense" else cells.X.toarray()
    expected = [by_the_rules(row, names, token_ids, medians, version) for row in dense]
    assert found["input_ids"].to_pylist() == expected
    assert found["length"].to_pylist() == [len(cell) for cell in expected]


def test_the_worked_example():
    """Counts 4, 2, 3 over medians 2, 0.5, 3: 2, 4, 1 in proportion; the fourth gene counts in the total only."""
    token_ids = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "A": 4, "B": 5, "C": 6}
    tokenizer = GeneformerTokenizer(token_ids, {"A": 2.0, "B": 0.5, "C": 3.0})
    found = tokenizer.encode(cells_of([[4, 2, 3, 91]], ["A", "B", "C", "unknown"]))
    assert found["input_ids"].to_pylist() == [[2, 5, 4, 6, 3]]


def test_ties_go_by_token_id_whatever_the_order_in_the_file():
    token_ids, _ = dictionaries()
    tokenizer = GeneformerTokenizer(token_ids, dict.fromkeys(GENES[:30], 1.0))
    for names in (GENES[:5], GENES[4::-1]):
        assert tokenizer.encode(cells_of([[2, 2, 2, 2, 2]], names))["input_ids"].to_pylist() == [[2, 4, 5, 6, 7, 8, 3]]


@pytest.mark.parametrize(("version", "most"), [("V1", 2048), ("V2", 4096)])
def test_long_cells_are_cut(version, most):
    genes = [f"G{number}" for number in range(5000)]
    token_ids, medians = dictionaries(version, genes)
    tokenizer = GeneformerTokenizer(token_ids, medians, version)
    found = tokenizer.encode(cells_of(np.ones((1, 5000)), genes))
    assert found["length"].to_pylist() == [most]
    assert found["input_ids"].to_pylist() == [by_the_rules(np.ones(5000), genes, token_ids, medians, version)]


def write(cells, path, layer_format="csr"):
    cells.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[layer_format](cells.X)
    cells.write_h5ad(path)
    return path


@pytest.mark.parametrize("stored", ["csr", "dense", pytest.param("csc", marks=pytest.mark.filterwarnings("ignore"))])
def test_files_are_streamed_by_chunks(tmp_path, stored):
    counts = np.random.default_rng(0).poisson(1.0, (23, 40))
    cells = cells_of(counts, cell_type=pd.Categorical(["T", "B"] * 11 + ["T"]), age=np.arange(23.0))
    tokenizer = GeneformerTokenizer(*dictionaries())
    expected = tokenizer.encode(cells, ["age", "cell_type"])
    path = write(cells, tmp_path / "cells.h5ad", stored)
    report = tokenizer.encode_file(path, tmp_path / "cells.parquet", ["age", "cell_type"], chunk_cells=5)
    found = pq.read_table(tmp_path / "cells.parquet")
    assert found.equals(expected)
    assert (report.cells, report.written) == (23, 23)
    assert found.column_names == ["input_ids", "length", "age", "cell_type"]
    assert found["cell_type"].to_pylist()[:2] == ["T", "B"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["cells.h5ad", "cells.parquet"]


def test_a_layer_and_ensembl_ids_in_a_column(tmp_path):
    cells = cells_of([[0.5, 1.5]], ["TP53", "MYC"])
    cells.layers["counts"] = sparse.csr_matrix([[3.0, 1.0]])
    cells.var["ensembl_id"] = GENES[:2]
    token_ids, _ = dictionaries()
    tokenizer = GeneformerTokenizer(token_ids, dict.fromkeys(GENES[:30], 1.0))
    path = write(cells, tmp_path / "cells.h5ad")
    assert tokenizer.encode(cells, layer="counts")["input_ids"].to_pylist() == [[2, 4, 5, 3]]
    tokenizer.encode_file(path, tmp_path / "out.parquet", layer="counts")
    assert pq.read_table(tmp_path / "out.parquet")["input_ids"].to_pylist() == [[2, 4, 5, 3]]
    with pytest.raises(ValueError, match="no layer 'raw'; there is counts"):
        tokenizer.encode(cells, layer="raw")


def test_cells_that_do_not_pass_or_have_no_gene_are_counted(tmp_path):
    counts = np.zeros((4, 40))
    counts[[0, 1, 3], [2, 3, 35]] = 5  # gene 35 is unknown, cell 2 is empty
    cells = cells_of(counts, filter_pass=[1, 0, 1, 1])
    tokenizer = GeneformerTokenizer(*dictionaries())
    path = write(cells, tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match=r"cells\.h5ad: 2 of 4 cells have no gene of the dictionary"):
        report = tokenizer.encode_file(path, tmp_path / "out.parquet")
    assert (report.cells, report.written, report.filtered, report.without_genes) == (4, 1, 1, 2)


def test_equal_values_of_unequal_medians_tie():
    token_ids = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "A": 4, "B": 5, "unknown": 6}
    tokenizer = GeneformerTokenizer(token_ids, {"A": 1.5, "B": 1.0, "unknown": 1.0})
    for other in range(1, 300):  # whatever the total
        found = tokenizer.encode(cells_of([[2, 3, other]], ["B", "A", "nobody knows"]))
        assert found["input_ids"].to_pylist() == [[2, 4, 5, 3]]


def test_a_chunk_without_cells_is_no_row_group(tmp_path):
    """datasets takes the size of its batches from the first one."""
    cells = cells_of(np.ones((7, 5)), filter_pass=[0, 0, 0, 1, 0, 1, 1])
    path = write(cells, tmp_path / "cells.h5ad")
    GeneformerTokenizer(*dictionaries()).encode_file(
        path, tmp_path / "new" / "out.parquet", "obs_names", chunk_cells=3
    )
    file = pq.ParquetFile(tmp_path / "new" / "out.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [2, 1]
    assert file.read()["obs_names"].to_pylist() == ["cell3", "cell5", "cell6"]


@pytest.mark.parametrize("suffix", [".4", "-1", ".12-2", ".7_PAR_Y"])
@pytest.mark.parametrize("place", ["var_names", "var['ensembl_id']"])
def test_genes_lost_for_a_suffix_are_counted_and_the_line_in_the_warning_saves_them(tmp_path, suffix, place):
    tokenizer = GeneformerTokenizer(*dictionaries())
    ids = [GENES[0], GENES[1] + suffix, GENES[2].lower() + suffix, "ERCC" + suffix, "ERCC-", GENES[35] + suffix]
    cells = cells_of([[3, 2, 1, 1, 1, 1]], ids)
    if place != "var_names":
        cells.var["ensembl_id"], cells.var_names = pd.Categorical(ids), list("ABCDEF")
    path = write(cells, tmp_path / "cells.h5ad")
    lost = f"1 of 6 genes are in the token dictionary; 2 more would be without .* in {GENES[1]}{suffix}, {GENES[2]}"
    with pytest.warns(UserWarning, match=f"^{lost}") as found:
        assert tokenizer.encode(cells)["length"].to_pylist() == [3]
    with pytest.warns(UserWarning, match=rf"cells\.h5ad: {lost}") as found_of_file:
        report = tokenizer.encode_file(path, tmp_path / "out.parquet")
    assert (report.genes, report.known_genes) == (6, 1)
    assert {warning.filename for warning in (*found, *found_of_file)} == {__file__}  # the caller's line
    assert len(found) == len(found_of_file) == 1
    line = str(found[0].message).partition(": ")[2].removesuffix(" strips it")
    exec(line, {"adata": cells})
    assert tokenizer.encode(cells)["length"].to_pylist() == [5]
    with pytest.raises(ValueError, match=f"0 of 1 genes .*; 1 more would be without .* in {GENES[1]}{suffix}: adata"):
        tokenizer.encode(cells_of([[1]], [GENES[1] + suffix]))


@pytest.mark.parametrize(("known", "unknown", "warns"), [(3, 28, True), (3, 27, False), (29, 0, False)])
def test_few_known_genes_are_counted(tmp_path, known, unknown, warns):
    names = [*GENES[:known], *(f"GENE{number}" for number in range(unknown))]
    cells = cells_of(np.ones((2, len(names))), names)
    path = write(cells, tmp_path / "cells.h5ad")
    tokenizer = GeneformerTokenizer(*dictionaries())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tokenizer.encode(cells)
        tokenizer.encode_file(path, tmp_path / "out.parquet")
    message = f"{known} of {len(names)} genes are in the token dictionary: the ids in var_names are like GENE0, GENE1"
    assert [str(warning.message).startswith(start) for warning, start in zip(
        found, (message, f"{path}: {message}"), strict=False
    )] == [True, True] * warns  # fmt: skip
    assert {warning.filename for warning in found} <= {__file__}


def test_genes_that_repeat_an_id_are_counted():
    with pytest.warns(UserWarning, match="^2 genes repeat the Ensembl id of another"):
        GeneformerTokenizer(*dictionaries()).encode(
            cells_of([[3, 2, 1, 1]], [GENES[0], GENES[0].lower(), GENES[0].title(), GENES[1]])
        )


def test_two_runs_into_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, out = write(cells_of(np.ones((7, 5))), tmp_path / "cells.h5ad"), tmp_path / "out.parquet"
    tokenizer, other = (GeneformerTokenizer(*dictionaries()) for _ in range(2))

    def meanwhile(report):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="obs has no column nosuch"):
            other.encode_file(path, tmp_path / "out.parquet", ["nosuch"])

    ranked = tokenizer._ranked
    monkeypatch.setattr(tokenizer, "_ranked", lambda *given: (meanwhile(given), ranked(*given))[1])
    assert tokenizer.encode_file(path, out, chunk_cells=3).written == 7
    assert pq.read_metadata(out).num_rows == 7


def test_no_cell_or_gene_at_all(tmp_path):
    tokenizer = GeneformerTokenizer(*dictionaries())
    with pytest.raises(ValueError, match="0 of 0 genes are in the token dictionary"):
        tokenizer.encode(cells_of(np.zeros((3, 0))))
    none = cells_of(np.zeros((0, 5)), age=[])
    path = write(none, tmp_path / "cells.h5ad", "dense")
    tokenizer.encode_file(path, tmp_path / "out.parquet", ["age"])
    for found in (tokenizer.encode(none, ["age"]), pq.read_table(tmp_path / "out.parquet")):
        assert (found.num_rows, found.column_names) == (0, ["input_ids", "length", "age"])
    for size in (0, 600_000):
        with pytest.raises(ValueError, match=f"chunk_cells={size} must be between 1 and 500,000"):
            tokenizer.encode_file(path, tmp_path / "out", chunk_cells=size)


def test_columns_of_obs():
    tokenizer = GeneformerTokenizer(*dictionaries())
    kinds = {
        "day": pd.to_datetime(["2026-01-01", "2026-01-02"]), "ok": [True, False], "nothing": [None, None],
        "grade": pd.Categorical([3, None]), "mixed": [1, "a"], "length": [9, 9], "filter_pass": [1, 1],
    }  # fmt: skip
    cells = cells_of([[1, 2], [2, 1]], **kinds)
    found = tokenizer.encode(cells, ["day", "ok", "nothing", "grade", "obs_names"])
    assert found["obs_names"].to_pylist() == ["cell0", "cell1"]
    assert found["grade"].to_pylist() == [3, None]
    assert found["length"].to_pylist() == [4, 4]
    with pytest.raises(ValueError, match="a column length of its own"):
        tokenizer.encode(cells, ["length"])
    with pytest.raises(ValueError, match="column mixed of obs cannot be written"):
        tokenizer.encode(cells, ["mixed"])
    for bad in (["yes", "no"], [1, None], [2, 1]):
        cells.obs["filter_pass"] = bad
        with pytest.raises(ValueError, match="something other than 0 and 1"):
            tokenizer.encode(cells)
    cells.obs["filter_pass"] = [0, 0]
    with pytest.warns(UserWarning, match="no cell passes"):
        assert tokenizer.encode(cells).num_rows == 0


def test_dictionaries(tmp_path):
    token_ids, medians = dictionaries()
    (tmp_path / "ids.json").write_text(json.dumps(token_ids))
    (tmp_path / "medians.json").write_text(json.dumps(medians))
    assert GeneformerTokenizer(tmp_path / "ids.json", str(tmp_path / "medians.json")).medians == medians
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps(token_ids))
    (tmp_path / "disguised.json").write_bytes(pickle.dumps({key: np.int64(x) for key, x in token_ids.items()}))
    for name in ("ids.pkl", "disguised.json"):
        with pytest.raises(ValueError, match=r"is a pickle.*python -c") as refused:
            GeneformerTokenizer(tmp_path / name, medians)
    command = str(refused.value).partition("python -c ")[2]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, cwd=tmp_path)
    assert GeneformerTokenizer(tmp_path / "disguised.read.json", medians).token_ids == token_ids
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        GeneformerTokenizer(tmp_path / "bad.json", medians)
    for other, version in (("V1", "V2"), ("V2", "V1")):
        with pytest.raises(ValueError, match=f"the special tokens of {version} are"):
            GeneformerTokenizer(dictionaries(other)[0], medians, version)
    for wrong in ({GENES[0]: 2}, {GENES[0]: 5}, {GENES[0].lower(): 40}):
        with pytest.raises(ValueError, match="to several genes, or a special id to one"):
            GeneformerTokenizer({**token_ids, **wrong}, medians)
    for median in (0, None, float("inf"), float("nan"), "1"):
        with pytest.raises(ValueError, match=f"1 genes have no positive median, among them {GENES[0]}"):
            GeneformerTokenizer(token_ids, {**medians, GENES[0]: median})
    for number in (4.7, None, "x", 2**31):
        with pytest.raises(ValueError, match=f"1 token ids are no whole numbers .* among them {GENES[0]}: {number!r}"):
            GeneformerTokenizer({**token_ids, GENES[0]: number}, medians)
    with pytest.raises(ValueError, match="version='V3' is unknown"):
        GeneformerTokenizer(token_ids, medians, "V3")


def test_what_the_file_lacks_is_said(tmp_path):
    tokenizer = GeneformerTokenizer(*dictionaries())
    with pytest.raises(ValueError, match=r"0 of 1 genes .* dictionary: the ids in var_names are like TP53, the"):
        tokenizer.encode(cells_of([[1]], ["TP53"]))
    with pytest.raises(ValueError, match="obs has no column sex; it has age"):
        tokenizer.encode(cells_of([[1]], age=[3]), ["sex"])
    path = write(cells_of([[1]]), tmp_path / "cells.h5ad")
    with pytest.raises(FileExistsError, match="exists already"):
        tokenizer.encode_file(path, path)
