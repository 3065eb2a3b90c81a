"""What an engine owes a block: the one contract of `layers_torch` and `layers_te`.

Products are modules, each a plain Wx + b, so that adapters, optimisers, quantisers, hooks and sharding treat them as
anyone's. What lies between products are functions of the modules beside them: there an engine may fuse (sum and norm,
norm and quantisation, activation and quantisation, rotation in place), but only while those modules are `untouched`.
Shapes: T packed tokens, H heads, D head dim, N features.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .packing import Packing
from .rope import Rotary


class Layers(ABC):
    """The products of one engine, and what it does between them."""

    @abstractmethod
    def linear(self, in_features: int, out_features: int, bias: bool, quantised: bool) -> nn.Module:
        """A product, [T, in] -> [T, out]: nn.Linear, or in quantised layers one with the same parameters."""

    @abstractmethod
    def add_norm(
        self, norm: nn.Module, x: Tensor, delta: Tensor | None, post_norm: bool, into: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [T, N], delta [T, N] or None -> (stream, norm(x + delta)).

        The stream is the sum, or if post_norm the norm. into: the product that alone reads the norm; an engine may
        quantise on its behalf.
        """

    @abstractmethod
    def activate(self, x: Tensor, activation: str, into: nn.Module) -> Tensor:
        """x [T, N] -> activation(x), see `activations.py`; into: as in `add_norm`."""

    @abstractmethod
    def attend(
        self, qkv: Tensor, made_by: nn.Module, rotary: Rotary | None, packing: Packing, dropout: float
    ) -> Tensor:
        """qkv [T, H, 3, D] -> rotary softmax attention within each sequence, [T, H, D], scores scaled by D^-0.5.

        Zero for rows past the last sequence, which quantised products add. made_by: the product whose output qkv is;
        an engine may overwrite it.
        """


def untouched(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, and nobody wraps, parametrises or hooks it.

    A parametrised module has a class of its own; pruning and weight norm are hooks; offloading replaces `forward`;
    global hooks touch every module.
    """
    return type(module) in classes and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )
