"""Pytest plugin: the markers of the whole repository, and the reason why a marked test cannot run here."""

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run on a GPU keep what it measured."""
    parser.addoption("--noise-json", type=Path, help="write every error that the contract measured to this file")


@pytest.fixture(scope="session")
def noise_rows(request: pytest.FixtureRequest) -> Iterator[list[dict]]:
    """Rows that tests add to, written at the end if --noise-json asks for it."""
    rows: list[dict] = []
    yield rows
    path = request.config.getoption("noise_json")
    if path and rows:
        versions = {name: version(name) for name in ("torch", "transformers", "biote")}
        record = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": rows}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(noise_table(rows), encoding="utf-8")


def noise_table(rows: list[dict]) -> str:
    """The rows as Markdown: our error over the original's, by quantity."""
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    lines = [
        "| port | class | engine | dtype | " + " | ".join(quantities) + " |",
        "|---" * (4 + len(quantities)) + "|",
    ]
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        case = tuple(row[key] for key in ("port", "class", "engine", "dtype"))
        floor = row["error_of_original"]
        ratio = f" ({row['error'] / floor:.2f} x)" if row["dtype"] != "float64" and floor else ""
        cases.setdefault(case, {})[row["quantity"]] = f"{row['error']:.1e}{ratio}"
    lines += [
        "| " + " | ".join([*case, *(found.get(q, "") for q in quantities)]) + " |" for case, found in cases.items()
    ]
    return "\n".join(lines) + "\n"


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
