"""Golden values: inputs, what the original computes from them in float64, and where all of it came from."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from . import __version__
from .files import read_json
from .port import Json, ModelPort, identify
from .runtime.verify import DTYPES, GOLDEN_FILE, outputs_of, relative_l2

NOISE_DTYPES = ("float32", "bfloat16")


def capture(port: ModelPort, original: Path, file: Path, provenance: Json) -> None:
    """Run the original implementation on the port's example inputs and write the golden file.

    original: a folder in the "hf" format. provenance: what the caller knows (source, revision, seed); the original's
    class, versions and its own error at float32 and bfloat16 are added.
    """
    auto = identify(read_json(original / "config.json"), port.name)[2]
    inputs = port.example_batch()
    rows = (inputs["input_ids"], inputs["attention_mask"])
    load = port.formats["hf"].load
    assert load is not None, "the hf format always has an implementation"
    reference = outputs_of(load(original, auto, torch.float64), *rows)
    noise: dict[str, dict[str, float]] = {}
    for name in NOISE_DTYPES:
        outputs = outputs_of(load(original, auto, DTYPES[name]), *rows)
        noise[name] = {key: relative_l2(value, reference[key]) for key, value in outputs.items()}
    record: dict[str, Any] = {
        **provenance,
        "auto_class": auto,
        "original_class": port.formats["hf"].architectures[auto],
        "noise": noise,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "biote": __version__,
            "python": platform.python_version(),
        },
    }
    tensors = {**inputs, **reference}
    file.touch()
    mode = file.stat().st_mode  # as the umask says; safetensors lets nobody else read the file
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"provenance": json.dumps(record)})
    file.chmod(mode)


__all__ = ["GOLDEN_FILE", "capture"]
