"""Three ways to check a folder: by its golden values, by its own code, and against the original it was made of."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .convert import Conversion, locate, meta_model, own_state, read_identity, without_copies
from .files import CheckpointReader, read_json
from .mapping import MappingError, mis_shaped, some_of
from .port import TE, Json, ModelPort, installed_ports
from .runtime.verify import GOLDEN_FILE, Check, read_golden, report, verify

SAFE_VARIABLES = (  # what a folder's own code gets to see of the environment: no tokens, no home
    "PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES", "SYSTEMROOT",
)  # fmt: skip
HOW_IT_RUNS = ("engine", "layer_precision", "fp8_recipe", "quantized_weights", "cuda_graphs")
NOT_COMPARED = (*HOW_IT_RUNS, "dtype", "architectures", "auto_map", "transformers_version", "_name_or_path")


def verify_golden(folder: Path) -> list[Check]:
    """Run the folder's weights by the installed port on its golden inputs; print and return the checks.

    The folder's own code is not run. ValueError if it fails, or holds golden values of another class.
    """
    port, form, auto, config = read_identity(folder)
    if form != TE:
        raise ValueError(f"{folder} is in the {form!r} format; golden values are checked in our own")
    try:
        named = read_golden(folder / GOLDEN_FILE)[1]["auto_class"]
    except KeyError as error:
        raise ValueError(f"{folder / GOLDEN_FILE} lacks {error}") from error
    if named != auto:
        raise ValueError(f"{folder / GOLDEN_FILE} was made by {named}, but config.json names {auto}'s class")
    reader = CheckpointReader(folder)
    source, tied = _ours(port, auto, config, reader, folder)
    state = {key: reader.read([tied.get(key, key)])[0] for key in source}

    def load(auto: str, dtype: torch.dtype, **how: Any) -> Any:
        ours = port.config_class.from_dict({**config, **how})
        cls: Any = port.classes[auto]
        return cls.from_pretrained(None, config=ours, state_dict=dict(state), dtype=dtype)

    try:
        checks = verify(folder, load)
    except KeyError as error:
        raise ValueError(f"{folder / GOLDEN_FILE} lacks {error}") from error
    report(checks)
    return checks


def verify_by_its_own_code(folder: Path) -> list[Json]:
    """Run the folder's verify.py where neither biote, nor a port, nor the caller's tokens and home are to be had.

    Prints what it prints and returns its checks; ValueError if it fails.
    """
    script = folder.absolute() / "verify.py"
    if not script.is_file():
        raise FileNotFoundError(f"{script} does not exist: {folder} is not an exported folder")
    blocked = ["biote", *(port.package for port in installed_ports().values())]
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "checks.json"
        code = (
            f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); "
            f"sys.argv = ['verify.py', {str(script.parent)!r}, '--json', {str(result)!r}]; "
            f"runpy.run_path({str(script)!r}, run_name='__main__')"
        )
        environment = {name: os.environ[name] for name in SAFE_VARIABLES if name in os.environ}
        environment |= {"HOME": scratch, "HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=scratch, env=environment, capture_output=True, text=True
        )
        print(done.stdout, end="")
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"verification failed: {last_line}")
        if not result.is_file():
            raise ValueError(f"{script} ended without a report")
        return json.loads(result.read_text(encoding="utf-8"))


def compare(folder: Path, source: str, revision: str | None = None, subfolder: str | None = None) -> int:
    """Hold a folder in our layout against an original, tensor by tensor through the mapping; the number of tensors.

    One tensor is in memory at a time. Theirs are rounded to our dtype. ValueError naming what differs.
    """
    port, form, auto, config = read_identity(folder)
    original = locate(source, revision, subfolder)
    if form != TE:
        raise ValueError(f"{folder} is in the {form!r} format; what is compared is a folder in our own")
    theirs, reader = CheckpointReader(original), CheckpointReader(folder)
    conversion = Conversion(port, theirs.specs, read_json(original / "config.json"), TE, {}, str(original))
    if conversion.auto != auto:
        raise ValueError(f"{folder} is {auto}'s, {source} {conversion.auto}'s")
    specs, tied = _ours(port, auto, config, reader, folder)
    ours, expected = port.config_class.from_dict(config).to_dict(), conversion.config.to_dict()
    differing = [name for name in expected if name not in NOT_COMPARED and ours.get(name) != expected[name]]
    for key, tensor in conversion.tensors(theirs.read):
        mine = reader.read([tied.get(key, key)])[0]
        if not torch.equal(mine, tensor.to(mine.dtype)):
            differing.append(key)
    if differing:
        raise ValueError(f"{folder} differs from {source} in {some_of(differing)}")
    return len(specs)


def _ours(port: ModelPort, auto: str, config: Json, reader: CheckpointReader, folder: Path) -> tuple[Any, dict]:
    """The keys and shapes of a folder in our layout, copies left out; ValueError where they are not its class's."""
    cls = port.classes[auto]
    ours = port.config_class.from_dict(config)
    specs, tied = without_copies(reader.specs, cls, ours)
    expected = own_state(meta_model(cls, ours))
    problems = [f"missing {key}" for key in expected if key not in specs]
    problems += [f"unknown {key}" for key in specs if key not in expected]
    problems += mis_shaped(specs, expected)
    if problems:
        raise MappingError(str(folder), problems)
    return specs, {key: copy for key, copy in tied.items() if key not in reader.specs}
