"""What every benchmark's result file says of the machine, the software and the command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from biote.convert import convert_model
from biote.port import Checkpoint, ModelPort, find_tag

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def provenance(packages: tuple[str, ...]) -> dict[str, Any]:
    """Where, with what and how a result was measured."""
    script, *arguments = sys.argv
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "git_commit": git_commit(),
    }


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit that was measured, marked where src/ or models/ hold changes that it lacks."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True).stdout.strip()

    if "GIT_COMMIT" in os.environ:  # measured on a copy without .git
        return os.environ["GIT_COMMIT"]
    changed = git("status", "--porcelain", "--", "../src", "../models")
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def tagged(tag: str) -> tuple[ModelPort, Checkpoint]:
    found = find_tag(tag)
    if found is None:
        raise SystemExit(f"{tag} is no tag of an installed port; see `biote list`")
    return found


def random_original(tag: str, folder: Path, seed: int) -> Path:
    """Write an original masked LM of a published shape: random weights, frequencies (if stored) rounded to fp16."""
    port, checkpoint = tagged(tag)
    torch.manual_seed(seed)
    model = port.classes["AutoModelForMaskedLM"](port.config_class(engine="torch", **checkpoint.shape))
    original = convert_model(port, model, "hf", {})
    for name, tensor in original.state_dict().items():
        if name.endswith("inv_freq"):
            tensor.copy_(tensor.half())
    original.save_pretrained(folder)
    if port.build_tokenizer is not None:
        port.build_tokenizer().save_pretrained(folder)
    return folder
