"""Make the committed tiny original and its golden values: `python models/geneformer/tests/make_golden.py`."""

from pathlib import Path

import torch
from conftest import make_original

from biote.golden import capture
from biote.runtime.verify import GOLDEN_FILE
from biote_geneformer.convert import PORT

SEED = 2025

if __name__ == "__main__":
    folder = Path(__file__).parent / "golden"
    make_original("AutoModelForMaskedLM", SEED).to(torch.float32).save_pretrained(folder)
    capture(PORT, folder, folder / GOLDEN_FILE, {"source": "tiny random Geneformer", "revision": None, "seed": SEED})
