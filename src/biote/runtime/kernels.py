"""Triton kernels of the te engine for what TransformerEngine leaves to single PyTorch operations.

Each reads and writes its tensors once, computes in float32 and has a backward; `layers_torch` holds the plain versions
they are tested against. Shapes: T packed tokens, N hidden size, H heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError(f'engine="te" needs Triton: {error}') from error

NORM_BACKWARD_PROGRAMS = (
    264  # two for each multiprocessor of a Hopper GPU; each sums the weights' gradients of its rows
)


@triton.jit
def _add_norm_kernel(
    x_at, delta_at, weight_at, bias_at, sum_at, norm_at, mean_at, rstd_at, n, eps,
    HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_at + row * n + columns, inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_at + row * n + columns, inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_at.dtype.element_ty)
        tl.store(sum_at + row * n + columns, rounded, inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 0) / n
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    weight = tl.load(weight_at + columns, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + columns, inside, other=0.0).to(tl.float32)
    tl.store(norm_at + row * n + columns, (centred * rstd * weight + bias).to(norm_at.dtype.element_ty), inside)
    tl.store(mean_at + row, mean)
    tl.store(rstd_at + row, rstd)


@triton.jit
def _add_norm_backward_kernel(
    grad_sum_at, grad_norm_at, sum_at, weight_at, mean_at, rstd_at, grad_at, weights_at, biases_at, rows, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    weight = tl.load(weight_at + columns, inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    row = program
    while row < rows:
        at = row.to(tl.int64) * n + columns
        grad_norm = tl.load(grad_norm_at + at, inside, other=0.0).to(tl.float32)
        x = tl.load(sum_at + at, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_at + row)
        unit = tl.where(inside, (x - tl.load(mean_at + row)) * rstd, 0.0)
        grad_weight += grad_norm * unit
        grad_bias += grad_norm
        weighted = grad_norm * weight
        through = weighted - tl.sum(weighted, 0) / n - unit * (tl.sum(weighted * unit, 0) / n)
        grad = tl.load(grad_sum_at + at, inside, other=0.0).to(tl.float32) + through * rstd
        tl.store(grad_at + at, grad.to(grad_at.dtype.element_ty), inside)
        row += tl.num_programs(0)
    tl.store(weights_at + program * n + columns, grad_weight, inside)
    tl.store(biases_at + program * n + columns, grad_bias, inside)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Any:
        rows, n = x.shape
        summed = x if delta is None else torch.empty_like(x)
        norm = torch.empty_like(x)
        mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(n)
        _add_norm_kernel[(rows,)](
            x, x if delta is None else delta, weight, bias, summed, norm, mean, rstd, n, eps,
            HAS_DELTA=delta is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        ctx.save_for_backward(summed, weight, mean, rstd)
        ctx.has_delta = delta is not None
        return (summed if ctx.has_delta else x.view_as(x)), norm

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, grad_norm: Tensor) -> Any:
        summed, weight, mean, rstd = ctx.saved_tensors
        rows, n = summed.shape
        grad_sum, grad_norm = grad_sum.contiguous(), grad_norm.contiguous()
        grad = torch.empty_like(summed)
        programs = min(rows, NORM_BACKWARD_PROGRAMS)
        partial = torch.empty(2, programs, n, dtype=torch.float32, device=grad.device)
        block = triton.next_power_of_2(n)
        _add_norm_backward_kernel[(programs,)](
            grad_sum, grad_norm, summed, weight, mean, rstd, grad, partial[0], partial[1], rows, n,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        grad_weight, grad_bias = partial.sum(1).to(weight.dtype)
        return grad, grad if ctx.has_delta else None, grad_weight, grad_bias, None


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, N], delta [T, N] or None -> (x + delta, its layer norm), one pass over memory."""
    return _AddNorm.apply(x.contiguous(), delta, weight, bias, eps)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


@triton.jit
def _rotate_kernel(
    qkv_at, cos_at, sin_at, heads, half, scale,
    BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < heads) & (d < half)
    cos = tl.load(cos_at + token * half + d, d < half, other=0.0)
    sin = tl.load(sin_at + token * half + d, d < half, other=0.0)
    if BACKWARD:
        sin = -sin
    for part in tl.static_range(2):  # queries, then keys
        low_at = qkv_at + ((token * heads + head) * 3 + part) * 2 * half + d
        low = tl.load(low_at, inside, other=0.0).to(tl.float32)
        high = tl.load(low_at + half, inside, other=0.0).to(tl.float32)
        if part == 0:
            low, high = low * scale, high * scale
        tl.store(low_at, (low * cos - high * sin).to(qkv_at.dtype.element_ty), inside)
        tl.store(low_at + half, (high * cos + low * sin).to(qkv_at.dtype.element_ty), inside)


def _launch_rotation(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float, backward: bool) -> None:
    half = cos.shape[1]
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    _rotate_kernel[(len(qkv),)](
        qkv, cos, sin, heads, half, scale,
        BACKWARD=backward, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=_warps(block_h * block_d),
    )  # fmt: skip


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float) -> Tensor:
        _launch_rotation(qkv, cos, sin, heads, scale, backward=False)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.scale = heads, scale
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous()  # the stack of three gradients, which nobody else holds: turned back in place
        cos, sin = ctx.saved_tensors
        _launch_rotation(grad, cos, sin, ctx.heads, ctx.scale, backward=True)
        return grad, None, None, None, None


def rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float) -> Tensor:
    """Turn queries (times `scale`) and keys of qkv [T, H * 3 * D], rows [head, (q, k, v), D], in place."""
    return _Rotate.apply(qkv, cos, sin, heads, scale)


@triton.jit
def _gelu_kernel(x_at, out_at, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < count, other=0.0).to(tl.float32)
    out = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    tl.store(out_at + at, out.to(out_at.dtype.element_ty), at < count)


@triton.jit
def _gelu_backward_kernel(x_at, grad_at, out_at, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < count, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + at, at < count, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(out_at + at, (grad * (cdf + x * pdf)).to(out_at.dtype.element_ty), at < count)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _gelu_kernel[(triton.cdiv(x.numel(), 2048),)](x, out, x.numel(), BLOCK=2048, num_warps=8)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        count = x.numel()
        _gelu_backward_kernel[(triton.cdiv(count, 2048),)](x, grad.contiguous(), out, count, BLOCK=2048, num_warps=8)
        return out


def gelu(x: Tensor) -> Tensor:
    """The exact (erf) GELU; TransformerEngine's fused one is the tanh approximation."""
    return _Gelu.apply(x)
