"""The te engine's Triton kernels against plain PyTorch in float64, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from biote.runtime.rope import Rotary, RotaryEmbedding

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
T, H, D = 77, 5, 24


def compare(ours, plain, inputs, dtype):
    """`ours` at `dtype` and `plain` in float64 on the same numbers: results and gradients by relative L2."""
    low = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    high = [x.detach().double().requires_grad_() for x in low]
    results, references = ours(*low), plain(*high)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).cuda() for x in references]
    total = sum((x * w.to(dtype)).sum() for x, w in zip(results, weights, strict=True))
    grads = torch.autograd.grad(total, low)
    expected = torch.autograd.grad(sum((x * w).sum() for x, w in zip(references, weights, strict=True)), high)
    for found, reference in [*zip(results, references, strict=True), *zip(grads, expected, strict=True)]:
        assert found.dtype == dtype
        error = (found.detach().double() - reference.detach()).norm() / reference.detach().norm()
        assert float(error) < TOLERANCE[dtype]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [48, 320, 1280, 5120])
def test_add_norm(dtype, width):
    from biote.runtime.kernels_te import add_norm

    def plain(x, delta, weight, bias):
        return x + delta, F.layer_norm(x + delta, (width,), weight, bias, 1e-5)

    inputs = [randn(T, width), randn(T, width) + 3, randn(width), randn(width)]
    compare(lambda *args: add_norm(*args, 1e-5), plain, inputs, dtype)
    first = [inputs[0], *inputs[2:]]
    compare(lambda x, w, b: add_norm(x, None, w, b, 1e-5), lambda x, w, b: (x, plain(x, 0 * x, w, b)[1]), first, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_norm_of_a_post_norm_block(dtype):
    from biote.runtime.kernels_te import add_norm

    def plain(x, delta, weight, bias):
        norm = F.layer_norm(x + delta, (320,), weight, bias, 1e-12)
        return norm, norm

    inputs = [randn(T, 320), randn(T, 320) + 3, randn(320), randn(320)]
    compare(lambda *args: add_norm(*args, 1e-12, post=True), plain, inputs, dtype)
    low = [x.to("cuda", dtype) for x in inputs]
    with torch.no_grad():  # another way through the kernel: the sum is not kept
        stream, norm = add_norm(*low, 1e-12, post=True)
    assert stream is norm
    assert relative(norm, plain(*(x.double() for x in low))[0]) < TOLERANCE[dtype]


def turned(qkv, rotary, scale):
    """Queries and keys turned as complex numbers, [T, H, 3, D] in float64."""
    cos, sin = rotary.cos.double(), rotary.sin.double()
    turn = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, None, None]
    factor = torch.tensor([scale, 1.0], device=qkv.device)[:, None]
    half = qkv.shape[-1] // 2
    rotated = qkv[:, :, :2]
    if rotary.pairs:
        z = torch.complex(rotated[..., ::2], rotated[..., 1::2]) * factor * turn
        rotated = torch.view_as_real(z).flatten(-2)
    else:
        z = torch.complex(rotated[..., :half], rotated[..., half:]) * factor * turn
        rotated = torch.cat((z.real, z.imag), -1)
    return torch.cat((rotated, qkv[:, :, 2:]), 2)


def relative(found, reference):
    return float((found.detach().double() - reference.detach()).norm() / reference.detach().norm())


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotation(dtype, pairs):
    from biote.runtime.kernels_te import rotate_in_place

    rotary = RotaryEmbedding(D, 10000.0, pairs).cuda()(torch.arange(T, device="cuda"))
    qkv, grad = randn(T, H, 3, D).to("cuda", dtype), randn(T + 1, H, 3, D)[1:].to("cuda", dtype)
    exact = qkv.double().requires_grad_()
    expected = turned(exact, rotary, 0.3)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    rotate_in_place(qkv, rotary, 0.3)
    rotate_in_place(grad, rotary, 0.3, backward=True)
    assert relative(qkv, expected) < TOLERANCE[dtype]
    assert relative(grad, expected_grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_attention(dtype, pairs):
    from biote.runtime.attention_te import cudnn_attention, flash_attention
    from biote.runtime.packing import Packing

    lengths, surplus = [40, 1, 30], 6
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    positions = torch.cat([torch.arange(n) for n in (*lengths, surplus)]).cuda()
    rotary = RotaryEmbedding(D, 10000.0, pairs).cuda()(positions)
    qkv = (2 * randn(T, H, 3, D)).to("cuda", dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    packing, tokens = Packing(bounds, 40, positions, (1, T), None), sum(lengths)
    found = cudnn_attention(qkv * 1, rotary, packing, 0.0)
    with torch.no_grad():
        few = Rotary(rotary.cos[:tokens], rotary.sin[:tokens], pairs)
        by_flash = flash_attention((qkv * 1)[:tokens], few, packing)
    pieces = []
    for piece in turned(exact, rotary, D**-0.5)[:tokens].split(lengths):
        q, k, v = piece.unbind(2)
        pieces.append(torch.einsum("hlm,mhd->lhd", torch.einsum("lhd,mhd->hlm", q, k).softmax(-1), v))
    expected = torch.cat(pieces)
    weights = randn(T, H, D).to("cuda", dtype)
    weights[tokens:] = 0
    found.backward(weights)
    expected.backward(weights[:tokens].double())
    assert relative(found[:tokens], expected) < TOLERANCE[dtype]
    assert relative(by_flash, expected) < TOLERANCE[dtype]
    assert not found[tokens:].any()
    assert relative(qkv.grad, exact.grad) < 2 * TOLERANCE[dtype]


def test_dropout_of_attention():
    """Values that are unit vectors show which weights cuDNN drops; the same seed drops them again."""
    from biote.runtime.attention_te import cudnn_attention
    from biote.runtime.packing import Packing

    lengths, kept = [24, 17], 0.75
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()

    def attend(qkv):
        torch.manual_seed(3)
        return cudnn_attention(qkv * 1, None, Packing(bounds, 24, positions, (1, 41), None), 1 - kept)

    qkv = randn(41, H, 3, D).to("cuda", torch.bfloat16).requires_grad_()
    units = qkv.detach().clone()
    units[:, :, 2] = torch.eye(D).cuda()[positions][:, None]
    dropped = attend(units) == 0  # [T, H, key in its sequence]
    exact = qkv.detach().double().requires_grad_()
    pieces = []
    for piece, gone in zip(exact.split(lengths), dropped.split(lengths), strict=True):
        q, k, v = piece.unbind(2)
        weights = (torch.einsum("lhd,mhd->hlm", q, k) * D**-0.5).softmax(-1)
        weights = weights.masked_fill(gone.transpose(0, 1)[:, :, : len(piece)], 0) / kept
        pieces.append(torch.einsum("hlm,mhd->lhd", weights, v))
    expected, found = torch.cat(pieces), attend(qkv)
    gone = torch.cat([each[..., :n].flatten() for each, n in zip(dropped.split(lengths), lengths, strict=True)])
    assert abs(float(gone.double().mean()) - (1 - kept)) < 0.03
    assert relative(found, expected) < 2 * TOLERANCE[torch.bfloat16]
    gradient = randn(41, H, D).to("cuda", torch.bfloat16)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert relative(qkv.grad, exact.grad) < 3 * TOLERANCE[torch.bfloat16]


@pytest.mark.fp8
def test_quantised_outputs():
    from transformer_engine.pytorch import DType, Float8Quantizer

    from biote.runtime.kernels_te import (
        add_norm,
        add_norm_quantised,
        gelu,
        gelu_quantised,
        relu_quantised,
        swiglu,
        swiglu_quantised,
    )

    x, delta = randn(T, 320).cuda().bfloat16(), randn(T, 320).cuda().bfloat16()
    weight, bias = randn(320).cuda().bfloat16(), randn(320).cuda().bfloat16()
    for plain, quantised in (
        (
            lambda: add_norm(x, delta, weight, bias, 1e-5)[1],
            lambda q: add_norm_quantised(x, delta, weight, bias, 1e-5, q)[1],
        ),
        (
            lambda: add_norm(x, delta, weight, bias, 1e-5, post=True)[1],
            lambda q: add_norm_quantised(x, delta, weight, bias, 1e-5, q, post=True)[1],
        ),
        (lambda: gelu(x), lambda q: gelu_quantised(x, q)),
        (lambda: x.relu(), lambda q: relu_quantised(x, q)),
        (lambda: swiglu(x), lambda q: swiglu_quantised(x, q)),
    ):
        scale, amax = torch.full((1,), 16.0, device="cuda"), torch.zeros(1, device="cuda")
        expected, found = plain().double(), quantised(Float8Quantizer(scale, amax, DType.kFloat8E4M3))
        assert abs(float(amax) / float(expected.abs().max()) - 1) < 0.01
        assert float((found.dequantize().double() - expected).norm() / expected.norm()) < 0.04
        found = quantised(Float8Quantizer(scale * 1000, amax, DType.kFloat8E4M3))
        assert float(found.dequantize().abs().max()) <= 448 / 16000 * 1.01, "saturates"
    streams = [
        add_norm_quantised(x, delta, weight, bias, 1e-5, Float8Quantizer(scale, amax, DType.kFloat8E4M3), post)[0]
        for post in (False, True)
    ]
    assert torch.equal(streams[0], x + delta)
    assert torch.equal(streams[1], add_norm(x, delta, weight, bias, 1e-5, post=True)[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [48, 320, 1280, 5120])
def test_add_rms_norm(dtype, width):
    from biote.runtime.kernels_te import add_norm

    def plain(x, delta, weight):
        return x + delta, F.rms_norm(x + delta, (width,), weight, 1e-5)

    inputs = [randn(T, width), randn(T, width) + 3, randn(width)]
    compare(lambda x, delta, weight: add_norm(x, delta, weight, None, 1e-5), plain, inputs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [24, 1712, 2560])
def test_swiglu(dtype, width):
    from biote.runtime.kernels_te import swiglu

    def plain(x):
        gate, value = x[:, :width], x[:, width:]
        return (gate / (1 + torch.exp(-gate)) * value,)

    compare(lambda x: (swiglu(x),), plain, [3 * randn(T, 2 * width)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gelu(dtype):
    from biote.runtime.kernels_te import gelu

    compare(lambda x: (gelu(x),), lambda x: (0.5 * x * (1 + torch.erf(x / 2**0.5)),), [3 * randn(T, 96)], dtype)
