"""What peft says of quantised layers, which take plain LoRA and nothing else."""

from typing import Any


def explain_quantised_layers() -> None:
    """Make peft's refusals of TransformerEngine layers (DoRA, merging) end in what to do, where peft is installed."""
    try:
        from peft.tuners.lora import te as lora
    except ImportError:
        return
    if issubclass(lora.TeLinear, _Explained):
        return

    class TeLinear(_Explained, lora.TeLinear):
        __doc__ = lora.TeLinear.__doc__

    lora.TeLinear = TeLinear  # type: ignore[misc]


class _Explained:
    """Before peft's class in the order of inheritance."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        try:
            super().__init__(*arguments, **named)
        except ValueError as error:
            if "does not support" not in str(error):
                raise
            raise ValueError(f"{error}. {ADVICE}") from error

    def merge(self, *arguments: Any, **named: Any) -> None:
        raise NotImplementedError(f"quantised layers cannot be merged with. {ADVICE}")

    unmerge = merge


ADVICE = 'Quantised layers take plain LoRA only: for more, load in bf16 (layer_precision="bf16").'
