"""Which layers a model is built from: TransformerEngine's ("te") or plain PyTorch's ("torch")."""

import torch

from .layers import Layers

ENGINES = ("auto", "te", "torch")


def why_not_te() -> str | None:
    """Return why the te engine cannot run on this machine, or None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which TransformerEngine needs"
    try:
        import transformer_engine.pytorch  # noqa: F401
        import triton  # noqa: F401
        from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend  # noqa: F401
    except Exception as error:  # a broken install raises OSError or RuntimeError as readily as ImportError
        return f"TransformerEngine 2.20 or later, with Triton, cannot be imported ({type(error).__name__}: {error})"
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


def layers_of(engine: str) -> Layers:
    """Return the layers of an engine, "te" or "torch"."""
    # `from .x import y` is the one form of import that transformers follows in remote code
    if engine == "te":
        from .layers_te import te_layers

        return te_layers
    from .layers_torch import torch_layers

    return torch_layers
