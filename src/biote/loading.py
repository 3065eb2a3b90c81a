"""`biote.load`: a model and its tokenizer, of whatever a checkpoint is."""

from pathlib import Path
from typing import Any

import torch

from .convert import load_original, locate, read_identity
from .runtime.engine import resolve_engine
from .tokenizer import tokenizer_like

TASKS = {
    "embedding": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "token-classification": "AutoModelForTokenClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
}
DTYPES = ("auto", "float64", "float32", "float16", "bfloat16", "fp8")


def load(
    source: str | Path,
    task: str | None = None,
    *,
    engine: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    port_name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> tuple[Any, Any]:
    """A port's model in eval mode, and its tokenizer; None for a tokenizer if the model reads no text.

    source: tag, Hub id, or folder in any format that a port reads, an export included; no code of it is run.
    task: one of TASKS; None for the class that the checkpoint was saved from. engine: "te", "torch" or "auto".
    dtype: None keeps the checkpoint's. "auto" does too, but on a GPU that has bfloat16 it makes float32 into that.
    "fp8": bfloat16 with matrix products in fp8, each tensor scaled by its own largest number; te engine only.
    device: None is the GPU where there is one. ValueError, FileNotFoundError, ConnectionError or RuntimeError say what
    was wrong; a head that the checkpoint lacks is an error, except a new classifier's.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    dtype = str(dtype).removeprefix("torch.") if dtype is not None else None
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if engine == "auto" and (device.type != "cuda" or dtype == "float64"):
        engine = "torch"
    fields: dict[str, Any] = {"engine": resolve_engine(engine)}
    if dtype == "fp8":
        fields |= {"layer_precision": "fp8", "fp8_recipe": "current"}
    folder = locate(source, revision, subfolder)
    port, _, auto, _ = read_identity(folder, port_name)
    auto = TASKS[task] if task else auto
    if auto not in port.classes:
        raise ValueError(f"{port.title} has no {task} class; it has {', '.join(port.classes)}")
    asked = {None: None, "auto": None, "fp8": torch.bfloat16}.get(dtype, getattr(torch, dtype or "", None))
    model: Any = load_original(
        port.classes[auto], folder, revision=None, subfolder=None, dtype=asked, device="cpu", config_kwargs=fields
    )
    if dtype == "auto" and device.type == "cuda" and model.dtype == torch.float32 and _has_bfloat16(device):
        model = model.to(torch.bfloat16)
    model = model.to(device).eval()
    if port.build_tokenizer is None:
        return model, None
    positions = model.base_model.max_positions
    return model, tokenizer_like(port.build_tokenizer, folder, model.config.vocab_size, positions)


def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
