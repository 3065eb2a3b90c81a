from pathlib import Path

import pytest

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
