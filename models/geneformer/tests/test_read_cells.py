"""Dictionaries beside a checkpoint: written, read, carried by conversions; and the port's reader of cells."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from biote.convert import convert_folder
from biote_geneformer.convert import PORT
from biote_geneformer.dictionaries import MEDIANS, TOKEN_IDS

anndata = pytest.importorskip(
    "anndata", reason="the tokenizer reads AnnData; pip install -e models/geneformer brings it"
)
from biote_geneformer import GeneformerTokenizer  # noqa: E402 (it imports anndata)

SPECIAL = {"V1": ["<pad>", "<mask>"], "V2": ["<pad>", "<mask>", "<cls>", "<eos>"]}


def tokenizer_of(version="V2", size=48):
    names = [*SPECIAL[version], *(f"ENSG{number:011}" for number in range(size - len(SPECIAL[version])))]
    medians = {name: np.float32(0.5 + number % 7 / 3) for number, name in enumerate(names)}
    return GeneformerTokenizer({name: np.int64(number) for number, name in enumerate(names)}, medians, version)


@pytest.fixture
def h5ad(tmp_path):
    """Cells c0 to c6: one without a known gene, one that does not pass; symbols as names."""
    counts = np.random.default_rng(0).poisson(1.0, (7, 20)).astype(np.float32)
    counts[:, 1] += 1
    counts[2] = 0
    obs = pd.DataFrame({"filter_pass": [1, 1, 1, 1, 0, 1, 1]}, index=[f"c{number}" for number in range(7)])
    var = pd.DataFrame({"gene_ids": [f"ENSG{n:011}" for n in range(20)]}, index=[f"SYMBOL{n}" for n in range(20)])
    anndata.AnnData(counts, obs, var).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize("version", SPECIAL)
def test_a_tokenizer_comes_back_as_it_was_saved(tmp_path, version):
    tokenizer = tokenizer_of(version)
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    tokenizer.save_pretrained(tmp_path / "new" / "folder")  # over what is there
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted([TOKEN_IDS, MEDIANS])
    found = GeneformerTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert (found.version, found.token_ids) == (version, tokenizer.token_ids)
    assert found.medians == {gene: tokenizer.medians[gene] for gene in tokenizer.genes}


@pytest.mark.parametrize("version", SPECIAL)
def test_read_cells(tmp_path, h5ad, version):
    tokenizer = tokenizer_of(version)
    tokenizer.save_pretrained(tmp_path / "model")
    cells = anndata.read_h5ad(h5ad)
    cells.var_names = cells.var["gene_ids"].to_list()
    with pytest.warns(UserWarning, match="1 of 7 cells have no gene"):
        expected = tokenizer.encode(cells, ["obs_names"])
    with pytest.warns(UserWarning, match="cells.h5ad: ") as warned:
        report = PORT.read_cells(h5ad, tmp_path / "model", tmp_path / "out.parquet")
    assert ["var['gene_ids']" in str(w.message) for w in warned] == [True, False]
    assert (report.cells, report.written, report.ids) == (7, 5, "var['gene_ids']")
    assert (report.before, report.after) == {"V1": (0, 0), "V2": (1, 1)}[version]
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["obs_index"].type == pa.int64()
    assert found["obs_index"].to_pylist() == [0, 1, 3, 5, 6]
    assert found["id"].to_pylist() == ["c0", "c1", "c3", "c5", "c6"] == expected["obs_names"].to_pylist()
    assert found["input_ids"].equals(expected["input_ids"])
    assert found["length"].to_pylist() == [len(cell) for cell in expected["input_ids"].to_pylist()]


def test_a_folder_without_its_dictionaries(tmp_path, h5ad, golden_folder):
    folder = shutil.copytree(golden_folder, tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=f"lacks {TOKEN_IDS} and {MEDIANS}, .*save_pretrained.'{folder}'"):
        PORT.read_cells(h5ad, folder, tmp_path / "out.parquet")
    tokenizer_of().save_pretrained(folder)
    (folder / MEDIANS).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {MEDIANS}, the"):
        PORT.read_cells(h5ad, folder, tmp_path / "out.parquet")
    for name in (MEDIANS, TOKEN_IDS):
        tokenizer_of().save_pretrained(folder)
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=f"{name} is a pickle, which can run any code"):
            GeneformerTokenizer.from_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    (folder / TOKEN_IDS).write_text('{"<pad>": 0, "<cls>": 1}')
    with pytest.raises(ValueError, match=r"special tokens \{'<pad>': 0, '<cls>': 1\}, which are no version's: V1"):
        GeneformerTokenizer.from_pretrained(folder)
    tokenizer_of(size=49).save_pretrained(folder)
    with pytest.raises(
        ValueError, match="token ids up to 48, but the model's vocab_size is 48: it is another model's"
    ):
        GeneformerTokenizer.from_pretrained(folder)
    tokenizer_of("V1", size=47).save_pretrained(folder)
    with pytest.warns(UserWarning, match="47 token ids for a model of 48: is this its dictionary") as warned:
        GeneformerTokenizer.from_pretrained(folder)
    assert warned[0].filename == __file__


def test_dictionaries_go_with_a_conversion_both_ways(tmp_path, golden_folder):
    source = shutil.copytree(golden_folder, tmp_path / "source")
    tokenizer_of().save_pretrained(source)
    convert_folder(source, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "hf", "hf")
    for folder in ("te", "hf"):
        for name in (TOKEN_IDS, MEDIANS):
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()
    assert GeneformerTokenizer.from_pretrained(tmp_path / "te").token_ids == tokenizer_of().token_ids
    (source / MEDIANS).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=f"{MEDIANS} is a pickle"):
        convert_folder(source, tmp_path / "other", "te")
    assert not (tmp_path / "other").exists()
    (source / MEDIANS).write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=f"{MEDIANS} holds no JSON object"):
        convert_folder(source, tmp_path / "other", "te")
