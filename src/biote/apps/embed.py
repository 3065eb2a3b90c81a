"""Embeddings of sequences: hidden states of residues, and what is made of them for a whole sequence.

Shapes: T packed tokens, W sequences or windows of a batch, R residues of a batch (tokens without
the special ones), L residues of one sequence, N hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Budget, SequenceTooLongError, default_budget, packed, token_batches
from ..data.sequences import Cleaner, Record
from ..port import port_of
from ..runtime.encoder import EncoderModel

T = TypeVar("T")
POOLS = ("mean", "max", "cls", "std")
LONG = ("window", "truncate", "skip", "error")
OVERLAP = 256  # residues that two windows share, if they are long enough


@dataclass(frozen=True)
class Wanted:
    """What is to be made of each sequence.

    pools: of POOLS, over residues; "cls" is the state of the special token before them. layers: which of the model's
    hidden_states, numbered as its original numbers them; -1 is the last. per_residue: the residues' states themselves,
    in place of pools. long: what is done with sequences of more residues than the model takes, or than max_residues:
    cut into windows that share `overlap` residues (what two windows hold is the mean of both), truncated, skipped, or
    an error.
    """

    pools: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    per_residue: bool = False
    long: str = "window"
    max_residues: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        for pool in self.pools:
            if pool not in POOLS:
                raise ValueError(f"unknown pool {pool!r}; choose from {', '.join(POOLS)}")
        if self.long not in LONG:
            raise ValueError(f"long={self.long!r} is unknown; choose one of {', '.join(LONG)}")
        for name, values in (("pools", self.pools), ("layers", self.layers)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} names nothing, or something twice")
        if self.per_residue and self.pools != ("mean",):
            raise ValueError("per_residue gives the residues' own states: no pools can be asked for")


@dataclass
class _States:
    """One layer's hidden states of a batch, in float32 (float64 from a model in float64)."""

    first: Tensor | None  # [W, N], of the special token before each; None where there is none
    residues: Tensor  # [R, N]


class Embedder:
    """Embeds rows of token ids by one model, in batches of a token budget.

    model: any class of a port, in eval mode. before, after: the special ids that stand around a row.
    """

    def __init__(self, model: Any, before: np.ndarray, after: np.ndarray, wanted: Wanted, batch_tokens: int):
        self.encoder = encoder_of(model)
        self.before, self.after, self.wanted, self.batch_tokens = before, after, wanted, batch_tokens
        self.layers = _numbers(wanted.layers, _hidden_states(self.encoder)[0])
        self.keeps_states = states_kept(self.encoder, wanted.layers) > 0
        if "cls" in wanted.pools and not len(before):
            raise ValueError("this model's sequences begin with no special token: there is no pool 'cls'")
        self.width: int = model.config.hidden_size
        self.most = self._most_residues()
        self.overlap = min(OVERLAP, (self.most or 0) // 4) if wanted.overlap is None else wanted.overlap
        if self.most is not None and not 0 <= self.overlap < self.most:
            raise ValueError(f"an overlap of {self.overlap} residues does not fit windows of {self.most}")

    def _most_residues(self) -> int | None:
        """How many residues run at once; None if there is no limit."""
        limit, asked = self.encoder.max_positions, self.wanted.max_residues
        fits = None if limit is None else limit - len(self.before) - len(self.after)
        if asked is not None and (asked < 1 or (fits is not None and asked > fits)):
            most = "" if fits is None else f" and {fits}, the most that this model takes"
            raise ValueError(f"max_residues={asked} must be at least 1{most}")
        return fits if asked is None else asked

    @property
    def columns(self) -> list[str]:
        """What the results are called: "embedding" if there is one, else pool and layer, as mean_12 or residues_12."""
        pools = ("residues",) if self.wanted.per_residue else self.wanted.pools
        names = [f"{pool}_{layer}" for layer in self.layers for pool in pools]
        return ["embedding"] if len(names) == 1 else names

    def is_long(self, residues: int) -> bool:
        """Whether a sequence has more residues than run at once."""
        return self.most is not None and residues > self.most

    def __call__(self, rows: Sequence[np.ndarray], done: Callable[[int], None] = lambda residues: None) -> list[list]:
        """Token ids without special ones, int [L] each -> for each column an array for each row, in their order.

        The arrays are [N], or per residue [L, N]; float32, or float64 from a model in float64. done: is told the
        residues of each batch. SequenceTooLongError if the device cannot hold a single row.
        """
        if self.wanted.long == "truncate":
            rows = [row[: self.most] for row in rows]
        short = [place for place, row in enumerate(rows) if not self.is_long(len(row))]
        budget = Budget(self.batch_tokens)  # anew, so that what was before makes no difference
        order: list[int] = []
        found: list[list[Tensor]] = [[] for _ in self.columns]  # on the device: the host does not wait for each batch

        def keep(places: list[int], made: list[list[Tensor]]) -> None:
            order.extend(places)
            for column, values in zip(found, made, strict=True):
                column += values
            done(sum(len(rows[place]) for place in places))

        with _mapping(short):
            for batch, made in self._run([rows[place] for place in short], budget, self._made):
                keep([short[place] for place in batch], made)
        for place, row in enumerate(rows):
            if self.is_long(len(row)):
                with _mapping([place] * len(row)):
                    made = self._made(self._stitched(row, budget), [len(row)])
                keep([place], made)
        return [self._on_host(column, order) for column in found]

    def _made(self, states: list[_States], lengths: list[int]) -> list[list[Tensor]]:
        """For each column what is made of a batch: one tensor [W, N], or per residue W of [L, N]."""
        if self.wanted.per_residue:
            return [list(one.residues.split(lengths)) for one in states]
        return [[pool(name, one.first, one.residues, lengths)] for one in states for name in self.wanted.pools]

    def _on_host(self, column: list[Tensor], order: list[int]) -> list[np.ndarray]:
        on_host = [tensor.cpu().numpy() for tensor in column]
        arrays = on_host if self.wanted.per_residue else [array for batch in on_host for array in batch]
        by_place = dict(zip(order, arrays, strict=True))
        return [by_place[place] for place in range(len(by_place))]

    def _run(
        self, rows: Sequence[np.ndarray], budget: Budget, make: Callable[[list[_States], list[int]], T]
    ) -> Iterator[tuple[list[int], T]]:
        """Batches of rows, as their places, and what is made of the states of each layer and of the lengths."""
        special = len(self.before) + len(self.after)
        lengths = [len(row) + special for row in rows]

        def step(batch: list[int]) -> tuple[list[int], T]:
            whole = [np.concatenate((self.before, rows[place], self.after)) for place in batch]
            return batch, make(self._states(whole), [len(rows[place]) for place in batch])

        for planned in token_batches(lengths, budget.tokens):
            yield from budget.run(planned, lengths, step)

    @torch.inference_mode()
    def _states(self, rows: list[np.ndarray]) -> list[_States]:
        device = self.encoder.device
        batch = packed(rows, device)
        output = self.encoder(**batch, output_hidden_states=self.keeps_states, return_dict=True)
        bounds = batch["cu_seq_lens_q"].long()
        residue = torch.ones(int(bounds[-1]), dtype=torch.bool)
        for place in range(len(self.before)):
            residue[bounds[:-1] + place] = False
        for place in range(len(self.after)):
            residue[bounds[1:] - 1 - place] = False
        of_residues = residue.nonzero().flatten().to(device, non_blocking=True)
        of_first = bounds[:-1].to(device, non_blocking=True)
        found = []
        for layer in self.layers:
            states = (output.hidden_states[layer] if self.keeps_states else output.last_hidden_state)[0]  # [T, N]
            dtype = torch.promote_types(states.dtype, torch.float32)
            first = states[of_first].to(dtype) if len(self.before) else None
            found.append(_States(first, states[of_residues].to(dtype)))
        return found

    def _stitched(self, row: np.ndarray, budget: Budget) -> list[_States]:
        """The states of a long row: where windows overlap the mean of both, of the special token that of all.

        They are on the host, which has the memory.
        """
        assert self.most is not None
        starts = [*range(0, len(row) - self.most, self.most - self.overlap), len(row) - self.most]
        sums: list[_States] = []
        counts = torch.zeros(len(row), 1)
        for batch, states in self._run([row[start : start + self.most] for start in starts], budget, _on_cpu):
            if not sums:
                sums = [_States(_zeros(one.first, 1), one.residues.new_zeros(len(row), self.width)) for one in states]
            for total, one in zip(sums, states, strict=True):
                if total.first is not None and one.first is not None:
                    total.first += one.first.sum(0, keepdim=True)
                for place, piece in zip(batch, one.residues.split(self.most), strict=True):
                    total.residues[starts[place] : starts[place] + self.most] += piece
            for place in batch:
                counts[starts[place] : starts[place] + self.most] += 1
        return [_States(None if one.first is None else one.first / len(starts), one.residues / counts) for one in sums]


def _on_cpu(states: list[_States], lengths: list[int]) -> list[_States]:
    return [_States(None if one.first is None else one.first.cpu(), one.residues.cpu()) for one in states]


@contextmanager
def _mapping(places: Sequence[int]) -> Iterator[None]:
    """The row that an error names, as its place among all rows."""
    try:
        yield
    except SequenceTooLongError as error:
        raise SequenceTooLongError(places[error.row]) from error


def pool(name: str, first: Tensor | None, residues: Tensor, lengths: list[int]) -> Tensor:
    """One of POOLS: states of W sequences, [R, N], their special token's [W, N] -> [W, N].

    "std" is the spread about the mean, over the number of residues: 0 where there is one.
    """
    if name == "cls":
        assert first is not None
        return first
    counts = torch.tensor(lengths, device=residues.device)
    if name == "max":
        return torch.segment_reduce(residues, "max", lengths=counts, axis=0)
    mean = torch.segment_reduce(residues, "mean", lengths=counts, axis=0)
    if name == "mean":
        return mean
    spread = residues - mean.repeat_interleave(counts, 0, output_size=len(residues))
    return torch.segment_reduce(spread * spread, "mean", lengths=counts, axis=0).sqrt()


def embed(
    model: Any,
    sequences: Sequence[str],
    *,
    pools: Sequence[str] = ("mean",),
    layers: Sequence[int] = (-1,),
    per_residue: bool = False,
    long: str = "window",
    max_residues: int | None = None,
    overlap: int | None = None,
    tokenizer: Any = None,
    batch_tokens: int | None = None,
) -> Any:
    """Embeddings of sequences, in their order: an array [B, N]; per residue a list of arrays [L, N].

    model: of any port, in eval mode, as `biote.load` gives it. pools, layers and so on: see `Wanted`; of several
    pools or layers the result is a dictionary by name, as mean_12. tokenizer: None is the port's own. batch_tokens:
    how many run at once; None is what suits the device. Sequences are read as `biote embed` reads them: see
    `Cleaner`. float32, or float64 from a model in float64. ValueError names the first sequence that cannot be read, or
    is too long for long="error"; "skip" is none of the choices here, where each sequence has a result.
    """
    wanted = Wanted(tuple(pools), tuple(layers), per_residue, long, max_residues, overlap)
    if isinstance(sequences, str):
        raise ValueError("one string was given: give a list of sequences")
    if long == "skip":
        raise ValueError("long='skip' would leave sequences without a result: leave them out before")
    tokenizer = tokenizer or tokenizer_of(model)
    clean = Cleaner(tokenizer)
    texts = []
    for number, text in enumerate(sequences):
        if not isinstance(text, str):
            raise ValueError(f"sequence {number} is no string but {type(text).__name__}")
        texts.append(clean(Record(f"sequence {number}", text)).sequence)
    before, after = special_ids(tokenizer)
    encoder = encoder_of(model)
    tokens = batch_tokens or default_budget(encoder, states_kept(encoder, wanted.layers))
    embedder = Embedder(model, before, after, wanted, tokens)
    for number, text in enumerate(texts):
        if embedder.is_long(len(text)) and long == "error":
            raise ValueError(f"sequence {number} has {len(text):,} residues, more than the {embedder.most:,} at once")
    columns = embedder(tokenize(tokenizer, texts))
    none = np.empty((0, embedder.width), np.float64 if model.dtype == torch.float64 else np.float32)
    results = columns if per_residue else [np.stack(column) if column else none for column in columns]
    return results[0] if len(results) == 1 else dict(zip(embedder.columns, results, strict=True))


def encoder_of(model: Any) -> Any:
    """The encoder within a model of a port, in eval mode; ValueError for another."""
    encoder = next((module for module in model.modules() if isinstance(module, EncoderModel)), None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} is no model of a port: biote.load gives one")
    if model.training:
        raise ValueError("the model is in training mode, with dropout: call model.eval() first")
    return encoder


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model's port; ValueError where it has none."""
    port = port_of(type(model))
    if port is None or port.build_tokenizer is None:
        raise ValueError(f"{type(model).__name__} has no tokenizer of text: pass one")
    return port.build_tokenizer()


def special_ids(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids that a tokenizer sets before and after a sequence, int32."""
    letter = next(token for token in tokenizer.get_vocab() if len(token) == 1 and token.isalpha())
    found = tokenizer(letter, return_special_tokens_mask=True)
    ids, at = np.array(found["input_ids"], np.int32), found["special_tokens_mask"].index(0)
    return ids[:at], ids[at + 1 :]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids without special ones, int32 [L] each: one a letter, or ValueError."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    rows = [np.array(one.ids, np.int32) for one in encoded]
    odd = next((text for text, row in zip(texts, rows, strict=True) if len(row) != len(text)), None)
    if odd is not None:
        raise ValueError(f"the tokenizer does not read one token a letter: {odd[:40]}")
    return rows


@torch.inference_mode()
def _hidden_states(encoder: Any) -> tuple[int, bool]:
    """How many hidden states there are, and whether the last is what comes out of the encoder: tried on one token."""
    token = encoder.get_input_embeddings().weight.new_zeros(1, encoder.config.hidden_size)
    last = token.clone()
    found = encoder.original_states([token] * (encoder.config.num_hidden_layers + 1), last)
    return len(found), found[-1] is last


def states_kept(encoder: Any, layers: Sequence[int]) -> int:
    """How many states of a batch are kept till it is done: none, if what is asked for comes out of the encoder."""
    count, comes_out = _hidden_states(encoder)
    return 0 if comes_out and _numbers(layers, count) == [count - 1] else count


def _numbers(layers: Sequence[int], count: int) -> list[int]:
    """Layers counted from 0; ValueError for one that there is not."""
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layer {layer} is not one of the model's hidden states, 0 to {count - 1}")
    counted = [layer % count for layer in layers]
    if len(set(counted)) < len(counted):
        raise ValueError(f"layers {', '.join(map(str, layers))} name one layer twice")
    return counted


def _zeros(like: Tensor | None, rows: int) -> Tensor | None:
    return None if like is None else like.new_zeros(rows, like.shape[1])
