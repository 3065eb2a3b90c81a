"""The transformer block, written once over the layers of either engine.

The residual stream travels as a pair (x, delta) whose sum it is: the sum is taken together with the next norm.
A post-norm model is this pre-norm block with its norms shifted by one, and the stream going on from the norm:

    post-norm   embed, norm0 | attention, +, norm1, mlp, +, norm2 | attention, +, norm3, mlp, +, norm4
    shifted     embed | norm0, attention, +, norm1, mlp, + | norm2, attention, +, norm3, mlp, + | norm4
    here        embed | attention.norm, ...,    mlp.norm, ... | attention.norm, ...          | final_norm

Shapes: T packed tokens, B batch, S padded length, H heads, D head dim, N hidden size (H * D).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .activations import GATED
from .layers import Layers
from .layers_torch import attention_weights
from .packing import Packing
from .rope import Rotary

ReadMaps = Callable[[Tensor, Tensor | None], Tensor]  # (attention maps [B, H, S, S], what it made so far) -> what now


def norm_of(config: Any) -> nn.Module:
    """The norm that a model's configuration asks for, over its hidden size."""
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.hidden_size, eps=config.layer_norm_eps)


class SelfAttention(nn.Module):
    """Norm, fused QKV projection (rows ordered [head, (q, k, v), D]), rotary attention, output projection."""

    def __init__(self, config: Any, ops: Layers, quantised: bool, norm_dropout: float):
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.ops, self.heads, self.post_norm = ops, config.num_attention_heads, config.post_norm
        self.norm_dropout, self.dropout = norm_dropout, config.attention_probs_dropout_prob
        self.norm = norm_of(config)
        self.qkv = ops.linear(hidden, 3 * hidden, bias, quantised)
        self.proj = ops.linear(hidden, hidden, bias, quantised)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        packing: Packing,
        rotary: Rotary | None,
        read_maps: ReadMaps | None,
        read: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream, and what attention adds to it, [T, N] each; what `read_maps` makes of `read` and the maps."""
        x, normed = self.ops.add_norm(self.norm, x, delta, self.post_norm, into=self.qkv)
        if self.norm_dropout and self.training:
            x = normed = F.dropout(normed, self.norm_dropout)
        qkv = self.qkv(normed).unflatten(-1, (self.heads, 3, -1))  # [T, H, 3, D]
        if read_maps is not None:  # here, where nothing else holds the maps
            read = read_maps(attention_weights(qkv, rotary, packing), read)
        dropout = self.dropout if self.training else 0.0
        context = self.ops.attend(qkv, self.qkv, rotary, packing, dropout)  # [T, H, D]
        return x, self.proj(context.flatten(1)), read


class FeedForward(nn.Module):
    """Norm, up projection, activation, down projection."""

    def __init__(self, config: Any, ops: Layers, quantised: bool):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.feed_forward_width, config.mlp_bias
        self.ops, self.activation, self.post_norm = ops, config.hidden_act, config.post_norm
        self.norm = norm_of(config)
        self.fc1 = ops.linear(hidden, 2 * width if config.hidden_act in GATED else width, bias, quantised)
        self.fc2 = ops.linear(width, hidden, bias, quantised)

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The stream, and what the layers add to it, [T, N] each."""
        x, normed = self.ops.add_norm(self.norm, x, delta, self.post_norm, into=self.fc1)
        return x, self.fc2(self.ops.activate(self.fc1(normed), self.activation, into=self.fc2))


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); or post-norm, shifted.

    norm_dropout: for the first block of a post-norm model, whose first norm is the embeddings'.
    """

    def __init__(self, config: Any, ops: Layers, quantised: bool, norm_dropout: float = 0.0):
        super().__init__()
        self.attention = SelfAttention(config, ops, quantised, norm_dropout)
        self.mlp = FeedForward(config, ops, quantised)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        packing: Packing,
        rotary: Rotary | None,
        read_maps: ReadMaps | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, delta) -> (x, delta), [T, N] each, and what `read_maps` made; delta is None before block 0.

        read: what it made so far. An argument, so that gradient checkpointing knows of it.
        """
        x, delta, read = self.attention(x, delta, packing, rotary, read_maps, read)
        x, delta = self.mlp(x, F.dropout(delta, self.dropout, self.training))
        return x, F.dropout(delta, self.dropout, self.training), read
