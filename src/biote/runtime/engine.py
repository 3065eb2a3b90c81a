"""Which implementation of the layers a model is built from: TransformerEngine's ("te") or plain PyTorch's ("torch")."""

from types import ModuleType

import torch

ENGINES = ("auto", "te", "torch")


def why_not_te() -> str | None:
    """Return why the te engine cannot run on this machine, or None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which TransformerEngine needs"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a broken install raises OSError or RuntimeError as readily as ImportError
        return f"transformer_engine cannot be imported ({type(error).__name__}: {error})"
    return None


def resolve_engine(requested: str) -> str:
    """Turn `config.engine` into "te" or "torch"; ValueError for an unknown name, RuntimeError where te cannot run."""
    if requested not in ENGINES:
        raise ValueError(f"unknown engine {requested!r}; choose one of {', '.join(ENGINES)}")
    if requested == "torch":
        return "torch"
    reason = why_not_te()
    if requested == "te" and reason:
        raise RuntimeError(f'engine="te" cannot run here: {reason}; use engine="torch" or "auto"')
    return "torch" if reason else "te"


def layers_of(engine: str) -> ModuleType:
    """Return the module that holds the layers of an engine ("te" or "torch")."""
    if engine == "te":
        from . import layers_te

        return layers_te
    from . import layers_torch

    return layers_torch
