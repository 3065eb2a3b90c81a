"""Contacts of rows padded on either side are those that the original gives each row alone."""

import pytest
import torch
from torch import Tensor


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
