"""Attention over packed tokens, with the rotation before it: cuDNN's, differentiable, and for few tokens PyTorch's.

te.DotProductAttention runs cuDNN's kernels too, but has the host choose among them at every call.
Shapes: T packed tokens, B sequences, H heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .kernels_te import refuse_create_graph, rotate_in_place
from .packing import Packing
from .rope import Rotary

try:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd
except ImportError as error:
    raise RuntimeError(f'engine="te" needs TransformerEngine 2.20 or later: {error}') from error


def cudnn_can_attend(qkv: Tensor) -> bool:
    """Whether cuDNN has a kernel for packed qkv [T, H, 3, D] of this type, size and GPU."""
    half_precision = qkv.dtype in (torch.float16, torch.bfloat16)
    size_fits = qkv.shape[-1] % 8 == 0 and qkv.shape[-1] <= 128
    return half_precision and size_fits and torch.cuda.get_device_capability(qkv.device) >= (9, 0)


def _turn(qkv: Tensor, rotary: Rotary | None) -> float:
    """Turn queries and keys in place, if at all; returns by what scores are yet to be scaled."""
    scale = qkv.shape[-1] ** -0.5
    if rotary is None:
        return scale
    rotate_in_place(qkv, rotary, scale)
    return 1.0  # the rotation has scaled the queries


def flash_attention(qkv: Tensor, rotary: Rotary | None, packing: Packing) -> Tensor:
    """As `cudnn_attention`, without gradient or dropout; no row of qkv lies past the last sequence.

    Two kernels where cuDNN takes seven: faster below a few thousand tokens.
    """
    qkv = qkv.contiguous()
    scale = _turn(qkv, rotary)
    q, k, v = qkv.unbind(2)
    bounds, longest = packing.cu_seqlens, packing.max_seqlen
    context = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)
    assert isinstance(context, Tensor)  # a tuple only if more were asked for
    return context


def cudnn_attention(qkv: Tensor, rotary: Rotary | None, packing: Packing, dropout: float) -> Tensor:
    """qkv [T, H, 3, D], which is overwritten -> attention within each sequence [T, H, D], zero past the last one.

    Scores are scaled by D^-0.5.
    """
    return _Attention.apply(qkv.contiguous(), rotary, packing, dropout)


class _Attention(torch.autograd.Function):
    """Works in place on qkv, the output of a projection that nothing else reads, and on its gradient.

    Autograd is not told (mark_dirty): the projection's own backward does not need its output.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Rotary | None, packing: Packing, dropout: float) -> Tensor:
        scale = _turn(qkv, rotary)
        ctx.how = {
            "max_seqlen_q": packing.max_seqlen, "max_seqlen_kv": packing.max_seqlen,
            "cu_seqlens_q": packing.cu_seqlens, "cu_seqlens_kv": packing.cu_seqlens,
            "cu_seqlens_q_padded": packing.cu_seqlens, "cu_seqlens_kv_padded": packing.cu_seqlens,
            "fake_dtype": qkv.dtype, "fused_attention_backend": FusedAttnBackend["F16_arbitrary_seqlen"],
            "attn_scale": scale, "dropout": dropout, "qkv_layout": "th3d", "o_format": "thd",
            "attn_mask_type": "padding",
        }  # fmt: skip
        q, k, v = qkv.unbind(2)
        differentiable = ctx.needs_input_grad[0]
        context, saved = fused_attn_fwd(is_training=differentiable or dropout > 0, q=q, k=k, v=v, **ctx.how)
        if differentiable:
            ctx.rotary = rotary  # angles, which have no gradient
            ctx.save_for_backward(qkv, context, *saved)
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor) -> Any:
        refuse_create_graph()
        qkv, context, *saved = ctx.saved_tensors
        q, k, v = qkv.unbind(2)
        grad_q, *_ = fused_attn_bwd(
            q=q, k=k, v=v, o=context, d_o=grad_context.contiguous(), aux_ctx_tensors=saved,
            do_format="thd", dqkv_layout="th3d", **ctx.how,
        )  # fmt: skip
        grad = grad_q.as_strided(qkv.shape, qkv.stride())  # the three gradients lie together, as qkv does
        if ctx.rotary is not None:
            rotate_in_place(grad, ctx.rotary, qkv.shape[-1] ** -0.5, backward=True)
        return grad, None, None, None
