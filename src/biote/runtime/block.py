"""The transformer block, written once over the layers of either engine.

The residual stream travels as a pair (x, delta) whose sum it is: the sum is taken together with the next norm.
A post-norm model is this pre-norm block with its norms shifted by one, and the stream going on from the norm: the
embeddings' norm is the first block's first, a block's last norm is the next block's first, the last one is the final.
Shapes: T packed tokens, H heads, D head dim, N hidden size (H * D).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .engine import Layers
from .packing import Packing
from .rope import Rotary

# gelu is the erf one, as in the originals; TE's own fused GELU is the tanh one. swiglu gates by the first half.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu")


class SelfAttention(nn.Module):
    """Norm, fused QKV projection (rows ordered [head, (q, k, v), D]), rotary attention, output projection."""

    def __init__(self, config: Any, layers: Layers, norm_dropout: float):
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.qkv = layers.LayerNormLinear(
            hidden, 3 * hidden, eps=config.layer_norm_eps, bias=bias, rms_norm=config.rms_norm,
            return_norm=config.post_norm, norm_dropout=norm_dropout,
        )  # fmt: skip
        self.core = layers.Attention(heads, hidden // heads, config.attention_probs_dropout_prob, rope=config.rope)
        self.proj = layers.Linear(hidden, hidden, bias=bias)

    def forward(
        self, x: Tensor, delta: Tensor | None, packing: Packing, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """The stream, and what attention adds to it, [T, N] each."""
        x, qkv = self.qkv(x, delta)
        return x, self.proj(self.core(qkv, rotary, packing))

    def probabilities(self, x: Tensor, delta: Tensor | None, packing: Packing, rotary: Rotary | None) -> Tensor:
        """The attention weights themselves, [B, H, S, S] in the caller's rows, zero where there is no token."""
        q, k, _ = self.core.queries_keys_values(self.qkv(x, delta)[1], rotary)
        rows, width = packing.shape
        weights = q.new_zeros(rows, q.shape[1], width, width)
        slots = torch.arange(rows * width, device=q.device) if packing.indices is None else packing.indices
        tokens = len(slots)  # without the surplus that quantised products want
        pieces = (tensor[:tokens].split(packing.lengths) for tensor in (slots, q, k))
        for one, qi, ki in zip(*pieces, strict=True):
            row, columns = int(one[0]) // width, one % width
            scores = torch.einsum("lhd,mhd->hlm", qi, ki)
            scores = scores.softmax(-1).to(weights.dtype)  # autocast makes them float32
            weights[row, :, columns[:, None], columns] = scores
        return weights


class FeedForward(nn.Module):
    """Norm, up projection, activation, down projection."""

    def __init__(self, config: Any, layers: Layers):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.feed_forward_width, config.mlp_bias
        up = 2 * width if config.hidden_act == "swiglu" else width
        self.fc1 = layers.LayerNormLinear(
            hidden, up, eps=config.layer_norm_eps, bias=bias, rms_norm=config.rms_norm, return_norm=config.post_norm
        )
        self.fc2 = layers.ActivationLinear(width, hidden, config.hidden_act, bias=bias)

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The stream, and what the layers add to it, [T, N] each."""
        x, up = self.fc1(x, delta)
        return x, self.fc2(up)


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); or post-norm, shifted.

    norm_dropout: for the first block of a post-norm model, whose first norm is the embeddings'.
    """

    def __init__(self, config: Any, layers: Layers, norm_dropout: float = 0.0):
        super().__init__()
        self.attention = SelfAttention(config, layers, norm_dropout)
        self.mlp = FeedForward(config, layers)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self, x: Tensor, delta: Tensor | None, packing: Packing, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """(x, delta) -> (x, delta), [T, N] each; delta is None before the first block."""
        x, delta = self.attention(x, delta, packing, rotary)
        x, delta = self.mlp(x, F.dropout(delta, self.dropout, self.training))
        return x, F.dropout(delta, self.dropout, self.training)
