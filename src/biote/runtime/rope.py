"""Rotary position embedding, in two conventions: dimension i turns with i + D/2 (half), or 2i with 2i + 1 (pairs).

Source: Su et al. 2021 (RoFormer).
Shapes: T packed tokens, H heads, D head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPES = ("half", "pairs", "none")


class Rotary(NamedTuple):
    """By what angles a batch's queries and keys turn: one a token and pair of dimensions."""

    cos: Tensor  # float32 [T, D/2]
    sin: Tensor
    pairs: bool  # the convention

    def padded(self, surplus: int) -> "Rotary":
        """With `surplus` more tokens, which turn queries and keys to zero."""
        rows = (0, 0, 0, surplus)
        return Rotary(F.pad(self.cos, rows), F.pad(self.sin, rows), self.pairs)


def inverse_frequencies(head_dim: int, base: float) -> Tensor:
    """base^(-2i/D) for i < D/2, float32 [D/2]."""
    return 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))


class RotaryEmbedding(nn.Module):
    """Angles of each position. `inv_freq` is part of the checkpoint: published models hold values rounded to fp16."""

    def __init__(self, head_dim: int, base: float, pairs: bool = False):
        super().__init__()
        self.head_dim, self.base, self.pairs = head_dim, base, pairs
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(head_dim // 2, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.inv_freq.is_meta:
            self.inv_freq.copy_(inverse_frequencies(self.head_dim, self.base))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Moves with the model but stays float32: bf16 frequencies would turn position 1000 by radians."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor) -> Rotary:
        """int [T] -> the angles of these positions."""
        angles = positions[:, None].float() * self.inv_freq.float()
        return Rotary(angles.cos(), angles.sin(), self.pairs)


def rotate(x: Tensor, rotary: Rotary, scale: float = 1.0) -> Tensor:
    """Turn queries or keys [T, H, D] by the angles of their tokens, times `scale`; in float32 at least."""
    turn = rotate_pairs if rotary.pairs else rotate_half
    return turn(x, rotary.cos, rotary.sin, scale)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> Tensor:
    """Turn queries or keys [T, H, D] by the angles of their tokens (cos, sin: [T, D/2]), times `scale`; in float32.

    A float64 input is rounded to float32 at this point, as transformers does: doing likewise gives the same numbers.
    """
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    dtype = x.dtype
    if dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    else:
        x = x.float()
    x = x if scale == 1.0 else x * scale
    # two casts, one for each product, so that float64 gradients add up as they do there
    first, second = x.float(), x.float()
    low, high = first.chunk(2, -1)
    low_again, high_again = second.chunk(2, -1)
    return torch.cat((low * cos - high_again * sin, high * cos + low_again * sin), -1).to(dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> Tensor:
    """As `rotate_half` for interleaved pairs; float64 stays float64."""
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    dtype = x.dtype
    x = x if dtype == torch.float64 else x.float()
    even, odd = (x * scale).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(dtype)
