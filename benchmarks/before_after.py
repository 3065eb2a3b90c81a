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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import HERE, write_result

CASES = [
    "650M:300:forward", "650M:10000:forward", "650M:43000:forward", "650M:10000:training", "650M:43000:training",
    "AMPLIFY 350M:300:forward", "AMPLIFY 350M:10000:forward", "AMPLIFY 350M:43000:forward",
    "AMPLIFY 350M:43000:training", "3B:16000:forward", "8M:300:forward", "Geneformer 316M:1x2048:forward",
    "Geneformer 316M:16x2048:forward", "Geneformer 316M:8x4096:forward", "Geneformer 316M:16x2048:training",
    "Geneformer 316M:8x4096:training",
]  # fmt: skip
SIDES = ("te engine", "te engine, graph", "te engine, fp8", "te engine, fp8, graph", "torch engine")
ROUNDS, SECONDS = 5, 0.25  # turns of each checkout, and how long each one takes


def worker() -> None:
    """Answer on stdout, a line of JSON each, what stdin asks: build one side of a case, measure it, drop it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    sys.path.insert(0, os.getcwd())
    import gpu_speed
    import torch
    from common import provenance

    gpu_speed.SECONDS = SECONDS  # type: ignore[misc]
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
                answer = {"tokens": batch.tokens, "sides": list(sides)}
            elif ask == "build":
                step = sides[given]()
            elif ask == "measure":
                answer = gpu_speed.measure(step, training)
            elif ask == "drop":
                step = None
        except Exception as error:  # of one side: the others still count
            answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        torch.cuda.empty_cache()  # the other checkout needs the memory too
        print(json.dumps(answer), file=out, flush=True)


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
    """Median ratio of neighbouring turns, which share what the machine does at that time."""
    row: dict[str, Any] = {"case": case, "side": side}
    failed = [answer["error"] for one in both if (answer := one("build", side))]
    turns: list[list[float]] = [[], []]
    for _ in range(0 if failed else ROUNDS):
        for one, milliseconds in zip(both, turns, strict=True):
            found = one("measure")
            failed += [found["error"]] if "error" in found else []
            milliseconds.append(found.get("ms", float("nan")))
    for one in both:
        one("drop")
    if failed:
        return {**row, "note": failed[0]}
    ratios = [after / before for before, after in zip(*turns, strict=True)]
    before_ms, after_ms = (statistics.median(milliseconds) for milliseconds in turns)
    return {**row, "before_ms": before_ms, "after_ms": after_ms, "ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--cases", nargs="+", default=CASES, help="as of gpu_speed.py")
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    with checkouts(arguments.before.absolute()) as both:
        record: dict[str, Any] = {**both[1]("provenance"), "rows": []}
        record["command"] = "python benchmarks/before_after.py BEFORE"
        record["commit_before"] = os.environ.get("GIT_COMMIT_BEFORE", "unknown")
        for case in arguments.cases:
            offered = [one("case", case)["sides"] for one in both]
            for side in arguments.sides:
                if all(side in sides for sides in offered):
                    record["rows"].append(row_of(case, side, both))
                    row = record["rows"][-1]
                    told = (
                        row.get("note") or f"{row['before_ms']:9.2f} -> {row['after_ms']:9.2f} ms  {row['ratio']:.3f}"
                    )
                    print(f"{case:31} {side:22} {told}", flush=True)
                    write_result(arguments.output, record)  # as it goes: a run cut short keeps what it has


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
