"""Packed rows as the collators of NVIDIA's recipes make them: filled up with a mock sequence, or padded in between.

Expected is what the model gives without that padding.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

LENGTHS = (7, 4, 9)
PADDING = 1  # as the collators fill rows, whatever token that is


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 24, (length,), generator=generator) for length in LENGTHS]


def row_of(pieces: list[Tensor], bounds: list[int], device: str, **others: Any) -> dict[str, Any]:
    cu = torch.tensor([0, *bounds]).cumsum(0).int()
    batch = {"input_ids": torch.cat(pieces)[None], "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, **others}
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}


def filled_up(multiple: int, device: str) -> tuple[dict[str, Any], Tensor]:
    """With a mock sequence at the end; and which slots hold a token."""
    surplus = -sum(LENGTHS) % multiple
    keep = torch.tensor([True] * sum(LENGTHS) + [False] * surplus)
    pieces = [*sequences(), torch.full((surplus,), PADDING)]
    most = max(*LENGTHS, surplus)
    mask = keep.long()[None]
    bounds = [*LENGTHS, surplus]
    return row_of(pieces, bounds, device, attention_mask=mask, max_length_q=most, max_length_k=most), keep


def divisible(multiple: int, device: str) -> tuple[dict[str, Any], Tensor]:
    """With padding after each sequence; the mask and positions are still those of the tokens only."""
    pieces, keep = [], []
    for sequence in sequences():
        surplus = -len(sequence) % multiple
        pieces.append(F.pad(sequence, (0, surplus), value=PADDING))
        keep += [True] * len(sequence) + [False] * surplus
    padded = torch.tensor([0, *map(len, pieces)]).cumsum(0).int()
    others = {
        "cu_seq_lens_q_padded": padded, "cu_seq_lens_k_padded": padded, "max_length_q": max(LENGTHS),
        "attention_mask": torch.ones(1, sum(LENGTHS)).long(),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }  # fmt: skip
    return row_of(pieces, list(LENGTHS), device, **others), torch.tensor(keep)


@pytest.mark.parametrize("collate", [filled_up, divisible])
@pytest.mark.parametrize("multiple", [8, 32])
def test_padding_of_a_packed_row_changes_nothing(tiny, collate, multiple):
    model = tiny.model()
    batch, keep = collate(multiple, tiny.device)
    bare = row_of(sequences(), list(LENGTHS), tiny.device)
    labels = torch.full(keep.shape, 33).masked_scatter(keep, torch.cat(sequences()))  # at padding they do not count
    labels = labels[None].to(tiny.device)
    found = model(**batch, labels=labels, output_hidden_states=True)
    expected = model(**bare, labels=bare["input_ids"], output_hidden_states=True)
    assert found.logits.shape[:2] == batch["input_ids"].shape
    assert tiny.agree(found.logits[0, keep].double(), expected.logits[0].double())
    assert not found.logits[0, ~keep].any()
    assert tiny.agree(found.loss.double(), expected.loss.double())
    for mine, reference in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert tiny.agree(mine[0, keep].double(), reference[0].double())
        assert not mine[0, ~keep].any()
    gradients = []
    for output in (found, expected):
        model.zero_grad()
        output.loss.backward()
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    assert tiny.agree(*gradients)


@pytest.mark.parametrize("collate", [filled_up, divisible])
def test_a_class_for_each_real_sequence(tiny, collate):
    model = tiny.model("AutoModelForSequenceClassification", num_labels=3)
    labels = torch.tensor([2, 0, 1], device=tiny.device)
    batch, _ = collate(8, tiny.device)
    found = model(**batch, labels=labels)
    expected = model(**row_of(sequences(), list(LENGTHS), tiny.device), labels=labels)
    assert found.logits.shape == (3, 3)
    assert tiny.agree(found.logits.double(), expected.logits.double())
    assert tiny.agree(found.loss.double(), expected.loss.double())
