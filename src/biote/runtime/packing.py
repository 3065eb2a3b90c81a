"""Padded rows to packed tokens and back: the only place that knows of padding.

Where torch traces the model (torch.compile, torch.export), checks of values are assertions in the graph.
Shapes: B batch, S padded length, T packed tokens (real ones only), N features; W slots of a packed row, of which T
hold a token.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of a batch lie, in their sequences and in the caller's rows."""

    cu_seqlens: Tensor  # int32 [B + 1], first token of each sequence, then T
    max_seqlen: int
    positions: Tensor  # int64 [T], position of each token in its own sequence
    shape: tuple[int, int]  # (B, S) of the padded input; (1, W) of a packed one
    indices: Tensor | None  # int64 [T] into the flattened rows; None where every slot holds a token

    @cached_property
    def lengths(self) -> list[int]:
        """Length of each sequence, as Python integers."""
        return self.cu_seqlens.diff().tolist()

    def sequence_of_token(self) -> Tensor:
        """int64 [T]: which sequence each token belongs to."""
        return _sequences(self.cu_seqlens, self.positions.shape[0])

    @property
    def first_tokens(self) -> Tensor:
        """int64 [B]: the packed index of each sequence's first token."""
        return self.cu_seqlens[:-1].long()

    def pack(self, rows: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        if tuple(rows.shape[:2]) != self.shape:
            raise ValueError(f"expected a tensor of shape {list(self.shape)} + [...], got {list(rows.shape)}")
        flat = rows.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, tokens: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zeros where there is no token."""
        if self.indices is not None:
            rows = tokens.new_zeros(self.shape[0] * self.shape[1], *tokens.shape[1:])
            tokens = rows.index_copy(0, self.indices, tokens)
        return tokens.unflatten(0, self.shape)


@dataclass(frozen=True)
class Tokens:
    """What the embeddings read of a batch: token ids, or embeddings that the caller made."""

    packing: Packing
    ids: Tensor | None = None  # int [T]
    embeds: Tensor | None = None  # [T, N]
    types: Tensor | None = None  # int [T]


def _sequences(bounds: Tensor, count: int) -> Tensor:
    """int64 [count]: between which two bounds, int32 [B + 1] rising from 0, each number below `count` lies."""
    numbers = torch.arange(count, dtype=torch.int32, device=bounds.device)
    return torch.searchsorted(bounds, numbers, right=True) - 1


@dataclass(frozen=True)
class _Bounds:
    """The arguments of packed input, as of `plan_packing`."""

    q: Tensor
    k: Tensor | None
    max_q: int | None
    max_k: int | None
    q_padded: Tensor | None
    k_padded: Tensor | None


def require(holds: Tensor, message: str) -> None:
    """ValueError unless a bool tensor holds; an assertion in the graph where torch traces."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not bool(holds):
        raise ValueError(message)


def plan_packing(
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    cu_seq_lens_q_padded: Tensor | None = None,
    cu_seq_lens_k_padded: Tensor | None = None,
) -> Packing:
    """Read a caller's batch, padded or packed, and say where its real tokens are.

    Args:
        inputs: token ids [B, S] or embeddings [B, S, N]; packed: [1, W] or [1, W, N].
        attention_mask: bool, int or float [B, S], 1 for a token and 0 for padding; None means no padding. Packed:
            [1, W]; a last sequence that is 0 throughout, with which collators fill up a row, does not count.
        position_ids: int [B, S] (or [1, S]); by default a sequence's positions count from its first real token.
        cu_seq_lens_q, cu_seq_lens_k: int [B + 1], the boundaries of packed sequences (equal: this is self-attention).
        max_length_q, max_length_k: longest packed sequence; worked out if not given.
        cu_seq_lens_q_padded, cu_seq_lens_k_padded: int [B + 1], the boundaries of sequences with the padding after
            each; cu_seq_lens_* then count tokens only, and attention_mask and position_ids may be of these, [1, T].

    Raises ValueError for anything that does not describe at least one token in every sequence.
    """
    if inputs.dim() < 2 or 0 in inputs.shape:
        raise ValueError(f"the batch is empty or has no batch dimension: its shape is {list(inputs.shape)}")
    others = (cu_seq_lens_k, max_length_q, max_length_k, cu_seq_lens_q_padded, cu_seq_lens_k_padded)
    tracing = torch.compiler.is_compiling()
    if cu_seq_lens_q is not None:
        read = _packed_traced if tracing else _packed
        return read(inputs, attention_mask, position_ids, _Bounds(cu_seq_lens_q, *others))
    if any(other is not None for other in others):
        raise ValueError("cu_seq_lens_k* or max_length_* was given without cu_seq_lens_q, which marks packed input")
    if attention_mask is None:
        return _full(inputs, position_ids)
    if tracing:
        raise ValueError(
            "torch.compile and torch.export cannot trace an attention_mask, which says how many tokens there are: "
            "pass packed input (cu_seq_lens_q and max_length_q), or rows of one length without a mask"
        )
    return _padded(inputs, attention_mask, position_ids)


def _full(inputs: Tensor, position_ids: Tensor | None) -> Packing:
    """Rows without padding: no look at a value."""
    rows, width = inputs.shape[:2]
    cu_seqlens = width * torch.arange(rows + 1, dtype=torch.int32, device=inputs.device)
    positions = torch.arange(width, device=inputs.device).expand(rows, width)
    if position_ids is not None:
        positions = _rows_of_positions(position_ids, (rows, width)).to(inputs.device)
    return _checked(Packing(cu_seqlens, width, positions.flatten(), (rows, width), None), position_ids)


def _padded(inputs: Tensor, attention_mask: Tensor, position_ids: Tensor | None) -> Packing:
    rows, width = inputs.shape[:2]
    device = inputs.device
    keep = _keep_mask(attention_mask, (rows, width)).to(device)
    lengths = keep.sum(1)
    longest = int(lengths.max())
    if int(lengths.min()) == 0:
        empty = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {empty} of the batch have no token: their attention_mask is all zero")
    full = int(lengths.sum()) == rows * width
    if position_ids is None:
        columns = torch.arange(width, device=device)
        positions = columns - keep.int().argmax(1, keepdim=True)  # a left-padded row counts from its first token
    else:
        positions = _rows_of_positions(position_ids, (rows, width)).to(device)
    indices = None if full else keep.flatten().nonzero().flatten()
    positions = positions.flatten() if indices is None else positions.flatten()[indices]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return _checked(Packing(cu_seqlens, longest, positions, (rows, width), indices), position_ids)


def _packed(inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, given: _Bounds) -> Packing:
    width, device = _width_of_packed(inputs), inputs.device
    bounds, slots = _read_bounds(given, width)
    longest = max(after - before for before, after in pairwise(bounds))
    for name, most in (("max_length_q", given.max_q), ("max_length_k", given.max_k)):
        if most is not None and int(most) < longest:
            raise ValueError(f"{name}={int(most)} is shorter than the longest packed sequence, {longest} tokens")
    keep, starts = None, given.q.to(device, torch.int32)
    if slots != bounds:
        assert given.q_padded is not None
        lengths, starts = starts.diff(), given.q_padded.to(device, torch.int32)
        keep = _slots_with_tokens(starts, lengths, width)
        attention_mask, position_ids = (_spread(x, keep, bounds[-1]) for x in (attention_mask, position_ids))
    if attention_mask is not None:
        mask = _keep_mask(attention_mask, (1, width)).to(device).flatten()
        if not bool(mask.all()):
            keep = mask if keep is None else mask & keep
    if keep is None:
        return _packed_full(starts, longest, position_ids, width)
    return _packed_partly(starts, keep, position_ids)


def _packed_traced(
    inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, given: _Bounds
) -> Packing:
    """As `_packed` where torch traces: no padding, and instead of looking how long sequences are, max_length_q."""
    width = _width_of_packed(inputs)
    if given.max_q is None or given.q_padded is not None or given.k_padded is not None:
        raise ValueError("torch.compile and torch.export take packed input with max_length_q and without padding")
    _check_kind("cu_seq_lens_q", given.q)
    if given.k is not None and given.k is not given.q:
        _check_kind("cu_seq_lens_k", given.k)
        if given.k.shape != given.q.shape:
            raise ValueError(DIFFER)
        require((given.k == given.q.to(given.k.device)).all(), DIFFER)
    if attention_mask is not None:
        require(_keep_mask(attention_mask, (1, width)).all(), "a traced model takes packed input without padding")
    lengths = given.q.diff(
        prepend=given.q[:1] - 1
    )  # one of 1 before the first: torch.export takes [B] for more than 1
    rising = (given.q[0] == 0) & (given.q[-1] == width) & (lengths > 0).all()
    require(rising, "cu_seq_lens_q must rise from 0 to the number of tokens of the input")
    for most in (given.max_q, given.max_k):
        if most is not None:
            require(lengths.max() <= most, "max_length_q or max_length_k is shorter than the longest packed sequence")
    return _packed_full(given.q.to(inputs.device, torch.int32), given.max_q, position_ids, width)


def _packed_full(cu_seqlens: Tensor, longest: int, position_ids: Tensor | None, width: int) -> Packing:
    """A packed row whose slots all hold a token."""
    if position_ids is None:
        positions = torch.arange(width, device=cu_seqlens.device) - cu_seqlens[_sequences(cu_seqlens, width)]
    else:
        positions = _rows_of_positions(position_ids, (1, width)).to(cu_seqlens.device).flatten()
    return _checked(Packing(cu_seqlens, longest, positions, (1, width), None), position_ids)


def _packed_partly(starts: Tensor, keep: Tensor, position_ids: Tensor | None) -> Packing:
    """A packed row of which some slots are padding; starts: [B + 1], of the sequences' slots; keep: bool [W]."""
    width, indices = len(keep), keep.nonzero().flatten()
    cu_seqlens = torch.searchsorted(indices, starts.long(), out_int32=True)
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(bounds)]
    if lengths[-1] == 0 and len(lengths) > 1:  # what only fills up the row
        cu_seqlens, lengths = cu_seqlens[:-1], lengths[:-1]
    empty = [number for number, length in enumerate(lengths) if not length]
    if empty:
        raise ValueError(f"sequences {empty} of the packed row have no token: their attention_mask is all zero")
    if position_ids is None:
        first = indices[cu_seqlens[:-1]]  # [B]
        positions = indices - first.repeat_interleave(cu_seqlens.diff(), output_size=len(indices))
    else:
        positions = _rows_of_positions(position_ids, (1, width)).to(keep.device).flatten()[indices]
    return _checked(Packing(cu_seqlens, max(lengths), positions, (1, width), indices), position_ids)


def _slots_with_tokens(starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """bool [W]: the first `lengths` slots [B] after each of `starts` [B + 1]."""
    sequence = _sequences(starts, width)
    return torch.arange(width, device=starts.device) - starts[sequence] < lengths[sequence]


def _spread(values: Tensor | None, keep: Tensor, tokens: int) -> Tensor | None:
    """Values of the tokens only, [1, T], into the slots that hold them, [1, W]; anything else as it is."""
    if values is None or tuple(values.shape) != (1, tokens):
        return values
    values = values.to(keep.device)
    return values.new_zeros(1, len(keep)).masked_scatter(keep[None], values)


DIFFER = "cu_seq_lens_q and cu_seq_lens_k differ: self-attention needs one set of boundaries"


def _width_of_packed(inputs: Tensor) -> int:
    if inputs.shape[0] != 1:
        raise ValueError(f"packed input (cu_seq_lens_q) is one row [1, T]; got a batch of {inputs.shape[0]} rows")
    return inputs.shape[1]


def _read_bounds(given: _Bounds, width: int) -> tuple[list[int], list[int]]:
    """Boundaries of the sequences' tokens, and of their slots: the same where no padding lies between them."""
    if given.q_padded is None and given.k_padded is not None:
        raise ValueError("cu_seq_lens_k_padded was given without cu_seq_lens_q_padded")
    bounds = _rising("cu_seq_lens_q", given.q, width if given.q_padded is None else None)
    if given.k is not None and given.k is not given.q and _integers("cu_seq_lens_k", given.k) != bounds:
        raise ValueError(DIFFER)
    if given.q_padded is None:
        return bounds, bounds
    slots = _rising("cu_seq_lens_q_padded", given.q_padded, width)
    k_padded = given.k_padded
    if (
        k_padded is not None
        and k_padded is not given.q_padded
        and _integers("cu_seq_lens_k_padded", k_padded) != slots
    ):
        raise ValueError("cu_seq_lens_q_padded and cu_seq_lens_k_padded differ")
    pairs = zip(pairwise(bounds), pairwise(slots), strict=False)
    if len(bounds) != len(slots) or any(b - a > d - c for (a, b), (c, d) in pairs):
        raise ValueError(f"the sequences of cu_seq_lens_q {bounds} do not fit into cu_seq_lens_q_padded {slots}")
    return bounds, slots


def _rising(name: str, tensor: Tensor, end: int | None) -> list[int]:
    """The boundaries; ValueError unless they rise from 0, to `end` if that is known."""
    bounds = _integers(name, tensor)
    rising = bounds[0] == 0 and all(before < after for before, after in pairwise(bounds))
    if not rising or bounds[-1] != (bounds[-1] if end is None else end):
        to = "" if end is None else f" to the {end} tokens of the input"
        raise ValueError(f"{name} must rise from 0{to}, got {bounds}")
    return bounds


def _integers(name: str, tensor: Tensor) -> list[int]:
    """Boundaries as Python has them, before int32 could wrap them."""
    _check_kind(name, tensor)
    return tensor.tolist()


def _check_kind(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool or tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a tensor of int32 or int64, got {kind}")
    if tensor.dim() != 1 or tensor.shape[0] < 2:
        raise ValueError(f"{name} must be one row of boundaries [B + 1], got {list(tensor.shape)}")


def _keep_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """A bool mask, True for a token, from a bool, int or float mask of zeros and ones."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have the shape {list(shape)} of the input, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    keep = mask == 1
    both = (keep | (mask == 0)).all()
    require(both, "attention_mask may hold only 1 (token) and 0 (padding); additive masks are not understood")
    return keep


def _rows_of_positions(position_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        raise ValueError(f"position_ids must have the shape {list(shape)}, got {list(position_ids.shape)}")
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids must be integers, got {position_ids.dtype}")
    return position_ids.expand(shape)


def _checked(packing: Packing, position_ids: Tensor | None) -> Packing:
    """The packing, if the caller's positions rise in each sequence.

    Where they fall, sequences were packed without their boundaries: a silent wrong answer.
    """
    if position_ids is not None:
        falls = packing.positions.diff() <= 0
        falls[packing.cu_seqlens[1:-1].long() - 1] = False
        require(
            ~falls.any(),
            "position_ids fall within a sequence: packed input also needs cu_seq_lens_q "
            "(DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives it)",
        )
    return packing
