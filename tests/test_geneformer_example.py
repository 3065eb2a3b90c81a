"""The example, from an .h5ad file to a picture."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

anndata = pytest.importorskip(
    "anndata", reason="the example reads AnnData; pip install -e models/geneformer brings it"
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "geneformer_cells.py"


def test_from_counts_to_a_picture(tmp_path):
    counts = np.random.default_rng(0).poisson(0.5, (12, 40)).astype(np.float32)
    obs = pd.DataFrame({"kind": ["a", None] * 6}, index=[f"cell{i}" for i in range(12)])
    anndata.AnnData(counts, obs, pd.DataFrame(index=[f"G{i}" for i in range(40)])).write_h5ad(tmp_path / "cells.h5ad")
    command = [sys.executable, EXAMPLE, "--cells", "cells.h5ad", "--label", "kind", "--output", "cells.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 cells" in done.stdout
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")
    spoilt = np.where(counts == counts.max(), np.nan, counts)
    for cells, reason in ((counts[:2], "2 of 2 cells have genes to rank"), (spoilt, "cells.h5ad: cell 'cell")):
        anndata.AnnData(cells, obs[: len(cells)], pd.DataFrame(index=[f"G{i}" for i in range(40)])).write_h5ad(
            tmp_path / "cells.h5ad"
        )
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(f"error: {reason}")
    refused = subprocess.run([*command, "--source", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert (
        refused.stderr
        == "error: a checkpoint needs --token-ids and --medians, both: the dictionaries it was trained with\n"
    )


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kinds_are_learnt_and_the_genes_that_make_them_matter(tmp_path, monkeypatch, capsys):
    """The made-up cells have 12 genes of 60 that differ between kinds."""
    commands = (
        ("geneformer_classify.py", "--output", "kinds"),
        ("geneformer_perturb.py", "--source", "kinds/model", "--cells", "kinds/cells.h5ad", "--output", "delete.csv"),
    )
    for example, *arguments in commands:
        command = [sys.executable, EXAMPLE.parent / example, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if example == "geneformer_classify.py":
            right = re.search(r"(\d+) of 40 cells that were held out are told right", done.stdout)
            assert int(right[1]) > 34
    table = pd.read_csv(tmp_path / "delete.csv")
    assert (list(table.columns), len(table)) == (["gene", "cells", "shift"], 20)
    assert table["shift"].is_monotonic_decreasing
    assert (table["cells"] < 100).any()
    assert (table["gene"][:6] < "ENSG00000000012").all()

    monkeypatch.chdir(tmp_path)
    model, cells = "kinds/model", Path("kinds/cells.h5ad")
    perturb, classify = load("geneformer_perturb"), load("geneformer_classify")
    genes = ["ENSG00000000059", "ensg00000000001"]
    perturb.main(model, cells, Path("few.csv"), kind="overexpress", gene=genes, genes=1, first=30)
    few = pd.read_csv("few.csv")
    assert (sorted(few["gene"]), few["cells"].tolist()) == (sorted(genes), [30, 30])
    for options, message in (
        ({"output": Path("few.csv")}, r"few\.csv exists already"),
        ({"gene": ["TP53"]}, "the token dictionary has no TP53: genes go by Ensembl id"),
        ({"kind": "activate"}, "kind='activate' is unknown"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            perturb.main(
                **{"source": model, "cells": cells, "output": Path("new.csv"), "genes": 3, "first": 2, **options}
            )
    for options, message in (
        ({"output": Path("kinds")}, "kinds exists already"),
        ({"cells": cells, "label": "nosuch"}, "obs has no column nosuch; it has kind"),
        ({"source": str(tmp_path)}, r"lacks token_dictionary\.json and gene_median_dictionary\.json"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            classify.main(**{"output": Path("new"), **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delete.csv", "few.csv", "kinds"]
    classify.main(Path("again"), cells, source=model, epochs=1)
    assert int(re.search(r"(\d+) of 40 cells", capsys.readouterr().out)[1]) > 34
