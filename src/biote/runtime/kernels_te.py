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

from .rope import Rotary

NORM_BACKWARD_PROGRAMS = 528  # four for each multiprocessor of a Hopper GPU; each sums its rows' weight gradients


def refuse_create_graph() -> None:
    """RuntimeError in a backward under create_graph=True: torch would take this gradient for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError('engine="te" has no gradients of gradients (create_graph=True): use engine="torch"')


@triton.jit
def _store_fp8(at, value, inside, scale_at, amax_at):
    """Store value * scale as fp8 (E4M3) and keep the largest magnitude seen: TE's delayed scaling."""
    largest = tl.max(tl.abs(tl.where(inside, value, 0.0)), 0)
    if largest > tl.load(amax_at):  # seldom: most blocks need no atomic
        tl.atomic_max(amax_at, largest)
    tl.store(at, (value * tl.load(scale_at)).to(at.dtype.element_ty), inside)  # the conversion saturates


@triton.jit
def _add_norm_kernel(
    x_at, delta_at, weight_at, bias_at, sum_at, norm_at, fp8_at, mean_at, rstd_at, scale_at, amax_at, n, eps,
    HAS_DELTA: tl.constexpr, RMS: tl.constexpr, KEEP_SUM: tl.constexpr, KEEP_NORM: tl.constexpr,
    KEEP_STATISTICS: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_at + row * n + columns, inside, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_at + row * n + columns, inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)  # as every residual stream is, kept or not
        if KEEP_SUM:
            tl.store(sum_at + row * n + columns, rounded, inside)
        x = rounded.to(tl.float32)
    mean = 0.0 if RMS else tl.sum(x, 0) / n
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    weight = tl.load(weight_at + columns, inside, other=0.0).to(tl.float32)
    norm = centred * rstd * weight
    if not RMS:
        norm += tl.load(bias_at + columns, inside, other=0.0).to(tl.float32)
    if KEEP_NORM:
        tl.store(norm_at + row * n + columns, norm.to(dtype), inside)
    if QUANTISE:
        _store_fp8(fp8_at + row * n + columns, norm, inside, scale_at, amax_at)
    if KEEP_STATISTICS:
        if not RMS:
            tl.store(mean_at + row, mean)
        tl.store(rstd_at + row, rstd)


@triton.jit
def _add_norm_backward_kernel(
    grad_sum_at, grad_norm_at, sum_at, weight_at, mean_at, rstd_at, grad_at, weights_at, biases_at, rows, n,
    HAS_GRAD_SUM: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    weight = tl.load(weight_at + columns, inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=3):  # loads two rows ahead
        at = row * n + columns
        grad_norm = tl.load(grad_norm_at + at, inside, other=0.0).to(tl.float32)
        x = tl.load(sum_at + at, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_at + row)
        mean = 0.0 if RMS else tl.load(mean_at + row)
        unit = tl.where(inside, (x - mean) * rstd, 0.0)
        grad_weight += grad_norm * unit
        grad_bias += grad_norm
        weighted = grad_norm * weight
        through = weighted - unit * (tl.sum(weighted * unit, 0) / n)
        if not RMS:
            through -= tl.sum(weighted, 0) / n
        grad = through * rstd
        if HAS_GRAD_SUM:
            grad += tl.load(grad_sum_at + at, inside, other=0.0).to(tl.float32)
        tl.store(grad_at + at, grad.to(grad_at.dtype.element_ty), inside)
    tl.store(weights_at + program * n + columns, grad_weight, inside)
    tl.store(biases_at + program * n + columns, grad_bias, inside)


def _launch_add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    summed: Tensor | None = None, norm: Tensor | None = None, statistics: Any = None, fp8: Any = None,
) -> None:  # fmt: skip
    """From contiguous x and delta, fill whichever is given.

    summed and norm [T, N], statistics (mean, rstd), fp8 (data, scale, amax).
    """
    rows, n = x.shape
    block = triton.next_power_of_2(n)

    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor  # the kernel will not touch it

    mean, rstd = statistics or (x, x)
    data, scale, amax = fp8 or (x, x, x)
    _add_norm_kernel[(rows,)](
        x, pointer(delta), weight, pointer(bias), pointer(summed), pointer(norm), data,
        mean, rstd, scale, amax, n, eps,
        HAS_DELTA=delta is not None, RMS=bias is None, KEEP_SUM=summed is not None, KEEP_NORM=norm is not None,
        KEEP_STATISTICS=statistics is not None, QUANTISE=fp8 is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
        ctx.set_materialize_grads(False)  # a post-norm block does not use the sum, so it has no gradient
        norm = torch.empty_like(x)
        summed = None if delta is None else torch.empty_like(x)
        statistics = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
        _launch_add_norm(x, delta, weight, bias, eps, summed, norm, (statistics[0], statistics[1]))
        ctx.save_for_backward(x if summed is None else summed, weight, statistics)
        ctx.has_delta, ctx.rms = delta is not None, bias is None
        return (x.view_as(x) if summed is None else summed), norm

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor | None, grad_norm: Tensor | None) -> Any:
        refuse_create_graph()
        summed, weight, statistics = ctx.saved_tensors
        rows, n = summed.shape
        grad_norm = torch.zeros_like(summed) if grad_norm is None else grad_norm.contiguous()
        grad = torch.empty_like(summed)
        programs = min(rows, NORM_BACKWARD_PROGRAMS)
        partial = torch.empty(2, programs, n, dtype=torch.float32, device=grad.device)
        block = triton.next_power_of_2(n)
        _add_norm_backward_kernel[(programs,)](
            grad_norm if grad_sum is None else grad_sum.contiguous(), grad_norm, summed, weight, statistics[0],
            statistics[1], grad, partial[0], partial[1], rows, n,
            HAS_GRAD_SUM=grad_sum is not None, RMS=ctx.rms, BLOCK=block, num_warps=max(_warps(block) // 2, 1),
        )  # fmt: skip
        grad_weight, grad_bias = partial.sum(1).to(weight.dtype)
        return grad, grad if ctx.has_delta else None, grad_weight, None if ctx.rms else grad_bias, None


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, post: bool = False
) -> tuple[Tensor, Tensor]:
    """x [T, N], delta [T, N] or None -> (stream, norm), one pass.

    norm: layer norm of x + delta; without a bias its RMS norm. stream: the sum, or the norm if `post`.
    """
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    if not post:
        return _AddNorm.apply(x, delta, weight, bias, eps)
    if torch.is_grad_enabled():
        norm = _AddNorm.apply(x, delta, weight, bias, eps)[1]
    else:
        norm = torch.empty_like(x)
        _launch_add_norm(x, delta, weight, bias, eps, norm=norm)
    return norm, norm


def add_norm_quantised(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, quantizer: Any,
    post: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `add_norm`, the norm as TE's Float8Tensor by a delayed-scaling quantizer; no gradient."""
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    stream = torch.empty_like(x) if post or delta is not None else x
    _launch_add_norm(
        x, delta, weight, bias, eps,
        summed=None if post or delta is None else stream, norm=stream if post else None,
        fp8=(data, quantizer.scale, quantizer.amax),
    )  # fmt: skip
    return stream, quantizer.create_tensor_from_data(data.view(torch.uint8), fake_dtype=x.dtype)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


@triton.jit
def _turn_halves(at, head, heads, half, cos, sin, scale, BLOCK_D: tl.constexpr):
    """Dimensions i and i + half of each head at `at`, [BLOCK_H, 1], turn together."""
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < heads) & (d < half)
    low = tl.load(at + d, inside, other=0.0).to(tl.float32) * scale
    high = tl.load(at + half + d, inside, other=0.0).to(tl.float32) * scale
    tl.store(at + d, (low * cos - high * sin).to(at.dtype.element_ty), inside)
    tl.store(at + half + d, (high * cos + low * sin).to(at.dtype.element_ty), inside)


@triton.jit
def _turn_pairs(at, head, heads, half, cos, sin, scale, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions 2i and 2i + 1 turn together; read whole and split, so that memory is read in wide words."""
    d = tl.arange(0, 2 * BLOCK_D)[None, :]
    inside = (head < heads) & (d < 2 * half)
    x = tl.load(at + d, inside, other=0.0).to(tl.float32) * scale
    even, odd = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_D, 2)))
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    tl.store(at + d, tl.reshape(turned, (BLOCK_H, 2 * BLOCK_D)).to(at.dtype.element_ty), inside)


@triton.jit
def _rotate_kernel(
    qkv_at, cos_at, sin_at, heads, half, scale,
    PAIRS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_at + token * half + d, d < half, other=0.0)
    sin = tl.load(sin_at + token * half + d, d < half, other=0.0)
    if BACKWARD:
        sin = -sin
    query_at = qkv_at + (token * heads + head) * 6 * half  # a head's row: query, key, value, of 2 halves each
    key_at = query_at + 2 * half
    if PAIRS:
        _turn_pairs(query_at, head, heads, half, cos, sin, scale, BLOCK_H, BLOCK_D)
        _turn_pairs(key_at, head, heads, half, cos, sin, 1.0, BLOCK_H, BLOCK_D)
    else:
        _turn_halves(query_at, head, heads, half, cos, sin, scale, BLOCK_D)
        _turn_halves(key_at, head, heads, half, cos, sin, 1.0, BLOCK_D)


def rotate_in_place(qkv: Tensor, rotary: Rotary, scale: float, backward: bool = False) -> None:
    """Turn queries (times `scale`) and keys of qkv [T, H, 3, D] by their angles; `backward`: turn their gradients."""
    tokens, heads, _, _ = qkv.shape
    half = rotary.cos.shape[1]
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    _rotate_kernel[(tokens,)](
        qkv, rotary.cos, rotary.sin, heads, half, scale,
        PAIRS=rotary.pairs, BACKWARD=backward, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=_warps(block_h * block_d),
    )  # fmt: skip


ACTIVATION_BLOCK = 4096  # elements of one program


@triton.jit
def _normal_tail(magnitude, EXACT: tl.constexpr):
    """Probability that a normal variable is above `magnitude`, which is not negative.

    Not EXACT: within 1e-7, far below what bf16 resolves, by formula 7.1.26 of Abramowitz and Stegun, with a quarter
    of the instructions of erf, which would otherwise be what limits the kernel.
    """
    if EXACT:
        tail = 0.5 * (1.0 - tl.math.erf(magnitude * 0.7071067811865476))
    else:
        denominator = 0.23164190 * magnitude + 1.0
        t = tl.math.rsqrt(denominator * denominator)  # one instruction, where a division is several
        series = 0.127414796 + t * (-0.142248368 + t * (0.710706870 + t * (-0.726576013 + t * 0.530702714)))
        tail = t * series * tl.exp2(magnitude * magnitude * -0.7213475204444817)  # exp(-x^2 / 2)
    return tail


@triton.jit
def _gelu_kernel(
    x_at, out_at, scale_at, amax_at, count, EXACT: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < count, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    out = tl.maximum(x, 0.0) - magnitude * _normal_tail(magnitude, EXACT)
    if QUANTISE:
        _store_fp8(out_at + at, out, at < count, scale_at, amax_at)
    else:
        tl.store(out_at + at, out.to(out_at.dtype.element_ty), at < count)


@triton.jit
def _gelu_backward_kernel(x_at, grad_at, out_at, count, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < count, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + at, at < count, other=0.0).to(tl.float32)
    tail = _normal_tail(tl.abs(x), EXACT)
    cdf = tl.where(x > 0.0, 1.0 - tail, tail)
    pdf = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
    tl.store(out_at + at, (grad * (cdf + x * pdf)).to(out_at.dtype.element_ty), at < count)


def _launch_gelu(x: Tensor, out: Tensor, fp8: Any) -> None:
    """fp8: (scale, amax), or None."""
    scale, amax = fp8 or (x, x)  # a pointer that the kernel will not touch
    _gelu_kernel[(triton.cdiv(x.numel(), ACTIVATION_BLOCK),)](
        x, out, scale, amax, x.numel(),
        EXACT=x.dtype == torch.float32, QUANTISE=fp8 is not None, BLOCK=ACTIVATION_BLOCK, num_warps=8,
    )  # fmt: skip


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _launch_gelu(x, out, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_create_graph()
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _gelu_backward_kernel[(triton.cdiv(x.numel(), ACTIVATION_BLOCK),)](
            x, grad.contiguous(), out, x.numel(), EXACT=x.dtype == torch.float32, BLOCK=ACTIVATION_BLOCK, num_warps=8
        )
        return out


def gelu(x: Tensor) -> Tensor:
    """The exact (erf) GELU; TransformerEngine's fused one is the tanh approximation."""
    return _Gelu.apply(x)


def gelu_quantised(x: Tensor, quantizer: Any) -> Tensor:
    """As `gelu`, as TE's Float8Tensor by a delayed-scaling quantizer; no gradient."""
    x = x.contiguous()
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _launch_gelu(x, data, (quantizer.scale, quantizer.amax))
    return quantizer.create_tensor_from_data(data.view(torch.uint8), fake_dtype=x.dtype)


@triton.jit
def _relu_fp8_kernel(x_at, out_at, scale_at, amax_at, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, at < count, other=0.0).to(tl.float32)
    _store_fp8(out_at + at, tl.maximum(x, 0.0), at < count, scale_at, amax_at)


def relu_quantised(x: Tensor, quantizer: Any) -> Tensor:
    """ReLU as TE's Float8Tensor by a delayed-scaling quantizer; no gradient."""
    x = x.contiguous()
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _relu_fp8_kernel[(triton.cdiv(x.numel(), ACTIVATION_BLOCK),)](
        x, data, quantizer.scale, quantizer.amax, x.numel(), BLOCK=ACTIVATION_BLOCK, num_warps=8
    )
    return quantizer.create_tensor_from_data(data.view(torch.uint8), fake_dtype=x.dtype)


SWIGLU_BLOCK = 512  # columns of one program: little of it lies idle for any width


@triton.jit
def _swiglu_kernel(x_at, out_at, scale_at, amax_at, width, QUANTISE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_at + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
    value = tl.load(x_at + row * 2 * width + width + columns, inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value
    if QUANTISE:
        _store_fp8(out_at + row * width + columns, out, inside, scale_at, amax_at)
    else:
        tl.store(out_at + row * width + columns, out.to(out_at.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward_kernel(x_at, grad_at, out_at, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * 2 * width + columns
    gate = tl.load(x_at + at, inside, other=0.0).to(tl.float32)
    value = tl.load(x_at + at + width, inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + row * width + columns, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out_at + at, (grad * value * (sigmoid + silu * (1.0 - sigmoid))).to(out_at.dtype.element_ty), inside)
    tl.store(out_at + at + width, (grad * silu).to(out_at.dtype.element_ty), inside)


def _launch_swiglu(x: Tensor, out: Tensor, fp8: Any) -> None:
    """fp8: (scale, amax), or None."""
    scale, amax = fp8 or (x, x)  # a pointer that the kernel will not touch
    rows, width = out.shape
    _swiglu_kernel[(rows, triton.cdiv(width, SWIGLU_BLOCK))](
        x, out, scale, amax, width, QUANTISE=fp8 is not None, BLOCK=SWIGLU_BLOCK, num_warps=2
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
        _launch_swiglu(x, out, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_create_graph()
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        rows, width = grad.shape
        _swiglu_backward_kernel[(rows, triton.cdiv(width, SWIGLU_BLOCK))](
            x, grad.contiguous(), out, width, BLOCK=SWIGLU_BLOCK, num_warps=2
        )
        return out


def swiglu(x: Tensor) -> Tensor:
    """x [T, 2F], gate first -> silu(gate) * value [T, F]."""
    return _SwiGLU.apply(x)


def swiglu_quantised(x: Tensor, quantizer: Any) -> Tensor:
    """As `swiglu`, as TE's Float8Tensor by a delayed-scaling quantizer; no gradient."""
    x = x.contiguous()
    data = torch.empty(len(x), x.shape[1] // 2, dtype=torch.float8_e4m3fn, device=x.device)
    _launch_swiglu(x, data, (quantizer.scale, quantizer.amax))
    return quantizer.create_tensor_from_data(data.view(torch.uint8), fake_dtype=x.dtype)
