"""The reference `modeling_amplify.py` against hand computations that share nothing with it."""

import cmath
import math

import pytest
import torch

from biote_amplify.modeling_amplify import RMSNorm, SwiGLU, rotate, rotations

AUTO = "AutoModelForMaskedLM"


def test_rotary_is_complex_multiplication():
    length, heads, head_dim = 5, 2, 6
    x = torch.randn(1, length, heads, head_dim, dtype=torch.float64)
    found = rotate(x, rotations(length, head_dim, x.device))
    for position in range(length):
        for pair in range(head_dim // 2):
            turn = cmath.exp(1j * position * 10000 ** (-2 * pair / head_dim))
            for head in range(heads):
                a, b = x[0, position, head, 2 * pair : 2 * pair + 2].tolist()
                expected = complex(a, b) * turn
                real, imaginary = found[0, position, head, 2 * pair : 2 * pair + 2].tolist()
                assert math.isclose(real, expected.real, abs_tol=1e-6)  # its table is float32, as the original's
                assert math.isclose(imaginary, expected.imag, abs_tol=1e-6)


def test_rms_norm_rounds_before_it_multiplies_by_the_weight():
    norm = RMSNorm(4, 1e-5).to(torch.bfloat16)
    x, weight = torch.tensor([1.0, -2.0, 3.0, 0.37]), torch.tensor([0.3, 1.7, -0.9, 2.1])
    norm.weight.data.copy_(weight)
    low = x.bfloat16().tolist()
    root = math.sqrt(sum(v * v for v in low) / 4 + 1e-5)
    rounded = torch.tensor([v / root for v in low]).bfloat16()
    assert torch.equal(norm(x.bfloat16()), rounded * weight.bfloat16())


def test_swiglu_gates_by_the_first_half(case):
    layer = case.make_original(AUTO, 0).transformer_encoder[0].ffn
    assert isinstance(layer, SwiGLU)
    x = torch.randn(64, dtype=torch.float64)
    both = (layer.w12.weight @ x).tolist()
    width = len(both) // 2
    hidden = [g / (1 + math.exp(-g)) * v for g, v in zip(both[:width], both[width:], strict=True)]
    torch.testing.assert_close(layer(x), layer.w3.weight @ torch.tensor(hidden, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ids", "mask"])
def test_padding_is_not_attended_to(case, kind):
    original, batch = case.make_original(AUTO, 0), case.make_batch(AUTO, 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = original(ids, attention_mask=mask).logits
    if kind == "ids":  # what stands in the padding does not matter
        other = original(torch.where(mask.bool(), ids, 9), attention_mask=mask).logits
    else:  # nor does it whether it is there
        other = torch.cat(
            [
                torch.nn.functional.pad(original(row[keep][None]).logits, (0, 0, 0, int((~keep).sum())))
                for row, keep in zip(ids, mask.bool(), strict=True)
            ]
        )
    keep = mask.bool()
    torch.testing.assert_close(other[keep], whole[keep], rtol=1e-9, atol=1e-11)


def test_one_block_by_hand(case):
    """One block, one head at a time, from the weights: scores over the root of the head's size, softmax, mix."""
    original = case.with_options(num_hidden_layers=1).make_original(AUTO, 1)
    block = original.transformer_encoder[0]
    ids = torch.tensor([[3, 17, 7, 4]])
    x = original.encoder(ids)[0]
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.attention_norm.weight
    turns = [[cmath.exp(1j * p * 10000 ** (-2 * j / 16)) for j in range(8)] for p in range(4)]
    turns = torch.tensor(turns, dtype=torch.complex128)
    context = []
    for head in range(4):
        rows = slice(16 * head, 16 * head + 16)
        q, k, v = (normed @ layer.weight[rows].T for layer in (block.q, block.k, block.v))
        q, k = (torch.complex(part[:, ::2], part[:, 1::2]) * turns for part in (q, k))
        scores = (q @ k.conj().T).real / 4
        context.append(scores.softmax(-1) @ v)
    x = x + torch.cat(context, -1) @ block.wo.weight.T
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.ffn_norm.weight
    gate, value = (normed @ block.ffn.w12.weight.T).split(64, -1)
    x = x + (gate / (1 + torch.exp(-gate)) * value) @ block.ffn.w3.weight.T
    found = original(ids, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)  # float32 angles
