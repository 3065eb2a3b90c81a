"""A described folder, as an export is, loads in sentence_transformers; its embedding is the mean over residues."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from biote.convert import convert_folder
from biote.files import read_json
from biote.port import installed_ports
from biote.sentence_transformers import NO_LIMIT, describe

BLOCKED = ["biote", *(port.package for port in installed_ports().values())]
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "GSHMLE<mask>PQXB", "M", "MKTAYIAKQR" * 150]
PORTS = [name for name, port in installed_ports().items() if port.build_tokenizer]
ELSEWHERE = """
import sys, warnings
sys.modules.update(dict.fromkeys({blocked!r}))
warnings.simplefilter("error")
import numpy as np, torch
from sentence_transformers import SentenceTransformer
for folder in ({folder!r}, {folder!r} + "-again"):
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu", model_kwargs={{"dtype": torch.float64}})
    found = model.encode({sequences!r}, batch_size=2, convert_to_tensor=True)
    np.savez(folder + ".npz", found=found, most=model.max_seq_length)
    model.save_pretrained({folder!r} + "-again")
"""


@pytest.mark.parametrize("name", PORTS)
def test_an_embedding_is_the_mean_over_residues(root, tmp_path, name):
    """Where biote cannot be imported; and once more from what the library saves."""
    port, folder = installed_ports()[name], tmp_path / "described"
    convert_folder(root / "models" / name / "tests" / "golden", folder, "te")
    describe(folder)
    code = ELSEWHERE.format(blocked=BLOCKED, folder=str(folder), sequences=SEQUENCES)
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = port.classes["AutoModel"].from_pretrained(folder, dtype=torch.float64, engine="torch").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = model.max_positions
    expected = []
    for sequence in SEQUENCES:
        ids = tokenizer([sequence], return_tensors="pt", truncation=limit is not None, max_length=limit)["input_ids"]
        with torch.no_grad():
            expected.append(model(ids).last_hidden_state[0, 1:-1].mean(0).numpy())
    with np.load(f"{folder}.npz") as result:
        assert int(result["most"]) == (limit or NO_LIMIT)
        np.testing.assert_allclose(result["found"], expected, rtol=1e-9, atol=1e-12)
    with np.load(f"{folder}-again.npz") as result:  # the library does not save how long sequences may be
        np.testing.assert_allclose(result["found"][:-1], expected[:-1], rtol=1e-9, atol=1e-12)


def test_tokens_added_by_a_source_have_weight(root, tmp_path):
    convert_folder(root / "models" / "esm2" / "tests" / "golden", tmp_path / "te", "te")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "te")
    tokenizer.add_tokens(["J"])
    tokenizer.save_pretrained(tmp_path / "te")
    describe(tmp_path / "te")
    weights = read_json(tmp_path / "te" / "1_WordWeights" / "config.json")
    assert weights["word_weights"] == {"<cls>": 0.0, "<eos>": 0.0}
    assert weights["unknown_word_weight"] == 1.0
    assert weights["vocab"] == tokenizer.convert_ids_to_tokens(range(34))
