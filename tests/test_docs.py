"""Commands and Python of the pages on jobs, from top to bottom, with tiny models in place of the published ones."""

import gc
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

anndata = pytest.importorskip("anndata", reason="docs/cells.md is of AnnData; pip install -e models/geneformer")
pytest.importorskip("matplotlib")

GENES = [f"ENSG{number:011}" for number in range(44)]
ELSEWHERE = ("torchrun", "--devices 0,1", "--ray", "protspace")  # what needs more than one CPU, or others' programs


@pytest.fixture(autouse=True)
def _files_of_the_pages_are_closed():
    """A page's short Python leaves the files of numpy.load to the garbage collector, which is no fault of ours."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def inputs(tmp_path, monkeypatch, root, tiny_original):
    """What the pages read, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = {"sp|P1|A": "MKTAYIAKQRQISFVKSHFSRQ", "b": "mkt*", "c": "GSHMLEDPQACDEFGHIKLMNPQRSTVWY"}
    fasta = [f">{name} x\n{text}\n" for name, text in rows.items()]
    Path("proteins.fasta").write_text("".join(fasta))
    Path("protein.fasta").write_text(fasta[0])
    Path("variants.csv").write_text("mutant\nA4V\nK2R:A4G\n")
    pd.DataFrame({"id": rows.keys(), "sequence": rows.values()}).to_csv("proteins.csv", index=False)
    shutil.copytree(tiny_original, "MODEL1")
    shutil.copytree(tiny_original, "MODEL2")
    shutil.copytree(tiny_original, "esm2_t33_650M_UR50D")  # a folder has precedence over the tag
    shutil.copytree(root / "models" / "geneformer" / "tests" / "golden", "Geneformer-V2-104M")
    ids = {name: number for number, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *GENES])}
    Path("token_dictionary.json").write_text(json.dumps(ids))
    Path("gene_medians.json").write_text(json.dumps(dict.fromkeys(GENES, 1.0)))
    counts = np.random.default_rng(0).poisson(0.5, (5, 44)).astype(np.float32)
    counts[2] = 0
    obs = pd.DataFrame({"kind": list("abaab")}, index=[f"c{number}" for number in range(5)])
    anndata.AnnData(counts, obs, pd.DataFrame(index=GENES)).write_h5ad("cells.h5ad")
    return tmp_path


def run_page(page, biote):
    """Run it; returns the names that its Python leaves, and how many commands it had."""
    names, commands = {}, 0
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", page, flags=re.S):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            if any(word in line for word in ELSEWHERE):
                continue
            program, *arguments = shlex.split(line, comments=True)
            assert program == "biote", line
            done = biote(*arguments)
            assert done[0] == 0, f"{line}: {done[2]}"
            commands += 1
    return names, commands


def test_embed(root, inputs, biote):
    from biote_geneformer import GeneformerTokenizer

    shutil.copytree("Geneformer-V2-104M", "geneformer")
    GeneformerTokenizer("token_dictionary.json", "gene_medians.json").save_pretrained("geneformer")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*1 of 5 cells have no gene")
        names, commands = run_page((root / "docs" / "embed.md").read_text(), biote)
    assert commands == 4
    assert names["matrix"].shape == (3, 64)
    assert (names["how"]["model"], names["how"]["precision"]) == ("esm2_t33_650M_UR50D", "float32")
    assert {name: len(rows) for name, rows in names["residues_of"].items()} == {"sp|P1|A": 22, "b": 3, "c": 29}
    assert names["vectors"].shape == (2, 64)
    assert [rows.shape for rows in names["residues"]] == [(22, 64), (9, 64)]
    assert set(names["several"]) == {"mean_3", "cls_3", "mean_0", "cls_0"}


def test_cells(root, inputs, biote):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*1 of 5 cells have no gene")
        names, commands = run_page((root / "docs" / "cells.md").read_text(), biote)
    assert commands == 2
    assert list(names["cells"].obs_names) == ["c0", "c1", "c3", "c4"]
    assert names["cells"].obsm["X_geneformer"].shape == (4, 64)


@pytest.mark.parametrize(("page", "commands"), [("score", 3), ("contacts", 1)])
def test_proteins(root, inputs, biote, page, commands):
    names, found = run_page((root / "docs" / f"{page}.md").read_text(), biote)
    assert found == commands
    assert (names["scores"] if page == "score" else names["probabilities"]).ndim == (1 if page == "score" else 2)
