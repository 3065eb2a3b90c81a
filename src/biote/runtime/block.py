"""The transformer block, written once over the layers of either engine.

Shapes: T packed tokens, H heads, D head dim, N hidden size (H * D), L length of one sequence.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .engine import Layers
from .packing import Packing
from .rope import rotate_half

ACTIVATIONS = {
    "gelu": F.gelu,  # erf, as the original; TE's fused GELU is the tanh one
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class SelfAttention(nn.Module):
    """Norm, fused QKV projection (rows ordered [head, (q, k, v), D]), rotary attention, output projection."""

    def __init__(self, config: Any, layers: Layers):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = layers.LayerNormLinear(config.hidden_size, 3 * config.hidden_size, eps=config.layer_norm_eps)
        self.core = layers.DotProductAttention(self.num_heads, self.head_dim, config.attention_probs_dropout_prob)
        self.proj = layers.Linear(config.hidden_size, config.hidden_size)

    def queries_keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N] -> 3 x [T, H, D]; queries are scaled by D^-0.5, queries and keys turned to their positions."""
        q, k, v = self.qkv(x).view(-1, self.num_heads, 3, self.head_dim).unbind(2)
        return rotate_half(q, *rotary, scale=self.head_dim**-0.5), rotate_half(k, *rotary), v

    def forward(self, x: Tensor, packing: Packing, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return self.proj(self.core(*self.queries_keys_values(x, rotary), packing))

    def probabilities(self, x: Tensor, packing: Packing, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The attention weights themselves, [B, H, S, S] in the caller's rows, zero where there is no token."""
        q, k, _ = self.queries_keys_values(x, rotary)
        (rows, width), device = packing.shape, x.device
        weights = q.new_zeros(rows, self.num_heads, width, width)
        slots = torch.arange(rows * width, device=device) if packing.indices is None else packing.indices
        for one, qi, ki in zip(
            slots.split(packing.lengths), q.split(packing.lengths), k.split(packing.lengths), strict=True
        ):
            row, columns = int(one[0]) // width, one % width
            scores = torch.einsum("lhd,mhd->hlm", qi, ki)
            weights[row, :, columns[:, None], columns] = scores.softmax(-1)
        return weights


class FeedForward(nn.Module):
    """Norm, up projection, activation, down projection."""

    def __init__(self, config: Any, layers: Layers):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = layers.LayerNormLinear(config.hidden_size, config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = layers.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Any, layers: Layers):
        super().__init__()
        self.attention = SelfAttention(config, layers)
        self.mlp = FeedForward(config, layers)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, packing: Packing, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[T, N] -> [T, N]."""
        x = x + F.dropout(self.attention(x, packing, rotary), self.dropout, self.training)
        return x + F.dropout(self.mlp(x), self.dropout, self.training)
