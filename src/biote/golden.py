"""Golden values: inputs, what the original computes from them in float64, and where all of it came from."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from . import __version__
from .convert import read_identity
from .files import INDEX, CheckpointReader
from .port import Json, ModelPort
from .runtime.verify import DTYPES, GOLDEN_FILE, outputs_of, relative_l2

NOISE_DTYPES = ("float32", "bfloat16")


def capture(port: ModelPort, original: Path, file: Path, provenance: Json) -> None:
    """Run the original implementation on the port's example inputs and write the golden file.

    original: a folder in the "hf" format. provenance: what the caller knows (source, revision, seed); the original's
    class, versions and its own error at float32 and bfloat16 are added.
    """
    _, _, auto, config = read_identity(original, port.name)
    inputs = port.example_batch()
    rows = (inputs["input_ids"], inputs["attention_mask"])
    load = port.formats["hf"].load
    assert load is not None, "the hf format always has an implementation"
    noise: dict[str, dict[str, float]] = {}
    with _bare_copy(port, original, config) as folder:
        reference = outputs_of(load(folder, auto, torch.float64), *rows)
        for name in NOISE_DTYPES:
            outputs = outputs_of(load(folder, auto, DTYPES[name]), *rows)
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


@contextmanager
def _bare_copy(port: ModelPort, original: Path, config: Json) -> Iterator[Path]:
    """Nothing but the weights, and of config.json what the original's configuration has.

    Its own loader obeys more: an adapter that lies beside them, another weights file, quantisation, kernels.
    """
    config_class = port.formats["hf"].config_class
    assert config_class is not None, "the hf format always has an implementation"
    known = {field.name for field in fields(config_class)} | {"model_type", "num_labels", "rope_parameters"}
    reader = CheckpointReader(original)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file in {*(file for file, _ in reader.places.values()), original / INDEX}:
            if file.is_file():
                (folder / file.name).symlink_to(file.absolute())
        text = json.dumps({key: value for key, value in config.items() if key in known})
        (folder / "config.json").write_text(text, encoding="utf-8")
        yield folder


__all__ = ["GOLDEN_FILE", "capture"]
