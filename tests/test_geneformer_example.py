"""The example, from an .h5ad file to a picture."""

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
