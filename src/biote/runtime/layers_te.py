"""The te engine: products and cuDNN attention by TransformerEngine, and our own kernels between them.

A product that is not quantised is PyTorch's, which costs the host less, and is exact in float32, where TE's is TF32
whatever torch's settings say.
Shapes: T packed tokens, H heads, D head dim, N features.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS
from .layers import untouched
from .layers_torch import TorchLayers
from .packing import Packing
from .precision import MARGIN
from .rope import Rotary

try:
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import Float8Quantizer
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager
except ImportError as error:
    raise RuntimeError(f'engine="te" needs TransformerEngine: {error}') from error

from .attention_te import cudnn_attention, cudnn_can_attend, flash_attention
from .kernels_te import add_norm, add_norm_quantised, gelu, gelu_quantised, relu_quantised, swiglu, swiglu_quantised
from .lora_te import explain_quantised_layers

KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Any], Any]]] = {  # one pass over memory each
    "gelu": (gelu, gelu_quantised),
    "relu": (F.relu, relu_quantised),
    "swiglu": (swiglu, swiglu_quantised),
}
FORWARD, BACKWARD = "scaling_fwd", "scaling_bwd"  # TE's names of the two sets of quantizers
LARGEST = {FORWARD: torch.finfo(torch.float8_e4m3fn).max, BACKWARD: torch.finfo(torch.float8_e5m2).max}
FEW_TOKENS = 2048  # up to which FlashAttention is faster than cuDNN's attention


class _AnyLinear(nn.Linear):
    """Lets a te.Linear be an nn.Linear to those who look for these (LoRA's "all-linear"), without its constructor."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class Linear(te.Linear, _AnyLinear):
    """The product of a quantised layer.

    Without TE's `_extra_state` (fp8 histories, pickled), since checkpoints hold tensors only.
    Delayed scales start from the first tensors that they are for. TE starts them at 1, where gradients vanish, and
    leaves them there in inference.
    """

    quantizers: dict[str, list]
    init_fp8_metadata: Any
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, in_features: int, out_features: int, bias: bool):
        # TE builds on "cuda" unless told; follow torch's default device (meta during from_pretrained) instead,
        # told as a string, since TE compares it with "meta"
        here = str(torch.empty(0).device)
        super().__init__(in_features, out_features, bias=bias, device=here)  # type: ignore[call-arg]
        if not bias:
            self.bias: Any = None  # where TE has an empty tensor, and nn.Linear None
        self._started: dict[str, list] = {}  # the quantizers, of each direction, whose scales have started

    def forward(self, inp: Tensor, *arguments: Any, **named: Any) -> Tensor:  # type: ignore[override]
        quantised = FP8GlobalStateManager.is_fp8_enabled()
        if quantised and not self.started(FORWARD):
            with torch.inference_mode(False):  # scales made in that mode could not be set outside of it
                self.init_fp8_metadata()
            weights = [] if self.primary_weights_in_fp8 else [self.weight]
            self._start(FORWARD, inp, *weights)
        out = super().forward(inp, *arguments, **named)
        if quantised and out.requires_grad and not self.started(BACKWARD):
            out.register_hook(partial(self._start, BACKWARD))
        return out

    def started(self, direction: str) -> bool:
        """Whether the scales of these quantizers have had their first value; new ones are made for a new recipe."""
        return self._started.get(direction) is self.quantizers[direction]

    def _start(self, direction: str, *tensors: Tensor) -> None:
        """Set delayed scales by what is about to be quantised, in TE's order: input and weight, or gradient."""
        if self.started(direction) or torch.cuda.is_current_stream_capturing():
            return
        quantizers = self.quantizers[direction]
        pairs = [pair for pair in zip(quantizers, tensors, strict=False) if isinstance(pair[0], Float8Quantizer)]
        fit = [_set_scale(quantizer, tensor, LARGEST[direction]) for quantizer, tensor in pairs]
        if all(fit):
            self._started[direction] = quantizers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        weight, quantizers = state_dict.get(f"{prefix}weight"), self.quantizers[FORWARD]
        if weight is not None and len(quantizers) and isinstance(quantizers[1], Float8Quantizer):
            _set_scale(quantizers[1], weight, LARGEST[FORWARD])  # before copying, which may quantise
        super()._load_from_state_dict(state_dict, prefix, *others)


@torch.no_grad()
def _set_scale(quantizer: Float8Quantizer, tensor: Tensor, largest: float) -> bool:
    """Set it as TE would for this tensor; False, and nothing is set, where that is all 0 or not finite."""
    found = float(torch.linalg.vector_norm(tensor, math.inf))
    if not 0 < found < math.inf:
        return False
    quantizer.scale.fill_(min(largest / found / 2**MARGIN, torch.finfo(torch.float32).max))
    return True


class TeLayers(TorchLayers):
    """As the torch engine, with what lies between untouched modules in one kernel each."""

    def linear(self, in_features: int, out_features: int, bias: bool, quantised: bool) -> nn.Module:
        if not quantised:
            return nn.Linear(in_features, out_features, bias)
        explain_quantised_layers()
        return Linear(in_features, out_features, bias)

    def add_norm(
        self, norm: Any, x: Tensor, delta: Tensor | None, post_norm: bool, into: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        if not _has_kernel(norm):
            return super().add_norm(norm, x, delta, post_norm, into)
        weight, eps = norm.weight, norm.eps
        bias = norm.bias if type(norm) is nn.LayerNorm else None
        quantizer = None if into is None else _input_quantizer(into)
        if quantizer is not None:
            return add_norm_quantised(x, delta, weight, bias, eps, quantizer, post_norm)
        return add_norm(x, delta, weight, bias, eps, post_norm)

    def activate(self, x: Tensor, activation: str, into: nn.Module) -> Tensor:
        if activation not in KERNELS:
            return ACTIVATIONS[activation](x)
        plain, quantised = KERNELS[activation]
        quantizer = _input_quantizer(into)
        return plain(x) if quantizer is None else quantised(x, quantizer)

    def attend(
        self, qkv: Tensor, made_by: nn.Module, rotary: Rotary | None, packing: Packing, dropout: float
    ) -> Tensor:
        """cuDNN's attention, or for few tokens in inference FlashAttention; PyTorch's where cuDNN has no kernel."""
        if not cudnn_can_attend(qkv):
            return super().attend(qkv, made_by, rotary, packing, dropout)
        if rotary is not None and not untouched(made_by, nn.Linear, Linear):
            qkv = qkv.clone()  # queries and keys are turned in place
        surplus = len(qkv) - len(packing.positions)  # rows that quantised products want
        if len(qkv) <= FEW_TOKENS and not (torch.is_grad_enabled() or dropout or surplus):
            return flash_attention(qkv, rotary, packing)
        return cudnn_attention(qkv, rotary, packing, dropout)


def _has_kernel(norm: Any) -> bool:
    """Whether a norm is one that our kernel computes, which reads a norm without a bias as an RMS norm."""
    if not untouched(norm, nn.LayerNorm, nn.RMSNorm) or norm.weight is None or norm.eps is None:
        return False
    return type(norm) is nn.RMSNorm or norm.bias is not None


def _input_quantizer(linear: Any) -> Float8Quantizer | None:
    """The delayed-scaling quantizer of a product's input, in inference, once its scale fits: a kernel may use it."""
    if not FP8GlobalStateManager.is_fp8_enabled() or torch.is_grad_enabled():
        return None
    if linear.training or not untouched(linear, Linear) or not linear.started(FORWARD):
        return None
    made = linear.quantizers[FORWARD]
    return made[0] if isinstance(made[0], Float8Quantizer) else None


te_layers = TeLayers()
