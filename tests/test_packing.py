"""Padded rows to packed tokens and back, against plain Python loops."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

from biote.runtime.packing import Packing, plan_packing

MASKS = {
    "right": [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    "left": [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]],
    "holes": [[1, 0, 1, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]],
    "full": [[1, 1, 1], [1, 1, 1]],
    "one_token": [[1]],
}


def ids_like(mask: list[list[int]]) -> Tensor:
    """Token ids that are all different, 10 upwards."""
    rows, width = len(mask), len(mask[0])
    return torch.arange(10, 10 + rows * width).view(rows, width)


def check(packing: Packing, ids: Tensor, mask: list[list[int]]) -> None:
    kept = [[column for column, one in enumerate(row) if one] for row in mask]
    lengths = [len(columns) for columns in kept]
    assert packing.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == max(lengths)
    assert packing.positions.tolist() == [column - columns[0] for columns in kept for column in columns]
    assert packing.positions.dtype == torch.int64
    assert packing.lengths == lengths
    assert packing.sequence_of_token().tolist() == [row for row, n in enumerate(lengths) for _ in range(n)]
    assert packing.first_tokens.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    tokens = packing.pack(ids)
    assert tokens.tolist() == [ids[row, column].item() for row, columns in enumerate(kept) for column in columns]
    assert packing.unpack(tokens).tolist() == (ids * torch.tensor(mask)).tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MASKS)
def test_padded(case: str, dtype: torch.dtype) -> None:
    ids = ids_like(MASKS[case])
    check(plan_packing(ids, torch.tensor(MASKS[case]).to(dtype)), ids, MASKS[case])


def test_without_a_mask_every_slot_is_a_token() -> None:
    ids = ids_like(MASKS["right"])
    check(plan_packing(ids), ids, [[1] * 5] * 3)


@pytest.mark.parametrize("case", MASKS)
def test_embeddings_as_input(case: str) -> None:
    mask = torch.tensor(MASKS[case])
    x = torch.rand(*mask.shape, 2, 3)
    packing = plan_packing(x[..., 0], mask)
    assert torch.equal(packing.pack(x), x[mask.bool()])
    assert torch.equal(packing.unpack(x[mask.bool()]), x * mask[..., None, None])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data(), rows=st.integers(1, 4), width=st.integers(1, 6))
def test_any_mask(data: st.DataObject, rows: int, width: int) -> None:
    row = st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any)
    mask = data.draw(st.lists(row, min_size=rows, max_size=rows))
    ids = ids_like(mask)
    check(plan_packing(ids, torch.tensor(mask)), ids, mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("longest", [None, 3, 9, torch.tensor(3)])
@pytest.mark.parametrize("bounds", [[0, 2, 5, 6], [0, 3, 6], [0, 1, 2, 3, 4, 6]])
def test_packed(bounds: list[int], longest: Any, dtype: torch.dtype) -> None:
    ids = torch.arange(10, 16)[None]
    cu = torch.tensor(bounds, dtype=dtype)
    packing = plan_packing(ids, cu_seq_lens_q=cu, cu_seq_lens_k=cu.int(), max_length_q=longest, max_length_k=longest)
    lengths = [bounds[i + 1] - bounds[i] for i in range(len(bounds) - 1)]
    assert packing.cu_seqlens.tolist() == bounds
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == max(lengths)
    assert packing.positions.tolist() == [position for n in lengths for position in range(n)]
    assert packing.positions.dtype == torch.int64
    assert packing.lengths == lengths
    assert packing.first_tokens.tolist() == bounds[:-1]
    assert packing.pack(ids).tolist() == [10, 11, 12, 13, 14, 15]
    assert packing.unpack(packing.pack(ids)).tolist() == ids.tolist()


@pytest.mark.parametrize("first", [0, 2])
def test_flattening_collator_of_transformers(first: int) -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, position_ids_start=first)
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}, {"input_ids": [9, 10]}])
    labels = batch.pop("labels")
    packing = plan_packing(batch.pop("input_ids"), **batch)
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packing.positions.tolist() == [first + i for i in (0, 1, 2, 0, 0, 1)]
    assert packing.pack(labels).tolist() == [-100, 6, 7, -100, -100, 10]


def test_packed_with_a_mask_of_ones() -> None:
    bounds = torch.tensor([0, 2, 6])
    packing = plan_packing(torch.ones(1, 6), torch.ones(1, 6), cu_seq_lens_q=bounds)
    assert packing.lengths == [2, 4]


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([[3, 4, 5], [7, 9, 11]], [3, 5, 7, 9, 11]),
        ([[2, 3, 4]], [2, 4, 2, 3, 4]),  # one row for all
        ([[5, 1, 6], [0, 1, 2]], [5, 6, 0, 1, 2]),  # falls at padding
    ],
)
def test_position_ids_of_padded_rows(position_ids: list[list[int]], expected: list[int]) -> None:
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    packing = plan_packing(torch.zeros(2, 3).long(), mask, torch.tensor(position_ids))
    assert packing.positions.tolist() == expected


def test_position_ids_of_packed_input() -> None:
    position_ids = torch.tensor([[4, 5, 9, 4, 6]])
    packing = plan_packing(torch.zeros(1, 5), position_ids=position_ids, cu_seq_lens_q=torch.tensor([0, 3, 5]))
    assert packing.positions.tolist() == [4, 5, 9, 4, 6]


def test_padding_is_zero_and_gradients_flow() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    packing = plan_packing(torch.zeros(2, 3), mask)
    x = torch.full((2, 3, 2), float("nan"), dtype=torch.float64)
    x[mask.bool()] = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    x.requires_grad_()
    weights = torch.arange(12.0, dtype=torch.float64).view(2, 3, 2)
    out = packing.unpack(packing.pack(x) ** 2)
    assert out.tolist() == [[[0, 0], [0, 1], [4, 9]], [[16, 25], [0, 0], [0, 0]]]
    (out * weights).sum().backward()
    expected = torch.where(mask.bool()[..., None], 2 * x.detach() * weights, 0.0)
    assert torch.equal(x.grad, expected)


def test_pack_refuses_another_shape() -> None:
    packing = plan_packing(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[2, 3\] \+ \[\.\.\.\], got \[3, 2\]"):
        packing.pack(torch.zeros(3, 2))


def test_a_last_sequence_of_padding_is_none() -> None:
    """As collators append it to fill up a row."""
    ids = torch.arange(10, 18)[None]
    bounds, mask = torch.tensor([0, 3, 5, 8]), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    packing = plan_packing(ids, mask, cu_seq_lens_q=bounds, max_length_q=3)
    assert packing.lengths == [3, 2]
    assert packing.positions.tolist() == [0, 1, 2, 0, 1]
    assert packing.unpack(packing.pack(ids)).tolist() == [[10, 11, 12, 13, 14, 0, 0, 0]]


SLOTS = {  # lengths of the sequences, and of what each takes of the row
    "after_each": ([3, 1, 5], [4, 4, 8]),
    "after_the_last": ([3, 2], [3, 5]),
    "after_the_first": ([1, 2], [6, 2]),
    "one": ([3], [8]),
    "none": ([3, 2], [3, 2]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("given", ["alone", "tokens", "slots"])
@pytest.mark.parametrize("case", SLOTS)
def test_padding_between_packed_sequences(case: str, given: str, dtype: torch.dtype) -> None:
    """Against plain loops; mask and positions not given, given of the tokens, or of all slots."""
    lengths, widths = SLOTS[case]
    kept, start = [], 0
    for length, width in zip(lengths, widths, strict=True):
        kept.append(list(range(start, start + length)))
        start += width
    ids, columns = torch.arange(10, 10 + start)[None], [column for one in kept for column in one]
    bounds, slots = (torch.tensor([0, *some]).cumsum(0).to(dtype) for some in (lengths, widths))
    others: dict[str, Any] = {}
    expected = [position for length in lengths for position in range(length)]
    if given == "tokens":
        expected = [7 + 2 * position for position in expected]
        others = {"attention_mask": torch.ones(1, sum(lengths)), "position_ids": torch.tensor([expected])}
    elif given == "slots":
        mask, positions = torch.zeros(1, start, dtype=torch.bool), torch.full((1, start), 3)
        expected = [5 + position for position in expected]
        mask[0, columns], positions[0, columns] = True, torch.tensor(expected)
        others = {"attention_mask": mask, "position_ids": positions}
    packing = plan_packing(
        ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds.int(), max_length_q=max(widths), max_length_k=max(lengths),
        cu_seq_lens_q_padded=slots, cu_seq_lens_k_padded=slots.clone(), **others,
    )  # fmt: skip
    assert packing.cu_seqlens.tolist() == bounds.tolist()
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == max(lengths)
    assert packing.positions.tolist() == expected
    assert packing.positions.dtype == torch.int64
    assert packing.lengths == lengths
    assert packing.pack(ids).tolist() == [10 + column for column in columns]
    assert packing.unpack(packing.pack(ids)).tolist() == [[10 + c if c in columns else 0 for c in range(start)]]


def test_a_mask_and_padding_between_sequences_both_count() -> None:
    ids, mask = torch.arange(10, 18)[None], torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1]])
    bounds, slots = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 8])
    packing = plan_packing(ids, mask, cu_seq_lens_q=bounds, cu_seq_lens_q_padded=slots)
    assert packing.unpack(packing.pack(ids)).tolist() == [[10, 11, 0, 0, 0, 15, 16, 0]]
    assert packing.positions.tolist() == [0, 1, 0, 1]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), count=st.integers(1, 4))
def test_any_mask_of_packed_sequences(data: st.DataObject, count: int) -> None:
    """Each sequence is what a padded row of its own would be."""
    row = st.lists(st.integers(0, 1), min_size=1, max_size=5).filter(any)
    rows = data.draw(st.lists(row, min_size=count, max_size=count))
    mask = torch.tensor([[one for row in rows for one in row]])
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    packing = plan_packing(ids_like(mask.tolist()), mask, cu_seq_lens_q=bounds)
    alone = [plan_packing(torch.zeros(1, len(row)), torch.tensor([row])) for row in rows]
    assert packing.lengths == [len(one.positions) for one in alone]
    assert packing.positions.tolist() == [position for one in alone for position in one.positions.tolist()]
    assert packing.pack(mask).all()


THREE, PACKED = torch.zeros(2, 3).long(), torch.zeros(1, 6).long()
BOUNDS = torch.tensor([0, 2, 6])
NO_RESTART = r"position_ids fall within a sequence: .* also needs cu_seq_lens_q"
NOT_BINARY = r"only 1 \(token\) and 0 \(padding\); additive masks are not understood"
RISE = r"rise from 0 to the 6 tokens of the input, got "


def packed(*bounds: int, **others: Any) -> dict[str, Any]:
    return {"cu_seq_lens_q": torch.tensor(bounds or [0, 2, 6]), **others}


def positions(*rows: list[int]) -> dict[str, Any]:
    return {"position_ids": torch.tensor(rows)}


REFUSED: dict[str, tuple[Tensor, dict[str, Any], str]] = {  # inputs, arguments, message
    "no_rows": (torch.zeros(0, 3), {}, r"batch is empty .*\[0, 3\]"),
    "no_columns": (torch.zeros(2, 0), {}, r"batch is empty .*\[2, 0\]"),
    "no_features": (torch.zeros(2, 3, 0), {}, r"batch is empty .*\[2, 3, 0\]"),
    "one_dimension": (torch.zeros(3), {}, r"no batch dimension: .*\[3\]"),
    "row_of_padding": (torch.zeros(4, 2), {"attention_mask": torch.tensor([[0, 0], [1, 0], [1, 1], [0, 0]])},
                       r"rows \[0, 3\] of the batch have no token"),
    "mask_transposed": (THREE, {"attention_mask": torch.ones(3, 2)}, r"shape \[2, 3\] .* got \[3, 2\]"),
    "mask_of_4d": (THREE, {"attention_mask": torch.ones(2, 1, 3, 3)}, r"shape \[2, 3\] .* got \[2, 1, 3, 3\]"),
    "mask_of_one_row": (THREE, {"attention_mask": torch.ones(1, 3)}, r"shape \[2, 3\] .* got \[1, 3\]"),
    "mask_additive": (THREE, {"attention_mask": torch.tensor([[0, 0, -1e9]] * 2)}, NOT_BINARY),
    "mask_of_numbers": (THREE, {"attention_mask": torch.tensor([[1, 2, 2]] * 2)}, NOT_BINARY),
    "mask_nan": (THREE, {"attention_mask": torch.full((2, 3), float("nan"))}, NOT_BINARY),
    "positions_too_few": (THREE, positions([0, 1]), r"position_ids .*\[2, 3\], got \[1, 2\]"),
    "positions_3d": (THREE, {"position_ids": torch.zeros(2, 3, 1)}, r"position_ids .*\[2, 3\], got \[2, 3, 1\]"),
    "positions_1d": (THREE, {"position_ids": torch.arange(3)}, r"position_ids .*\[2, 3\], got \[3\]"),
    "positions_restart": (PACKED, positions([0, 1, 0, 1, 2, 3]), NO_RESTART),
    "positions_restart_at_once": (PACKED, positions([0, 0, 1, 2, 3, 4]), NO_RESTART),
    "positions_restart_in_row_1": (THREE, positions([0, 1, 2], [0, 1, 0]), NO_RESTART),
    "positions_restart_in_sequence": (PACKED, positions([0, 1, 0, 1, 0, 1]) | packed(), NO_RESTART),
    "positions_of_packed": (PACKED, positions([0] * 6, [0] * 6) | packed(), r"\[1, 6\], got \[2, 6\]"),
    "packed_two_rows": (torch.zeros(2, 6), packed(), r"one row \[1, T\]; got a batch of 2 rows"),
    "packed_sequence_of_padding": (PACKED, packed(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])),
                                   r"sequences \[0\] of the packed row have no token"),
    "packed_all_padding": (PACKED, packed(attention_mask=torch.zeros(1, 6)), r"sequences \[0\] of the packed row"),
    "packed_one_sequence_of_padding": (PACKED, packed(0, 6, attention_mask=torch.zeros(1, 6)), r"sequences \[0\] of"),
    "packed_mask_of_tokens": (PACKED, packed(attention_mask=torch.ones(1, 5)), r"shape \[1, 6\] .* got \[1, 5\]"),
    "packed_k_alone": (PACKED, {"cu_seq_lens_k": BOUNDS}, r"without cu_seq_lens_q"),
    "packed_padded_alone": (PACKED, {"cu_seq_lens_q_padded": BOUNDS}, r"without cu_seq_lens_q"),
    "packed_padded_k_alone": (PACKED, packed(cu_seq_lens_k_padded=BOUNDS), r"without cu_seq_lens_q_padded"),
    "packed_max_q_alone": (PACKED, {"max_length_q": 4}, r"without cu_seq_lens_q"),
    "packed_max_k_alone": (PACKED, {"max_length_k": 4}, r"without cu_seq_lens_q"),
    "bounds_2d": (PACKED, {"cu_seq_lens_q": BOUNDS[None]}, r"one row of boundaries \[B \+ 1\], got \[1, 3\]"),
    "bounds_two_rows": (PACKED, {"cu_seq_lens_q": BOUNDS.expand(2, 3)}, r"one row of boundaries .*, got \[2, 3\]"),
    "bounds_one": (PACKED, packed(0), r"one row of boundaries \[B \+ 1\], got \[1\]"),
    "bounds_start": (PACKED, packed(1, 6), RISE + r"\[1, 6\]"),
    "bounds_short": (PACKED, packed(0, 5), RISE + r"\[0, 5\]"),
    "bounds_long": (PACKED, packed(0, 7), RISE + r"\[0, 7\]"),
    "bounds_fall": (PACKED, packed(0, 4, 2, 6), RISE + r"\[0, 4, 2, 6\]"),
    "bounds_empty": (PACKED, packed(0, 2, 2, 6), RISE + r"\[0, 2, 2, 6\]"),
    "bounds_negative": (PACKED, packed(0, -2, 6), RISE + r"\[0, -2, 6\]"),
    "bounds_start_below": (PACKED, packed(-1, 2, 6), RISE + r"\[-1, 2, 6\]"),
    # each of these is [0, 2, 6] to int32
    "bounds_wrap_at_the_end": (PACKED, packed(0, 2, 6 + 2**32), RISE + rf"\[0, 2, {6 + 2**32}\]"),
    "bounds_wrap_within": (PACKED, packed(0, 2 + 2**32, 6), RISE + rf"\[0, {2 + 2**32}, 6\]"),
    "bounds_wrap_at_the_start": (PACKED, packed(-(2**32), 2, 6), RISE + rf"\[-{2**32}, 2, 6\]"),
    "bounds_wrap_everywhere": (PACKED, packed(*(n + 2**40 for n in (0, 2, 6))), RISE + r"\[1099511627776, "),
    "bounds_of_k_wrap": (PACKED, packed(cu_seq_lens_k=torch.tensor([0, 2 + 2**32, 6])), r"cu_seq_lens_k differ"),
    "bounds_float": (PACKED, packed(0.0, 2.5, 6.0), r"cu_seq_lens_q must be a tensor of int32 or int64, got torch.fl"),
    "bounds_bool": (PACKED[:, :1], packed(False, True), r"cu_seq_lens_q must be a tensor of int32 .* got torch.bool"),
    "bounds_list": (PACKED, {"cu_seq_lens_q": [0, 2, 6]}, r"cu_seq_lens_q must be a tensor of int32 .* got list"),
    "bounds_number": (PACKED, {"cu_seq_lens_q": torch.tensor(6)}, r"one row of boundaries \[B \+ 1\], got \[\]"),
    "bounds_of_k_float": (PACKED, packed(cu_seq_lens_k=BOUNDS.float()), r"cu_seq_lens_k must be a tensor of int32"),
    "bounds_of_k_2d": (PACKED, packed(cu_seq_lens_k=BOUNDS[None]), r"cu_seq_lens_k must be one row of boundaries"),
    "padded_float": (PACKED, packed(cu_seq_lens_q_padded=BOUNDS.float()), r"cu_seq_lens_q_padded must be a tensor of"),
    "padded_short": (PACKED, packed(0, 2, 5, cu_seq_lens_q_padded=torch.tensor([0, 2, 5])),
                     r"cu_seq_lens_q_padded must " + RISE + r"\[0, 2, 5\]"),
    "padded_wraps": (PACKED, packed(0, 2, 5, cu_seq_lens_q_padded=torch.tensor([0, 2, 6 + 2**32])),
                     r"cu_seq_lens_q_padded must " + RISE + rf"\[0, 2, {6 + 2**32}\]"),
    "padded_other_number": (PACKED, packed(0, 5, cu_seq_lens_q_padded=BOUNDS), r"\[0, 5\] do not fit into"),
    "padded_too_narrow": (PACKED, packed(0, 3, 5, cu_seq_lens_q_padded=BOUNDS), r"\[0, 3, 5\] do not fit into"),
    "padded_tokens_wrap": (PACKED, packed(0, 2, 5 + 2**32, cu_seq_lens_q_padded=BOUNDS), r"do not fit into"),
    "padded_tokens_fall": (PACKED, packed(0, 2, 1, cu_seq_lens_q_padded=BOUNDS), r"rise from 0, got \[0, 2, 1\]"),
    "padded_k_differs": (PACKED, packed(0, 2, 5, cu_seq_lens_q_padded=BOUNDS, cu_seq_lens_k_padded=BOUNDS + 1),
                         r"cu_seq_lens_q_padded and cu_seq_lens_k_padded differ"),
    "padded_mask_of_another_width": (PACKED, packed(0, 2, 5, cu_seq_lens_q_padded=BOUNDS,
                                                    attention_mask=torch.ones(1, 4)), r"shape \[1, 6\] .* \[1, 4\]"),
    "positions_float": (THREE, {"position_ids": torch.arange(3.0)[None]}, r"position_ids must be integers"),
    "positions_bool": (THREE[:, :2], {"position_ids": torch.tensor([[False, True]])}, r"must be integers, got torch"),
    "bounds_differ": (PACKED, packed(cu_seq_lens_k=torch.tensor([0, 3, 6])), r"cu_seq_lens_k differ"),
    "bounds_differ_in_number": (PACKED, packed(cu_seq_lens_k=torch.tensor([0, 6])), r"cu_seq_lens_k differ"),
    "max_q": (PACKED, packed(max_length_q=3), r"max_length_q=3 is shorter .* 4 tokens"),
    "max_k": (PACKED, packed(max_length_k=0), r"max_length_k=0 is shorter .* 4 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    inputs, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        plan_packing(inputs, **arguments)
