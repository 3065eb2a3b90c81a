"""Precision of each layer: the model's dtype ("bf16"), or quantised matrix products ("fp8", "mxfp8", "nvfp4").

Weights, activations between modules, norms, attention and heads stay in the model's dtype.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

PRECISIONS = ("bf16", "fp8", "mxfp8", "nvfp4")
FP8_RECIPES = ("delayed", "current", "block")
MARGIN = 3  # delayed scales fit numbers up to 2**MARGIN times the largest seen: the next ones may be larger
TOKEN_MULTIPLE = 16  # quantised products need multiples of 8 or 16 tokens


def layer_precisions(layer_precision: str | list[str], num_layers: int) -> list[str]:
    """One word for all layers, or one each -> one each; ValueError for anything else."""
    words = [layer_precision] * num_layers if isinstance(layer_precision, str) else list(layer_precision)
    if len(words) != num_layers:
        raise ValueError(f"layer_precision has {len(words)} entries for {num_layers} layers")
    unknown = sorted({word for word in words if word not in PRECISIONS})
    if unknown:
        raise ValueError(f"unknown layer_precision {', '.join(unknown)}; choose from {', '.join(PRECISIONS)}")
    return words


def refuse_unsupported(precisions: list[str], fp8_recipe: str, engine: str) -> None:
    """RuntimeError that says why this machine cannot run what is asked for."""
    if set(precisions) <= {"bf16"}:
        return
    if engine != "te":
        raise RuntimeError(f'layer_precision={sorted(set(precisions))} needs engine="te"; this model uses {engine!r}')
    from transformer_engine.pytorch import quantization

    checks = {
        "fp8": quantization.check_fp8_block_scaling_support
        if fp8_recipe == "block"
        else quantization.check_fp8_support,
        "mxfp8": quantization.check_mxfp8_support,
        "nvfp4": quantization.check_nvfp4_support,
    }
    for precision in sorted(set(precisions) - {"bf16"}):
        possible, reason = checks[precision]()
        if not possible:
            raise RuntimeError(f"layer_precision={precision!r} cannot run on this GPU: {reason}")


def recipe_of(precision: str, fp8_recipe: str) -> Any:
    """TransformerEngine's recipe object; None for "bf16"."""
    if precision == "bf16":
        return None
    from transformer_engine.common import recipe

    if precision == "fp8":
        if fp8_recipe == "delayed":
            return recipe.DelayedScaling(margin=MARGIN)
        return recipe.Float8CurrentScaling() if fp8_recipe == "current" else recipe.Float8BlockScaling()
    return recipe.MXFP8BlockScaling() if precision == "mxfp8" else recipe.NVFP4BlockScaling()


def runs_of(precisions: list[str], fp8_recipe: str) -> list[tuple[range, Callable[[], AbstractContextManager]]]:
    """Runs of layers of one precision, each with the context to run them in."""
    runs: list[tuple[range, Callable[[], AbstractContextManager]]] = []
    start = 0
    for end in range(1, len(precisions) + 1):
        if end == len(precisions) or precisions[end] != precisions[start]:
            runs.append((range(start, end), _context(recipe_of(precisions[start], fp8_recipe))))
            start = end
    return runs


def weights_of(precision: str, config: Any) -> AbstractContextManager:
    """The context in which to build a layer: its weights quantised from the start if the configuration says so."""
    if not config.quantized_weights or precision == "bf16":
        return nullcontext()
    from transformer_engine.pytorch import quantized_model_init

    return quantized_model_init(enabled=True, recipe=recipe_of(precision, config.fp8_recipe))


def _context(recipe: Any) -> Callable[[], AbstractContextManager]:
    if recipe is None:
        return nullcontext
    from transformer_engine.pytorch import autocast

    return lambda: autocast(enabled=True, recipe=recipe)
