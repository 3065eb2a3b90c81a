"""The README's Python, run from top to bottom beside a tiny model."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biote.convert import convert_folder

anndata = pytest.importorskip(
    "anndata", reason="the tokenizer reads AnnData; pip install -e models/geneformer brings it"
)
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_readme_runs(tmp_path, monkeypatch, golden_folder):
    monkeypatch.chdir(tmp_path)
    genes = [f"ENSG{number:011}" for number in range(44)]
    names = ["<pad>", "<mask>", "<cls>", "<eos>", *genes]
    Path("token_dictionary.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    Path("gene_medians.json").write_text(json.dumps(dict.fromkeys(genes, 1.0)))
    obs = pd.DataFrame({"cell_type": ["T", "B", "T"], "kind": [0, 1, 2]}, index=["a", "b", "c"])
    counts = np.random.default_rng(0).poisson(0.5, (3, 44)).astype(np.float32)
    counts[:, [3, 5]] = 2
    adata = anndata.AnnData(counts, obs, pd.DataFrame(index=genes))
    adata.write_h5ad("cells.h5ad")
    convert_folder(golden_folder, Path("build/te"), "te")
    text = README.read_text().replace("Geneformer-V2-104M", str(golden_folder))
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    found = {"adata": adata}
    exec(code, found)
    assert found["embeddings"].shape == (3, 64)
    assert found["shift"].shape == (3, 2)
    assert found["both"].shape == (3, 1)
    assert found["shift"].isfinite().all()
    assert found["classifier"].config.num_labels == 3
