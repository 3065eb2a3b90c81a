"""The layers of a block in plain PyTorch: the names, arguments and parameter names of `layers_te`, on any device.

Shapes: T packed tokens, H heads, D head dim, L length of one sequence.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from .engine import Layers
from .packing import Packing
from .rope import Rotary, rotate_half, rotate_pairs

LayerNorm = nn.LayerNorm
RMSNorm = nn.RMSNorm
Linear = nn.Linear


class LayerNormLinear(nn.Module):
    """Residual sum, layer norm (or RMS norm) and a linear layer, in one module, as TransformerEngine fuses them.

    return_norm: the residual stream goes on from the norm, as in post-norm models, instead of from the sum.
    norm_dropout: probability of dropping a feature of the norm, for the stream and for the linear layer.
    """

    def __init__(
        self, in_features: int, out_features: int, eps: float, bias: bool = True, rms_norm: bool = False,
        return_norm: bool = False, norm_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.eps, self.return_norm, self.norm_dropout = eps, return_norm, norm_dropout
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features))
        self.layer_norm_bias = None if rms_norm else nn.Parameter(torch.zeros(in_features))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and delta [T, in] -> (x + delta, or its norm; the product of the norm [T, out])."""
        x = x if delta is None else x + delta
        if self.layer_norm_bias is None:
            norm = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        else:
            norm = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        norm = F.dropout(norm, self.norm_dropout, self.training)
        return norm if self.return_norm else x, F.linear(norm, self.weight, self.bias)


def activate(x: Tensor, activation: str) -> Tensor:
    """x [T, F] -> [T, F]; for "swiglu" x [T, 2F], gate first -> [T, F]."""
    if activation == "swiglu":
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class ActivationLinear(nn.Module):
    """Activation, then a linear layer. No nn.Linear, which LoRA and the like would wrap without the activation."""

    def __init__(self, in_features: int, out_features: int, activation: str, bias: bool = True):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in], or [T, 2 * in] for a gated activation -> [T, out]."""
        return F.linear(activate(x, self.activation), self.weight, self.bias)


class Attention(nn.Module):
    """Rotation of queries and keys to their positions, then softmax attention within each packed sequence.

    rope: how positions turn queries and keys, see `rope.py`: "half", "pairs", or "none" where they do not.
    """

    def __init__(self, num_heads: int, head_dim: int, dropout: float, rope: str = "half"):
        super().__init__()
        self.num_heads, self.head_dim, self.dropout, self.rope = num_heads, head_dim, dropout, rope

    def queries_keys_values(self, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, H * 3 * D], rows [head, (q, k, v), D] -> 3 x [T, H, D]; queries times D^-0.5, both turned."""
        q, k, v = qkv.view(-1, self.num_heads, 3, self.head_dim).unbind(2)
        scale = self.head_dim**-0.5
        if rotary is None:
            return q * scale, k, v
        rotate = rotate_pairs if self.rope == "pairs" else rotate_half
        return rotate(q, *rotary, scale=scale), rotate(k, *rotary), v

    def forward(self, qkv: Tensor, rotary: Rotary | None, packing: Packing) -> Tensor:
        """qkv [T, H * 3 * D] -> [T, H * D]; zero for rows past the packed tokens, which quantised products add."""
        tokens, surplus = len(packing.positions), len(qkv) - len(packing.positions)
        q, k, v = (x[:tokens] for x in self.queries_keys_values(qkv, rotary))
        return F.pad(self._attend(q, k, v, packing), (0, 0, 0, surplus))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q, k, v [T, H, D] -> [T, H * D]."""
        dropout = self.dropout if self.training else 0.0
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not dropout:
            bounds, longest = packing.cu_seqlens, packing.max_seqlen
            context = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=1.0)
            assert isinstance(context, Tensor)  # a tuple only if more were asked for
            return context.flatten(1)
        lengths = packing.lengths
        if min(lengths) == max(lengths):
            batch = (len(lengths), lengths[0])
            q, k, v = (x.unflatten(0, batch).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
            context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=1.0)
            return context.transpose(1, 2).flatten(0, 1).flatten(1)
        pieces = []
        for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            qi, ki, vi = (x.transpose(0, 1)[None] for x in one)  # [1, H, L, D]
            context = F.scaled_dot_product_attention(qi, ki, vi, dropout_p=dropout, scale=1.0)
            pieces.append(context[0].transpose(0, 1))
        return torch.cat(pieces).flatten(1)


torch_layers = Layers(LayerNorm, RMSNorm, Linear, LayerNormLinear, ActivationLinear, Attention)
