"""Pytest plugin: the markers of the whole repository, and the reason why a marked test cannot run here."""

import os

import pytest
import torch

from ..runtime.engine import why_not_te

MARKERS = {
    "gpu": "needs an NVIDIA GPU",
    "fp8": "needs a GPU with fp8 (compute capability 8.9)",
    "multi_gpu": "needs at least two GPUs",
    "hub": "needs the Hugging Face Hub; set BIOTE_HUB=1 where it can be reached",
    "slow": "takes more than a few seconds",
}


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    why_not_te()  # imports TransformerEngine first: after torch has loaded its own cuDNN, a second copy may clash


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, with its reason."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = {
        "gpu": gpus > 0,
        "fp8": gpus > 0 and torch.cuda.get_device_capability() >= (8, 9),
        "multi_gpu": gpus > 1,
        "hub": os.environ.get("BIOTE_HUB") == "1",
    }
    for item in items:
        for name, here in present.items():
            if not here and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=MARKERS[name]))
