"""The layers of a block from TransformerEngine: the names, arguments and parameter names of `layers_torch`.

Shapes: T packed tokens, H heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .engine import Layers
from .packing import Packing

try:
    import transformer_engine.pytorch as te
except ImportError as error:
    raise RuntimeError(f'engine="te" needs TransformerEngine: {error}') from error


def _placement() -> dict[str, Any]:
    """TE builds on "cuda" unless told; follow torch's default device (meta during from_pretrained) instead."""
    return {"device": str(torch.empty(0).device)}  # a string: TE compares it with "meta"


class _PlainState:
    """Keeps TE's `_extra_state` (fp8 histories, pickled) out of checkpoints, which hold tensors only."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class LayerNorm(_PlainState, te.LayerNorm):
    """Layer norm over the last dimension."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, **_placement())


class Linear(_PlainState, te.Linear):
    """Linear layer; in float32 PyTorch's, since TE's float32 products are TF32 whatever torch's settings say."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias, **_placement())

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.linear(x, self.weight, self.bias if self.use_bias else None)
        return super().forward(x)


class LayerNormLinear(_PlainState, te.LayerNormLinear):
    """Layer norm, then a linear layer, fused; in float32 PyTorch's, as `Linear`."""

    def __init__(self, in_features: int, out_features: int, eps: float, bias: bool = True):
        super().__init__(in_features, out_features, eps=eps, bias=bias, **_placement())

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
            return F.linear(x, self.weight, self.bias if self.use_bias else None)
        return super().forward(x)


class DotProductAttention(_PlainState, te.DotProductAttention):
    """Softmax attention within each packed sequence; queries come scaled."""

    def __init__(self, num_heads: int, head_dim: int, dropout: float):
        super().__init__(
            num_heads,
            head_dim,
            attention_dropout=dropout,
            qkv_format="thd",
            attn_mask_type="padding",
            softmax_scale=1.0,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q, k, v [T, H, D] -> [T, H * D]."""
        bounds, longest = packing.cu_seqlens, packing.max_seqlen
        return super().forward(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )


te_layers = Layers(LayerNorm, Linear, LayerNormLinear, DotProductAttention)
