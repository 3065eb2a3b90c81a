"""Contacts: of rows padded on either side as the original gives each row alone; in little memory; with gradients."""

import copy
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from biote_esm2.esm2_te import Esm2TEConfig, Esm2TEModel


def rows_of(batch: dict[str, Tensor]) -> list[Tensor]:
    return [row[keep] for row, keep in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]


def padded(rows: list[Tensor], starts: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Each row from its start on, the rest padding."""
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, start : start + len(row)], mask[number, start : start + len(row)] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def pair(case):
    return case.pair("AutoModelForMaskedLM")


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_contacts_of_a_row_are_those_of_the_row_alone(case, pair, side, dtype):
    original, ours = pair
    rows = rows_of(case.batch("AutoModelForMaskedLM"))
    widest = max(map(len, rows)) + (4 if side == "both" else 0)
    room = [widest - len(row) for row in rows]
    starts = {"right": [0] * len(rows), "left": room, "both": [2 + space // 3 for space in room]}[side]
    ids, mask = padded(rows, starts, widest)
    with torch.no_grad():
        found = ours.predict_contacts(ids, mask.to(dtype))
        assert found.shape == (len(rows), widest - 2, widest - 2)
        for contacts, row, start in zip(found, rows, starts, strict=True):
            alone = original.predict_contacts(row[None], torch.ones(1, len(row), dtype=torch.long))[0]
            residues = slice(start, start + len(row) - 2)
            torch.testing.assert_close(contacts[residues, residues], alone, rtol=1e-9, atol=1e-11)
        if side == "right":
            torch.testing.assert_close(found, original.predict_contacts(ids, mask), rtol=1e-9, atol=1e-11)


def test_contacts_without_padding_need_no_mask(case, pair):
    original, ours = pair
    rows = torch.stack([row[:7] for row in rows_of(case.batch("AutoModelForMaskedLM")) if len(row) >= 7])
    with torch.no_grad():
        expected = original.predict_contacts(rows, torch.ones_like(rows))
        for mask in (None, torch.ones_like(rows)):
            torch.testing.assert_close(ours.predict_contacts(rows, mask), expected, rtol=1e-9, atol=1e-11)


def test_contacts_take_no_packed_rows(pair):
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        pair[1].predict_contacts(torch.tensor([[0, 5, 2, 0, 6, 2]]), cu_seq_lens_q=torch.tensor([0, 3, 6]))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that `run` held at once on the CPU, above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layers_maps_are_held_at_a_time(dtype):
    """Many layers and heads, and little else: all maps together would be 10 times one layer's."""
    heads, length = 16, 400
    config = Esm2TEConfig(
        hidden_size=32, num_hidden_layers=10, num_attention_heads=heads, intermediate_size=32, engine="torch"
    )
    model = Esm2TEModel(config).to(dtype).eval()
    tokens = torch.randint(4, 24, (1, length))
    one_layer = 4 * heads * length**2  # in float32, which sums are made in

    def predict() -> Tensor:
        with torch.no_grad():
            return model.predict_contacts(tokens)

    assert one_layer < peak_bytes(predict) < 2.2 * one_layer


def test_contacts_have_gradients(case, pair):
    original, ours = pair
    batch = case.batch("AutoModelForMaskedLM")
    keep = batch["attention_mask"][:, 2:, None] * batch["attention_mask"][:, None, 2:]
    found = []
    for model in (original, ours):
        model.zero_grad()
        contacts = model.predict_contacts(batch["input_ids"], batch["attention_mask"])
        (contacts.square() * keep).sum().backward()
        words = model.get_input_embeddings().weight.grad
        encoder = model.base_model.contact_head.regression
        found.append((contacts, words, encoder.weight.grad, encoder.bias.grad))
    for mine, reference in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-9)


def test_autocast_and_low_dtypes_sum_in_float32(case, pair):
    original, ours = pair
    batch = case.batch("AutoModelForMaskedLM")
    rows = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        exact = original.predict_contacts(*rows)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = copy.deepcopy(ours).float().predict_contacts(*rows)
        low = copy.deepcopy(ours).to(torch.bfloat16).predict_contacts(*rows)
    for found in (under_autocast, low):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 0.01
