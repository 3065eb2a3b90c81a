"""Rotary embedding against multiplication of complex numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from biote.runtime.rope import RotaryEmbedding, inverse_frequencies, rotate_half

T, H, D = 5, 3, 8


def turned(x: Tensor, angles: Tensor) -> np.ndarray:
    """Dimensions (i, i + D/2) of [T, H, D] as a complex number times e^(i angle), angles [T, D/2]; float64."""
    pairs = x.double().numpy()
    product = (pairs[..., : D // 2] + 1j * pairs[..., D // 2 :]) * np.exp(1j * angles.double().numpy())[:, None]
    return np.concatenate([product.real, product.imag], -1)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rotate_half_is_complex_multiplication(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, D, generator=generator, dtype=torch.float64).to(dtype)
    angles = torch.rand(T, D // 2, generator=generator, dtype=torch.float64) * 50 - 25
    out = rotate_half(x, angles.cos().float(), angles.sin().float(), scale)
    assert out.dtype == dtype
    expected = turned(x.double() * scale, angles)
    once = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0  # half precision is rounded once, at the end
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=once * 1.001, atol=3e-7 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_float64_turns_what_float32_can_hold(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, D, generator=generator, dtype=torch.float64)
    cos, sin = torch.rand(2, T, D // 2, generator=generator)
    rounded = (x * scale).float().double()
    low, high = rounded[..., : D // 2], rounded[..., D // 2 :]
    cosines, sines = cos.double()[:, None], sin.double()[:, None]
    expected = torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1)
    torch.testing.assert_close(rotate_half(x, cos, sin, scale), expected, rtol=1e-14, atol=1e-14)


def test_rotate_half_keeps_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    x, gradient = torch.randn(2, T, H, D, generator=generator, dtype=torch.float64)
    angles = torch.rand(T, D // 2, generator=generator)
    x.requires_grad_()
    rotate_half(x, angles.cos(), angles.sin(), 0.5).backward(gradient)
    np.testing.assert_allclose(x.grad.numpy(), turned(gradient * 0.5, -angles), rtol=0, atol=1e-6)  # turned back


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10000.0), (16, 10000.0), (64, 500.0)])
def test_inverse_frequencies(head_dim: int, base: float) -> None:
    found = inverse_frequencies(head_dim, base)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), [base ** (-2 * i / head_dim) for i in range(head_dim // 2)], rtol=5e-7)


def test_inverse_frequencies_under_a_default_device() -> None:
    with torch.device("meta"):
        assert inverse_frequencies(16, 10000.0).device.type == "cpu"


@pytest.mark.parametrize("positions", [torch.tensor([0, 1, 7, 1021]), torch.tensor([3], dtype=torch.int32)])
def test_angles(positions: Tensor) -> None:
    rotary = RotaryEmbedding(16, 10000.0)
    cos, sin, _ = rotary(positions)
    angles = np.outer(positions.numpy(), [10000.0 ** (-i / 8) for i in range(8)])
    assert cos.dtype == sin.dtype == torch.float32
    np.testing.assert_allclose(cos.numpy() + 1j * sin.numpy(), np.exp(1j * angles), rtol=0, atol=1e-4)


def test_angles_come_from_the_buffer() -> None:
    rotary = RotaryEmbedding(4, 10000.0)
    rotary.load_state_dict({"inv_freq": torch.tensor([0.5, 0.25])})
    assert list(rotary.state_dict()) == ["inv_freq"]
    cos, sin, _ = rotary(torch.tensor([2]))
    np.testing.assert_allclose(cos.numpy(), np.cos([[1.0, 0.5]]), rtol=1e-6)
    np.testing.assert_allclose(sin.numpy(), np.sin([[1.0, 0.5]]), rtol=1e-6)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda module: module.to(torch.float16),
    "type": lambda module: module.type(torch.bfloat16),
    "there_and_back": lambda module: module.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_frequencies_stay_float32(cast: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), RotaryEmbedding(16, 10000.0))
    exact = torch.linspace(0.1, 0.9, 8)
    model[1].load_state_dict({"inv_freq": exact})
    CASTS[cast](model)
    assert model[1].inv_freq.dtype == torch.float32
    assert torch.equal(model[1].inv_freq, exact)
    assert torch.equal(model.state_dict()["1.inv_freq"], exact)
    assert (model[0].weight.dtype == torch.float32) == (cast == "there_and_back")


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_frequencies_move_with_the_model(device: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), RotaryEmbedding(16, 10000.0)).to(device, dtype)
    assert (model[0].weight.device.type, model[0].weight.dtype) == (device, dtype)
    assert (model[1].inv_freq.device.type, model[1].inv_freq.dtype) == (device, torch.float32)
    if device != "meta":
        np.testing.assert_allclose(model[1].inv_freq.cpu().numpy(), [10 ** (-i / 2) for i in range(8)], rtol=5e-7)


def test_built_on_meta_and_filled_later() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(16, 10000.0)
    assert rotary.inv_freq.is_meta
    assert rotary.inv_freq.dtype == torch.float32
    rotary.bfloat16().to_empty(device="cpu")
    rotary.reset_parameters()
    assert rotary.inv_freq.dtype == torch.float32
    np.testing.assert_allclose(rotary.inv_freq.numpy(), [10 ** (-i / 2) for i in range(8)], rtol=5e-7)
