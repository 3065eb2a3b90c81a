"""Activation functions by the names that configurations use.

Shapes: T packed tokens, F features between the two products of a feed-forward block.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def swiglu(x: Tensor) -> Tensor:
    """x [T, 2F], gate first -> silu(gate) * value [T, F]."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, which nobody gets unasked."""
    return F.gelu(x, approximate="tanh")


# "gelu" is the erf one, as in the originals; TransformerEngine's fused GELU is the tanh one
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "swiglu": swiglu,
}
GATED = ("swiglu",)  # their input is twice as wide as their output
