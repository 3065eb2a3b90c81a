"""Padded rows to packed tokens and back: the only place that knows of padding.

Shapes: B batch, S padded length, T packed tokens (real ones only), N features.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of a batch lie, in their sequences and in the caller's rows."""

    cu_seqlens: Tensor  # int32 [B + 1], first token of each sequence, then T
    max_seqlen: int
    positions: Tensor  # int64 [T], position of each token in its own sequence
    shape: tuple[int, int]  # (B, S) of the padded input; (1, T) of a packed one
    indices: Tensor | None  # int64 [T] into the flattened rows; None where every slot holds a token

    @cached_property
    def lengths(self) -> list[int]:
        """Length of each sequence, as Python integers."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """int64 [T]: which sequence each token belongs to."""
        tokens = torch.arange(len(self.positions), dtype=torch.int32, device=self.positions.device)
        return torch.searchsorted(self.cu_seqlens[1:-1], tokens, right=True)

    @property
    def first_tokens(self) -> Tensor:
        """int64 [B]: the packed index of each sequence's first token."""
        return self.cu_seqlens[:-1].long()

    def pack(self, rows: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        if rows.shape[:2] != self.shape:
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


def plan_packing(
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Packing:
    """Read a caller's batch, padded or packed, and say where its real tokens are.

    Args:
        inputs: token ids [B, S] or embeddings [B, S, N]; packed: [1, T] or [1, T, N].
        attention_mask: bool, int or float [B, S], 1 for a token and 0 for padding; None means no padding.
        position_ids: int [B, S] (or [1, S]); by default a row's positions count from its first real token.
        cu_seq_lens_q, cu_seq_lens_k: int [B + 1], the boundaries of packed sequences (equal: this is self-attention).
        max_length_q, max_length_k: longest packed sequence; worked out if not given.

    Raises ValueError for anything that does not describe at least one token in every sequence.
    """
    if inputs.dim() < 2 or 0 in inputs.shape:
        raise ValueError(f"the batch is empty or has no batch dimension: its shape is {list(inputs.shape)}")
    if cu_seq_lens_q is not None:
        return _packed(inputs, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if cu_seq_lens_k is not None or max_length_q is not None or max_length_k is not None:
        raise ValueError("cu_seq_lens_k or max_length_* was given without cu_seq_lens_q, which marks packed input")
    return _padded(inputs, attention_mask, position_ids)


def _padded(inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Packing:
    rows, width = inputs.shape[:2]
    device = inputs.device
    if attention_mask is None:
        keep = torch.ones(rows, width, dtype=torch.bool, device=device)
    else:
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
    packing = Packing(cu_seqlens, longest, positions, (rows, width), indices)
    if position_ids is not None:
        _refuse_restarts(packing)
    return packing


def _packed(
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> Packing:
    tokens = inputs.shape[1]
    if inputs.shape[0] != 1:
        raise ValueError(f"packed input (cu_seq_lens_q) is one row [1, T]; got a batch of {inputs.shape[0]} rows")
    if attention_mask is not None and not bool(_keep_mask(attention_mask, (1, tokens)).all()):
        raise ValueError("packed input (cu_seq_lens_q) has no padding, but attention_mask holds zeros")
    if cu_seq_lens_q.dim() != 1 or len(cu_seq_lens_q) < 2:
        raise ValueError(f"cu_seq_lens_q must be one row of boundaries [B + 1], got {list(cu_seq_lens_q.shape)}")
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q and not cu_seq_lens_k.equal(cu_seq_lens_q):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: self-attention needs one set of boundaries")
    cu_seqlens = cu_seq_lens_q.to(inputs.device, torch.int32)
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) <= 0:
        raise ValueError(f"cu_seq_lens_q must rise from 0 to the {tokens} tokens of the input, got {bounds}")
    longest = max(lengths)
    for name, given in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        if given is not None and int(given) < longest:
            raise ValueError(f"{name}={int(given)} is shorter than the longest packed sequence, {longest} tokens")
    if position_ids is None:
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens)
        positions = torch.arange(tokens, device=inputs.device) - starts
    else:
        positions = _rows_of_positions(position_ids, (1, tokens)).to(inputs.device).flatten()
    packing = Packing(cu_seqlens, longest, positions, (1, tokens), None)
    if position_ids is not None:
        _refuse_restarts(packing)
    return packing


def _keep_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """A bool mask, True for a token, from a bool, int or float mask of zeros and ones."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have the shape {list(shape)} of the input, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    keep = mask == 1
    if not bool((keep | (mask == 0)).all()):
        raise ValueError("attention_mask may hold only 1 (token) and 0 (padding); additive masks are not understood")
    return keep


def _rows_of_positions(position_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        raise ValueError(f"position_ids must have the shape {list(shape)}, got {list(position_ids.shape)}")
    return position_ids.expand(shape)


def _refuse_restarts(packing: Packing) -> None:
    """Positions that fall inside one sequence are sequences packed without their boundaries: a silent wrong answer."""
    falls = packing.positions.diff() <= 0
    falls[packing.cu_seqlens[1:-1].long() - 1] = False
    if bool(falls.any()):
        raise ValueError(
            "position_ids fall within a sequence: packed input also needs cu_seq_lens_q "
            "(DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives it)"
        )
