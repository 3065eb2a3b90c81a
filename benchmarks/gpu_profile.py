"""Where the time of the te engine goes on one GPU: kernels by total time, and the host, one step of a few cases."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_result
from gpu_speed import PACKAGES, WARM_UPS, Batch, forward_and_backward, ours
from torch.profiler import ProfilerActivity, profile

CASES: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("650M", "43000", False, {}),
    ("650M", "43000", False, {"layer_precision": "fp8"}),
    ("650M", "43000", True, {}),
    ("650M", "10000", True, {}),
    ("650M", "300", False, {"cuda_graphs": True}),
    ("Geneformer 316M", "16x2048", False, {}),
    ("Geneformer 316M", "16x2048", False, {"layer_precision": "fp8"}),
    ("Geneformer 316M", "16x2048", True, {}),
]
SHOWN = 24


def profiled(model: str, tokens: str, training: bool, fields: dict[str, Any]) -> dict[str, Any]:
    """Totals in milliseconds of one step, and the largest entries."""
    batch = Batch(model, tokens)
    built = ours(model, "te", **fields).train(training)
    labels = batch.packed["input_ids"]

    def step() -> None:
        if training:
            forward_and_backward(built, lambda: built(**batch.packed, labels=labels).loss)
        else:
            built(**batch.packed)

    with nullcontext() if training else torch.inference_mode():
        for _ in range(WARM_UPS):
            step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            step()
            torch.cuda.synchronize()
    events = recorded.key_averages()
    kernels = [event for event in events if event.device_type.name == "CUDA" and event.self_device_time_total]
    return {
        "model": model, "tokens": batch.tokens, "training": training, **fields,
        "gpu_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "kernels": _largest(kernels, "self_device_time_total"),
        "host": _largest(list(events), "self_cpu_time_total"),
    }  # fmt: skip


def _largest(events: list[Any], what: str) -> list[dict[str, Any]]:
    events = sorted(events, key=lambda event: -getattr(event, what))[:SHOWN]
    return [{"name": e.key[:100], "calls": e.count, "ms": round(getattr(e, what) / 1e3, 3)} for e in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    record = {**provenance(PACKAGES), "device": torch.cuda.get_device_name(), "cases": []}
    for case in CASES:
        record["cases"].append(profiled(*case))
        torch.cuda.empty_cache()
    write_result(arguments.output, record)


if __name__ == "__main__":
    main()
