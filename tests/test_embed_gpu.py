"""Embeddings on a GPU: both engines, fp8, memory that runs out, two GPUs."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import biote
from biote.apps.embed import embed
from biote.apps.embed_files import embed_file
from biote.apps.embed_job import Job
from biote.testing.contract import randomize

pytestmark = pytest.mark.gpu
TEXTS = ["MKTAYIAKQRQISFVKSHFSRQ", "GSHMLEPQ", "ACDEFGHIKLMNPQRSTVWY" * 15, "M", "LAGVSERTIDPKQ" * 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A random ESM-2 that is wide enough for fp8, as transformers saves it."""
    from biote.port import port_named

    port = port_named("esm2")
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
    made = randomize(port.classes["AutoModel"](port.config_class(**shape, engine="torch")), 0, 0.05)
    place = tmp_path_factory.mktemp("model") / "tiny"
    made.save_pretrained(place)
    port.build_tokenizer().save_pretrained(place)  # type: ignore[misc]
    return place


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    model, _ = biote.load(folder, dtype="float64", device="cpu")
    return embed(model, TEXTS)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("engine", "dtype", "bound"),
    [("torch", "float64", 1e-9), ("torch", "float32", 1e-4), ("te", "float32", 1e-4), ("torch", "auto", 0.02),
     ("te", "auto", 0.02), ("te", "float16", 0.005), pytest.param("te", "fp8", 0.1, marks=pytest.mark.fp8)],
)  # fmt: skip
def test_each_engine_and_precision(folder, expected, engine, dtype, bound):
    model, _ = biote.load(folder, engine=engine, dtype=dtype)
    assert model.device.type == "cuda"
    assert dtype != "auto" or model.dtype == torch.bfloat16
    found = embed(model, TEXTS)
    assert off(found, expected) < bound
    np.testing.assert_array_equal(embed(model, TEXTS), found)
    pools = embed(model, TEXTS, pools=("mean", "std", "max", "cls"), layers=(1, -1), batch_tokens=128)
    assert off(pools["mean_3"], expected) < bound


@pytest.mark.fp8
def test_fp8_has_no_memory(folder):
    """Current scaling: what was embedded before makes no difference."""
    model, _ = biote.load(folder, engine="te", dtype="fp8")
    first = embed(model, TEXTS)
    embed(model, ["W" * 300, "C" * 5])
    np.testing.assert_array_equal(embed(model, TEXTS), first)


def test_memory_that_runs_out(folder, tmp_path):
    """A budget that does not fit is halved, and a protein that does not fit by itself is named."""
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("LAGVSERTIDPKQNFYMHWC", k=drawn.randint(200, 500))) for _ in range(2000)]
    model, _ = biote.load(folder, dtype="float32", engine="torch")
    plain = embed(model, texts, batch_tokens=16_384)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 3 * 10**8) / total)
    try:
        assert off(embed(model, texts, batch_tokens=10**6), plain) < 1e-5
        assert torch.cuda.max_memory_reserved() < 10**9
        fasta = tmp_path / "long.fasta"
        fasta.write_text(">short\nMKT\n>giant\n" + "LAGV" * 100_000 + "\n")
        with pytest.raises(RuntimeError, match=r"giant, 400,000 residues, does not fit .* --max-residues"):
            embed_file(Job(str(folder), fasta, str(tmp_path / "out.parquet"), dtype="float32", engine="torch"))
        cut = embed(model, ["LAGV" * 100_000], max_residues=1000)
        assert np.isfinite(cut).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.multi_gpu
def test_two_gpus_give_the_bits_of_one(biote: Any, folder, tmp_path, monkeypatch):
    drawn = random.Random(0)
    fasta = tmp_path / "proteins.fasta"
    texts = ("".join(drawn.choices("LAGVSERTIDPKQNFYMHWC", k=drawn.randint(20, 500))) for _ in range(4000))
    fasta.write_text("".join(f">p{number}\n{text}\n" for number, text in enumerate(texts)))
    for name, devices in (("one", "0"), ("two", "0,1"), ("other", "1")):
        arguments = (folder, fasta, tmp_path / f"{name}.parquet", "--devices", devices, "--batch-tokens", 256)
        status, _, error = biote("embed", *arguments)
        assert status == 0, error
    whole = (tmp_path / "one.parquet").read_bytes()
    assert (tmp_path / "two.parquet").read_bytes() == whole
    assert (tmp_path / "other.parquet").read_bytes() == whole
