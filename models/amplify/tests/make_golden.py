"""Make the committed tiny original and its golden values: `python models/amplify/tests/make_golden.py`."""

from pathlib import Path

import torch
from conftest import make_original

from biote.golden import capture
from biote.runtime.verify import GOLDEN_FILE
from biote_amplify.convert import PORT

SEED = 2024

if __name__ == "__main__":
    folder = Path(__file__).parent / "golden"
    make_original("AutoModelForMaskedLM", SEED).to(torch.float32).save_pretrained(folder)
    capture(PORT, folder, folder / GOLDEN_FILE, {"source": "tiny random AMPLIFY", "revision": None, "seed": SEED})
