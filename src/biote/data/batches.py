"""Batches by a budget of tokens: which sequences run together, and how they are laid out.

Shapes: T packed tokens, B sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

FEWEST_TOKENS = 1024  # that a budget holds on any device
MOST_TOKENS = 16_384  # more makes no GPU faster, and leaves less memory to long sequences
ON_CPU = 1024  # what its caches like: at 4,096 a model of 8M is 4 % slower


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of sequences by batch: longest first, at most `budget` tokens each, or a single longer sequence.

    A pure function of its arguments; equal lengths keep their order.
    """
    batches: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if lengths[place] > room:
            batches.append([])
            room = budget
        batches[-1].append(place)
        room -= lengths[place]
    return batches


def packed(rows: Sequence[np.ndarray], device: Any) -> dict[str, Any]:
    """Token ids of sequences -> what a model takes: input_ids int64 [1, T] and the boundaries of packed sequences."""
    lengths = [len(row) for row in rows]
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    if torch.device(device).type == "cuda":
        ids = ids.pin_memory()
    longest = max(lengths)
    bounds_of = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": ids.to(device, non_blocking=True)[None], **bounds_of}


def default_budget(model: Any, states_kept: int = 0) -> int:
    """Tokens a batch for a model where it lies: a power of two that a quarter of the GPU's free memory holds.

    states_kept: how many hidden states are kept till the batch is done.
    """
    if model.device.type != "cuda":
        return ON_CPU
    config = model.config  # what is alive at once within a block, generously:
    widths = (12 + states_kept) * config.hidden_size + 4 * config.intermediate_size
    free = torch.cuda.mem_get_info(model.device)[0]
    fits = max(int(free / 4 / (widths * model.dtype.itemsize)), FEWEST_TOKENS)
    return min(MOST_TOKENS, 1 << (fits.bit_length() - 1))


class SequenceTooLongError(RuntimeError):
    """The device has not the memory for a sequence by itself; `row` is its place in what was given."""

    def __init__(self, row: int):
        super().__init__(f"the device has not the memory for sequence {row} by itself")
        self.row = row


class Budget:
    """A budget of tokens, halved whenever the device is out of memory."""

    def __init__(self, tokens: int):
        self.tokens, self.halvings = tokens, 0

    def run(self, rows: list[int], lengths: Sequence[int], step: Callable[[list[int]], Any]) -> Iterator[Any]:
        """`step` of a batch, or of its parts if the device cannot hold it whole.

        rows, lengths: as `token_batches` gives and takes them. SequenceTooLongError if a part is one sequence.
        """
        todo = [rows]
        while todo:
            rows = todo.pop(0)
            limit = self.tokens >> self.halvings
            if len(rows) > 1 and sum(lengths[row] for row in rows) > limit:
                parts = token_batches([lengths[row] for row in rows], limit)
                todo[:0] = [[rows[place] for place in part] for part in parts]
                continue
            try:
                done = step(rows)
            except torch.OutOfMemoryError:
                done = None
            if done is None and len(rows) == 1:
                raise SequenceTooLongError(rows[0])
            if done is None:  # only here is nothing of the failed step alive
                torch.cuda.empty_cache()
                while self.tokens >> self.halvings >= sum(lengths[row] for row in rows):
                    self.halvings += 1
                todo.insert(0, rows)
            else:
                yield done
