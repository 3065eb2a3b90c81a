"""The layers of a block from TransformerEngine: the names, arguments and parameter names of `layers_torch`.

Shapes: T packed tokens, H heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .engine import Layers
from .layers_torch import Attention as TorchAttention
from .layers_torch import activate
from .packing import Packing
from .rope import Rotary

try:
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import Float8Quantizer
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager
except ImportError as error:
    raise RuntimeError(f'engine="te" needs TransformerEngine: {error}') from error

from .attention_te import cudnn_attention, cudnn_can_attend, flash_attention
from .kernels_te import add_norm, add_norm_quantised, gelu, gelu_quantised, relu_quantised, swiglu, swiglu_quantised

KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Any], Any]]] = {  # one pass over memory each
    "gelu": (gelu, gelu_quantised),
    "relu": (F.relu, relu_quantised),
    "swiglu": (swiglu, swiglu_quantised),
}


FEW_TOKENS = 2048


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


class RMSNorm(_PlainState, te.RMSNorm):
    """RMS norm over the last dimension."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, **_placement())


class Linear(_PlainState, te.Linear):
    """Linear layer: TE's where a layer is quantised, PyTorch's otherwise.

    PyTorch's costs the host less, and is exact in float32, where TE's is TF32 whatever torch's settings say.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias, **_placement())

    def forward(self, x: Tensor) -> Tensor:
        if _quantised():
            return super().forward(x)
        return F.linear(x, self.weight, self.bias if self.use_bias else None)

    def delayed_quantizer(self) -> Float8Quantizer | None:
        """The delayed-scaling quantizer of the input, in inference, once TE has made it: a kernel may use it."""
        if torch.is_grad_enabled() or not _quantised():
            return None
        made = self.quantizers["scaling_fwd"]
        return made[0] if len(made) and isinstance(made[0], Float8Quantizer) else None


class LayerNormLinear(Linear):
    """As in `layers_torch`. The parameters are those of TE's LayerNormLinear.

    Sum, norm and quantisation are one kernel of ours: TE's module would norm alone, at a quarter of the memory's speed
    for a hidden size of 1280 (docs/performance.md).
    """

    def __init__(
        self, in_features: int, out_features: int, eps: float, bias: bool = True, rms_norm: bool = False,
        return_norm: bool = False, norm_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=bias)
        self.eps, self.return_norm, self.norm_dropout = eps, return_norm, norm_dropout
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features))
        self.layer_norm_bias = None if rms_norm else nn.Parameter(torch.zeros(in_features))

    def forward(  # type: ignore[override]
        self, x: Tensor, delta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and delta [T, in] -> (x + delta, or its norm; the product of the norm [T, out])."""
        norm_weights = (self.layer_norm_weight, self.layer_norm_bias, self.eps)
        quantizer = None if self.training else self.delayed_quantizer()  # in training, dropout may follow the norm
        if quantizer is not None:
            stream, norm = add_norm_quantised(x, delta, *norm_weights, quantizer, self.return_norm)
            return stream, super().forward(norm)
        stream, norm = add_norm(x, delta, *norm_weights, self.return_norm)
        norm = F.dropout(norm, self.norm_dropout, self.training)
        return norm if self.return_norm else stream, super().forward(norm)


class ActivationLinear(Linear):
    """Activation, then a linear layer."""

    def __init__(self, in_features: int, out_features: int, activation: str, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in], or [T, 2 * in] for a gated activation -> [T, out]."""
        if self.activation not in KERNELS:
            return super().forward(activate(x, self.activation))
        plain, quantised = KERNELS[self.activation]
        quantizer = self.delayed_quantizer()
        return super().forward(plain(x) if quantizer is None else quantised(x, quantizer))


class Attention(TorchAttention):
    """Rotation of queries and keys, then attention by what is fastest: cuDNN, or for few tokens FlashAttention.

    As the torch engine where cuDNN has no kernel.
    """

    def forward(self, qkv: Tensor, rotary: Rotary | None, packing: Packing) -> Tensor:
        """qkv [T, H * 3 * D], which is overwritten -> [T, H * D], zero past the last sequence."""
        heads = qkv.view(-1, self.num_heads, 3, self.head_dim)
        if not cudnn_can_attend(heads):
            return super().forward(qkv, rotary, packing)
        dropout = self.dropout if self.training else 0.0
        surplus = len(qkv) - len(packing.positions)  # rows that quantised products want
        if len(qkv) <= FEW_TOKENS and not (torch.is_grad_enabled() or dropout or surplus):
            return flash_attention(heads, rotary, packing, self.rope).flatten(1)
        return cudnn_attention(heads, rotary, packing, dropout, self.rope).flatten(1)


def _quantised() -> bool:
    return FP8GlobalStateManager.is_fp8_enabled()


te_layers = Layers(LayerNorm, RMSNorm, Linear, LayerNormLinear, ActivationLinear, Attention)
