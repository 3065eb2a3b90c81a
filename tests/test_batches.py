"""Batches by a budget of tokens: nothing is left out, nothing exceeds it, and memory that runs out halves it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biote.data.batches import Budget, SequenceTooLongError, packed, token_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=50)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(LENGTHS, st.integers(0, 100))
def test_token_batches(lengths, budget):
    batches = token_batches(lengths, budget)
    order = [place for batch in batches for place in batch]
    assert order == sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    assert all(len(batch) == 1 or sum(lengths[place] for place in batch) <= budget for batch in batches)
    for batch, following in pairwise(batches):  # no batch could have held one more
        assert sum(lengths[place] for place in [*batch, following[0]]) > budget
    assert token_batches(tuple(lengths), budget) == batches


def test_packed():
    rows = [np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([9, 10], np.int32)]
    batch = packed(rows, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["input_ids"].dtype == torch.int64
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 3, 4, 6]
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == 3


class Device:
    """One that holds so many tokens at once; `steps` are those that it did."""

    def __init__(self, lengths: list[int], holds: int):
        self.lengths, self.holds, self.steps = lengths, holds, []

    def step(self, rows: list[int]) -> list[int]:
        if sum(self.lengths[row] for row in rows) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.steps.append(rows)
        return rows


def run(device: Device, budget: Budget) -> list[int]:
    planned = token_batches(device.lengths, budget.tokens)
    done = [rows for batch in planned for rows in budget.run(batch, device.lengths, device.step)]
    assert done == device.steps
    return [row for rows in done for row in rows]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(LENGTHS, st.integers(1, 400), st.integers(60, 400))
def test_memory_that_runs_out(lengths, tokens, holds):
    """Each row is done once, longest first; the budget is halved till batches fit, and not once more."""
    device, budget = Device(lengths, holds), Budget(tokens)
    assert run(device, budget) == [row for batch in token_batches(lengths, tokens) for row in batch]
    if budget.halvings:
        assert tokens >> (budget.halvings - 1) > holds
    again = Device(lengths, holds)
    run(again, Budget(tokens))
    assert again.steps == device.steps


def test_a_budget_is_halved_once_for_all():
    device, budget = Device([8, 8, 8, 8, 4, 4, 4, 4], 20), Budget(32)
    assert run(device, budget) == list(range(8))
    assert (budget.halvings, device.steps) == (1, [[0, 1], [2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize("tokens", [1, 50, 64, 10**6])
def test_a_sequence_that_does_not_fit_is_named(tokens):
    device, budget = Device([3, 20, 40, 7], 30), Budget(tokens)
    with pytest.raises(SequenceTooLongError, match="memory for sequence 2 by itself") as stopped:
        run(device, budget)
    assert stopped.value.row == 2
    assert device.steps == []


def test_other_errors_are_not_held_for_a_lack_of_memory():
    def step(rows: list[int]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    budget = Budget(8)
    with pytest.raises(RuntimeError, match="illegal"):
        list(budget.run([0, 1], [3, 4], step))
    assert budget.halvings == 0
