"""Biological foundation models as HuggingFace PreTrainedModels on TransformerEngine layers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apps.embed import embed
    from .loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "embed", "load"]


def __getattr__(name: str) -> Any:
    """Import a job when it is asked for: torch and transformers take seconds."""
    if name == "embed":
        from .apps.embed import embed

        return embed
    if name == "load":
        from .loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
