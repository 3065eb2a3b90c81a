import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from biote import cli
from biote.port import ModelPort, installed_ports, port_named
from biote.testing.contract import randomize

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_original() -> Path:
    """A committed tiny original checkpoint, as transformers saves it."""
    return ROOT / "models" / "esm2" / "tests" / "golden"


@pytest.fixture
def hub_cache(tmp_path, tiny_original) -> dict[str, str]:
    """Environment in which the tiny original is the Hub's facebook/esm2_t6_8M_UR50D, already downloaded."""
    repository = tmp_path / "hub" / "models--facebook--esm2_t6_8M_UR50D"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((tiny_original / name).read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def biote(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run `biote ARGUMENTS` in this process; returns (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["biote", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    transformers.logging.disable_progress_bar()  # as in a pipe
    yield call
    transformers.logging.enable_progress_bar()


@dataclass(frozen=True)
class Tiny:
    """A small model of a port, every parameter random; a batch for it; how close two ways to one result are."""

    port: ModelPort
    engine: str
    dtype: torch.dtype
    device: str
    tolerance: float  # relative L2

    def model(self, auto: str = "AutoModelForMaskedLM", **fields: Any) -> Any:
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        config = self.port.config_class(**shape, vocab_size=40, engine=self.engine, **fields)
        made = self.port.classes[auto](config)
        return randomize(made, 0, 0.2).to(self.device, self.dtype).eval()

    def batch(self) -> dict[str, Tensor]:
        """Rows of uneven length, with labels for a masked LM."""
        generator = torch.Generator().manual_seed(0)
        mask = (torch.arange(23) < torch.tensor([23, 9, 16])[:, None]).long()
        ids = torch.randint(5, 24, mask.shape, generator=generator)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        return {key: tensor.to(self.device) for key, tensor in batch.items()}

    def logits(self, model: Any) -> Tensor:
        batch = self.batch()
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()

    def agree(self, found: Tensor, expected: Tensor) -> bool:
        return float((found - expected).detach().norm() / expected.detach().norm()) < self.tolerance


PLACES = {
    "torch-float64-cpu": ("torch", torch.float64, "cpu", 1e-9),
    "torch-bfloat16-cuda": ("torch", torch.bfloat16, "cuda", 0.02),
    "te-float32-cuda": ("te", torch.float32, "cuda", 1e-4),
    "te-bfloat16-cuda": ("te", torch.bfloat16, "cuda", 0.02),
}


@pytest.fixture(params=sorted(installed_ports()))
def port(request: pytest.FixtureRequest) -> ModelPort:
    return port_named(request.param)


@pytest.fixture
def on_te(port: ModelPort) -> Tiny:
    """Every port, on the te engine in bfloat16."""
    return Tiny(port, *PLACES["te-bfloat16-cuda"])


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] if "cuda" in name else []) for name in PLACES])
def tiny(request: pytest.FixtureRequest, port: ModelPort) -> Tiny:
    """Every port, on both engines."""
    return Tiny(port, *PLACES[request.param])
