"""Speed of this checkout beside another one, step by step in one process on one GPU: is anything slower than before?

`python benchmarks/before_after.py BEFORE --output RESULT.json`, BEFORE being a folder with the other checkout. Both
are loaded side by side: a process of its own would differ from the next by a quarter wherever the host is the limit.
A ratio is after over before: above 1 it got slower.
"""

import argparse
import gc
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
OWN = ("biote", "esm2", "amplify", "geneformer", "gpu_speed", "common")  # packages of which each checkout has its own
EAGER, GRAPH, FP8, FP8_GRAPH = "te engine", "te engine, graph", "te engine, fp8", "te engine, fp8, graph"
TORCH = "torch engine"
CASES = {  # of docs/performance.md, and the torch engine where it is likely to be taken
    "650M:300:forward": (GRAPH, EAGER, FP8_GRAPH, TORCH),
    "650M:10000:forward": (GRAPH, FP8_GRAPH, EAGER, FP8, TORCH),
    "650M:43000:forward": (EAGER, FP8, TORCH),
    "650M:10000:training": (EAGER, FP8, TORCH),
    "650M:43000:training": (EAGER, FP8),
    "3B:16000:forward": (FP8,),
    "8M:300:forward": (GRAPH, EAGER),
    "AMPLIFY 350M:300:forward": (GRAPH, EAGER),
    "AMPLIFY 350M:10000:forward": (GRAPH, EAGER),
    "AMPLIFY 350M:43000:forward": (EAGER, FP8),
    "AMPLIFY 350M:43000:training": (EAGER,),
    "Geneformer 316M:1x2048:forward": (GRAPH, EAGER),
    "Geneformer 316M:16x2048:forward": (EAGER, FP8),
    "Geneformer 316M:8x4096:forward": (EAGER, FP8),
    "Geneformer 316M:16x2048:training": (EAGER,),
    "Geneformer 316M:8x4096:training": (EAGER,),
}
WARM_UPS = 3
SECONDS, MOST_PAIRS, FEWEST_PAIRS = 4.0, 400, 8


class Checkout:
    """The packages of one checkout, which are the imported ones while it is active."""

    def __init__(self, root: Path, site: Path):
        models = sorted(str(path.parent) for path in root.glob("models/*/pyproject.toml"))
        offline = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        install = [sys.executable, "-m", "pip", "install", *offline]
        subprocess.run([*install, "--target", str(site), str(root), *models], check=True)
        self.path = [str(site), str(root / "benchmarks")]
        self.modules: dict[str, Any] = {}

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Its `gpu_speed`."""
        sys.path[:0] = self.path
        others = _take_own()
        sys.modules.update(self.modules)
        importlib.invalidate_caches()
        try:
            yield importlib.import_module("gpu_speed")
        finally:
            self.modules = _take_own()
            sys.modules.update(others)
            del sys.path[: len(self.path)]

    def step(self, case: str, side: str) -> Callable[[], Any]:
        model, tokens, mode = case.split(":")
        with self.active() as gpu_speed:
            return gpu_speed.sides(model, gpu_speed.Batch(model, tokens), mode == "training")[side]()


def _take_own() -> dict[str, Any]:
    names = [name for name in sys.modules if name.partition(".")[0].removeprefix("biote_") in OWN]
    return {name: sys.modules.pop(name) for name in names}


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds of one step, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def row_of(case: str, side: str, both: list[Checkout]) -> dict[str, Any]:
    """Medians over steps that take turns, and how much those of every other pair differ."""
    steps = [one.step(case, side) for one in both]
    with nullcontext() if case.endswith("training") else torch.inference_mode():
        for _ in range(WARM_UPS):
            for step in steps:
                step()
        torch.cuda.synchronize()
        pairs: list[tuple[float, float]] = []
        until = time.perf_counter() + SECONDS
        while len(pairs) < FEWEST_PAIRS or (time.perf_counter() < until and len(pairs) < MOST_PAIRS):
            first = len(pairs) % 2  # each goes first as often as the other
            one, other = timed(steps[first]), timed(steps[1 - first])
            pairs.append((other, one) if first else (one, other))
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    halves = [_ratio(pairs[part::4] + pairs[part + 1 :: 4]) for part in (0, 2)]
    return {
        "case": case, "side": side, "before_ms": before, "after_ms": after, "ratio": after / before,
        "noise": abs(halves[0] - halves[1]), "pairs": len(pairs),
    }  # fmt: skip


def _ratio(pairs: list[tuple[float, float]]) -> float:
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    return after / before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    import transformer_engine.pytorch  # noqa: F401 (before torch has loaded a cuDNN of its own)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with tempfile.TemporaryDirectory() as scratch:
        both = []
        for root, name in ((arguments.before.absolute(), "before"), (HERE.parent, "after")):
            both.append(Checkout(root, Path(scratch) / name))
            CONFIG_MAPPING._extra_content.clear()  # both register the same model types
            with both[-1].active():
                common = importlib.import_module("common")
                record = common.provenance(("torch", "transformers", "transformer_engine"))
        record |= {
            "command": "python benchmarks/before_after.py BEFORE", "device": torch.cuda.get_device_name(),
            "commit_before": os.environ.get("GIT_COMMIT_BEFORE", "unknown"), "rows": [],
        }  # fmt: skip
        for case in arguments.cases:
            for side in CASES[case]:
                row = row_of(case, side, both)
                record["rows"].append(row)
                common.write_result(arguments.output, record)  # as it goes: a run cut short keeps what it has
                told = "{before_ms:9.2f} -> {after_ms:9.2f} ms {ratio:7.3f} +-{noise:.3f}  {pairs}".format(**row)
                print(f"{case:31} {side:22} {told}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
