"""Speed of this checkout beside another one's, taking turns on one GPU: is anything slower than it was?

`python benchmarks/before_after.py BEFORE --output RESULT.json`, BEFORE being a folder with the other checkout. Each is
installed into a folder of its own and measured in a process of its own, by its own `gpu_speed.py`. A ratio is after
over before: above 1 it got slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from common import HERE, write_result

EAGER, GRAPH, FP8, FP8_GRAPH = "te engine", "te engine, graph", "te engine, fp8", "te engine, fp8, graph"
TORCH = "torch engine"
CASES = {  # of docs/performance.md, and the torch engine where it is likely to be taken
    "650M:300:forward": (GRAPH, EAGER, FP8_GRAPH, TORCH),
    "650M:10000:forward": (GRAPH, FP8_GRAPH, EAGER, FP8, TORCH),
    "650M:43000:forward": (EAGER, FP8, TORCH),
    "650M:10000:training": (EAGER, FP8, TORCH),
    "650M:43000:training": (EAGER, FP8),
    "3B:16000:forward": (FP8, FP8_GRAPH),
    "8M:300:forward": (GRAPH, EAGER),
    "AMPLIFY 350M:300:forward": (GRAPH, EAGER),
    "AMPLIFY 350M:10000:forward": (GRAPH, EAGER),
    "AMPLIFY 350M:43000:forward": (EAGER, FP8),
    "AMPLIFY 350M:43000:training": (EAGER,),
    "Geneformer 316M:1x2048:forward": (GRAPH,),
    "Geneformer 316M:16x2048:forward": (EAGER, FP8),
    "Geneformer 316M:8x4096:forward": (EAGER, FP8),
    "Geneformer 316M:16x2048:training": (EAGER,),
    "Geneformer 316M:8x4096:training": (EAGER,),
}
SECONDS_A_SIDE = 5.0  # how long each checkout is measured, in turns
TURN, MOST_TURNS, FEWEST_TURNS = 0.12, 20, 4


def worker() -> None:
    """Answer on stdout, a line of JSON each, what stdin asks: build one side of a case, measure it, drop it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    sys.path.insert(0, os.getcwd())
    import gpu_speed
    import torch
    from common import provenance

    sides: dict[str, Any] = {}
    step, training = None, False
    for line in sys.stdin:
        ask, given = json.loads(line)
        answer: Any = None
        try:
            if ask == "provenance":
                answer = {**provenance(gpu_speed.PACKAGES), "device": torch.cuda.get_device_name()}
            elif ask == "case":
                model, tokens, mode = given.split(":")
                training = mode == "training"
                batch = gpu_speed.Batch(model, tokens)
                sides = gpu_speed.sides(model, batch, training)
            elif ask == "build":
                step = sides[given]()
            elif ask == "measure":
                answer = turn(step, training)
            elif ask == "drop":
                step = None
            if ask != "measure" or torch.cuda.memory_reserved() > 20e9:
                torch.cuda.empty_cache()  # the other checkout needs the memory too
        except Exception as error:  # of one side: the others still count
            answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(answer), file=out, flush=True)


def turn(step: Any, training: bool) -> list[float]:
    """Milliseconds of each step, by CUDA events, for a short while."""
    import torch

    with nullcontext() if training else torch.inference_mode():
        step()  # after the other checkout had the GPU
        milliseconds: list[float] = []
        until = time.perf_counter() + TURN
        while not milliseconds or time.perf_counter() < until:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
    return milliseconds


class Checkout:
    """A worker over one checkout."""

    def __init__(self, root: Path, site: Path):
        models = sorted(str(path.parent) for path in root.glob("models/*/pyproject.toml"))
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
        ]
        subprocess.run([*install, "--target", str(site), str(root), *models], check=True)
        path = f"{site}{os.pathsep}{os.environ.get('BEFORE_AFTER_PYTHONPATH', '')}"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "before_after.py"), "--worker"], cwd=root / "benchmarks", text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def __call__(self, ask: str, given: Any = None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([ask, given]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended at {ask} {given}")
        return json.loads(line)


@contextmanager
def checkouts(before: Path) -> Iterator[tuple[Checkout, Checkout]]:
    with tempfile.TemporaryDirectory() as scratch:
        both = Checkout(before, Path(scratch) / "before"), Checkout(HERE.parent, Path(scratch) / "after")
        yield both
        for one in both:
            one.process.kill()


def row_of(case: str, side: str, both: tuple[Checkout, Checkout]) -> dict[str, Any]:
    """Medians over all steps of all turns, and how far apart those of every other turn of one checkout lie."""
    row: dict[str, Any] = {"case": case, "side": side}
    answers = [one("build", side) for one in both]
    turns: list[list[list[float]]] = [[], []]
    begun = time.perf_counter()
    while not any(isinstance(answer, dict) for answer in answers):
        answers = [one("measure") for one in both]
        for found, milliseconds in zip(turns, answers, strict=True):
            found.append(milliseconds)
        spent = time.perf_counter() - begun
        if len(turns[0]) >= MOST_TURNS or (spent > 2 * SECONDS_A_SIDE and len(turns[0]) >= FEWEST_TURNS):
            break
    for one in both:
        one("drop")
    failed = [answer["error"] for answer in answers if isinstance(answer, dict)]
    if failed:
        return {**row, "note": failed[0]}
    before, after = (_median(found[1:]) for found in turns)  # the first turn warms up
    noise = max(abs(_median(found[1::2]) / _median(found[2::2]) - 1) for found in turns)
    return {
        **row,
        "before_ms": before,
        "after_ms": after,
        "ratio": after / before,
        "noise": noise,
        "turns": len(turns[0]),
    }


def _median(turns: list[list[float]]) -> float:
    return statistics.median(milliseconds for one in turns for milliseconds in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    with checkouts(arguments.before.absolute()) as both:
        record: dict[str, Any] = {**both[1]("provenance"), "rows": []}
        record["command"] = "python benchmarks/before_after.py BEFORE"
        record["commit_before"] = os.environ.get("GIT_COMMIT_BEFORE", "unknown")
        for case in arguments.cases:
            for one in both:
                one("case", case)
            for side in CASES[case]:
                row = row_of(case, side, both)
                record["rows"].append(row)
                write_result(arguments.output, record)  # as it goes: a run cut short keeps what it has
                told = row.get("note") or "{before_ms:9.2f} -> {after_ms:9.2f} ms {ratio:7.3f} +-{noise:.3f}".format(
                    **row
                )
                print(f"{case:31} {side:22} {told}", flush=True)


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
