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
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager
except ImportError as error:
    raise RuntimeError(f'engine="te" needs TransformerEngine: {error}') from error

from .kernels import add_norm, gelu, rotate_qkv


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
    """Linear layer: TE's where a layer is quantised, PyTorch's otherwise.

    PyTorch's costs the host less, and is exact in float32, where TE's is TF32 whatever torch's settings say.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias, **_placement())

    def forward(self, x: Tensor) -> Tensor:
        if FP8GlobalStateManager.is_fp8_enabled():
            return super().forward(x)
        return F.linear(x, self.weight, self.bias if self.use_bias else None)


class LayerNormLinear(_PlainState, te.LayerNormLinear):
    """Residual sum, layer norm and a linear layer: norm and quantisation fused by TE, or sum and norm fused here."""

    def __init__(self, in_features: int, out_features: int, eps: float, bias: bool = True):
        super().__init__(in_features, out_features, eps=eps, bias=bias, **_placement())

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and delta [T, in] -> (x + delta, the product of its norm [T, out])."""
        if FP8GlobalStateManager.is_fp8_enabled():
            x = x if delta is None else x + delta
            return x, super().forward(x)
        x, norm = add_norm(x, delta, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return x, F.linear(norm, self.weight, self.bias if self.use_bias else None)


class RotaryAttention(_PlainState, te.DotProductAttention):
    """Rotation of queries and keys in place, then TE's attention on the packed tensor [T, H, 3, D]."""

    def __init__(self, num_heads: int, head_dim: int, dropout: float):
        super().__init__(
            num_heads,
            head_dim,
            attention_dropout=dropout,
            qkv_format="thd",
            attn_mask_type="padding",
            softmax_scale=1.0,
        )
        self.num_heads, self.head_dim = num_heads, head_dim

    def queries_keys_values(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As in `layers_torch`; the three are views of one tensor."""
        q, k, v = self._rotated(qkv, rotary).unbind(2)
        return q, k, v

    def forward(self, qkv: Tensor, rotary: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        """qkv [T, H * 3 * D] -> [T, H * D]; tokens past the last sequence come out as zeros."""
        bounds, longest = packing.cu_seqlens, packing.max_seqlen
        return super().forward(
            qkv_layer=self._rotated(qkv, rotary), qkv_interleave_dim=-2, cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
            max_seqlen_q=longest, max_seqlen_kv=longest, pad_between_seqs=False,
        )  # fmt: skip

    def _rotated(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if qkv._is_view() and qkv.requires_grad:  # autograd forbids writing into a view that a custom Function made
            qkv = qkv.clone()
        rotated = rotate_qkv(qkv, *rotary, self.num_heads, self.head_dim**-0.5)
        return rotated.view(-1, self.num_heads, 3, self.head_dim)


te_layers = Layers(LayerNorm, Linear, LayerNormLinear, RotaryAttention, gelu)
