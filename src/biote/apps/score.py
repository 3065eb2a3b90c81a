"""Zero-shot scores of protein variants by a masked language model: how much likelier than the wild type each is.

Shapes: S tokens of a row, T packed tokens, V vocabulary, A letters that the model knows, R places that are read.
A place counts residues from 0; a site counts tokens of the whole protein's row, special ones included.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ..data.batches import Budget, SequenceTooLongError, default_budget, packed, token_batches
from ..data.sequences import Record
from ..port import ModelPort, port_of
from .embed import encoder_of
from .variants import Variant
from .windows import RULES, SHORTEST, Weighted, whole

METHODS = {"masked-marginals": "optimal", "wt-marginals": "overlapping", "pseudo-perplexity": "optimal"}  # and windows
MULTI = ("sum", "joint")
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
PLANNED = 4096  # passes that are laid out at a time

Key = tuple[int, tuple[int, ...], int]  # protein, sites that are masked, site that is read


@dataclass(frozen=True)
class Scoring:
    """How variants are scored; ValueError for choices that there are not, or that do not go together.

    method: "wt-marginals": the difference of log p between mutant and wild residue, in one pass of the wild type;
        "masked-marginals": the same with the site masked; "pseudo-perplexity": the sum over all residues of log p of
        the residue where it alone is masked, of the mutant less that of the wild type.
    multi: of a variant's sites "sum" masks one at a time, "joint" all together; the differences are summed.
    window: one of RULES, for proteins of more than window_tokens; None is the method's own, of METHODS.
    window_tokens: special tokens included; None is the model's own (`window_of`), 0 has no windows.
    """

    method: str = "masked-marginals"
    multi: str = "sum"
    window: str | None = None
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("multi", MULTI), ("window", (None, *RULES))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(filter(None, known))}")
        if self.multi == "joint" and self.method != "masked-marginals":
            raise ValueError(
                f"multi=joint masks a variant's sites together, which {self.method} does not: leave it out"
            )
        if self.window_tokens and self.window_tokens < SHORTEST:
            raise ValueError(
                f"a window of {self.window_tokens} tokens is too short: choose {SHORTEST} or more, or 0 for none"
            )

    @property
    def rule(self) -> str:
        """The windows' rule."""
        return self.window or METHODS[self.method]

    @property
    def label(self) -> str:
        """What the scores are called."""
        return self.method + ("-joint" if self.multi == "joint" else "")


def score(
    model: Any,
    tokenizer: Any,
    proteins: Sequence[Record],
    variants: Sequence[Variant],
    scoring: Scoring,
    batch_tokens: int | None = None,
    show_progress: bool = False,
) -> np.ndarray:
    """Scores of variants, float64 [variants]: 0 is the wild type, more is likelier.

    model, tokenizer: as `biote.load` gives them for "masked-lm". proteins: the wild types, clean (see `Cleaner`).
    batch_tokens: how many run at once; None is what suits the device. ValueError for residues that the model does not
    know, RuntimeError for scores that are not finite and for what the device cannot hold.
    """
    residues = Residues.of(model, tokenizer)
    window = window_of(model, scoring.window_tokens)
    reader = Reader(model, residues, proteins, scoring.rule, window, batch_tokens, show_progress)
    for variant in variants:
        if unknown := residues.unknown(variant):
            raise ValueError(f"{proteins[variant.protein].id}: the model does not know the residue {unknown}")
    if scoring.method == "pseudo-perplexity":
        scores = _pseudo_perplexity(reader, variants)
    else:
        scores = _marginals(reader, variants, scoring)
    if not np.isfinite(scores).all():
        raise RuntimeError(f"the model's scores in {model.dtype} are not finite: choose another dtype")
    return scores


def window_of(model: Any, asked: int | None = None) -> int | None:
    """Tokens of the longest row that the model is to see: as asked, as trained, or as it can; None: no limit."""
    port, most = port_of(type(model)), model.base_model.max_positions
    if asked is None:
        return (port.trained_tokens if port else None) or most
    if asked and most is not None and asked > most:
        raise ValueError(f"a window of {asked} tokens is more than the {most} that the model has positions for")
    return asked or None


@dataclass(frozen=True)
class Residues:
    """What a model's tokens say of residues; `states` is how many tokens mean the same residue (1 but for few models).

    letters: those that the model knows, by their row in `ids`: int64 [A, states]. masks: int64 [states].
    letter_of, state_of: int64 [V], row and column in `ids` of each token; -1 for those that are no residue.
    """

    tokenizer: Any
    letters: dict[str, int]
    ids: np.ndarray
    masks: np.ndarray
    letter_of: np.ndarray
    state_of: np.ndarray

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "Residues":
        """Of a loaded model; ValueError if it is no masked language model of proteins."""
        port = port_of(type(model))
        if port is None or type(model) is not port.classes.get("AutoModelForMaskedLM"):
            raise ValueError(f"{type(model).__name__} is no masked language model of a port")
        encoder_of(model)  # which is in eval mode, or it says so
        return cls.of_port(port, tokenizer)

    @classmethod
    def of_port(cls, port: ModelPort, tokenizer: Any) -> "Residues":
        """By what a port says of its tokens."""
        if tokenizer is None:
            raise ValueError(f"{port.title} reads no sequences, so that it cannot score variants of one")
        vocabulary = tokenizer.get_vocab()
        tokens_of = port.residue_tokens or (lambda letter: (letter,))
        known = {letter: [vocabulary.get(token) for token in tokens_of(letter)] for letter in ascii_uppercase}
        known = {letter: ids for letter, ids in known.items() if None not in ids}
        missing = [letter for letter in AMINO_ACIDS if letter not in known]
        if missing:
            raise ValueError(f"{port.title} does not read proteins: it has no token for {', '.join(missing)}")
        ids = np.array(list(known.values()), dtype=np.int64)
        masks = [vocabulary[token] for token in tokens_of(port.mask_letter)] if port.mask_letter else []
        masks = masks or [tokenizer.mask_token_id] * ids.shape[1]
        if None in masks:
            raise ValueError(f"{port.title} has no mask token, without which it cannot score variants")
        letter_of, state_of = np.full((2, max(vocabulary.values()) + 1), -1)
        letter_of[ids], state_of[ids] = np.arange(ids.shape[0])[:, None], np.arange(ids.shape[1])
        letters = {letter: row for row, letter in enumerate(known)}
        return cls(tokenizer, letters, ids, np.array(masks, dtype=np.int64), letter_of, state_of)

    def unknown(self, variant: Variant) -> str:
        """A letter of the variant that the model does not know; empty if it knows them all."""
        letters = (letter for part in variant.substitutions for letter in (part.wild, part.mutant))
        return next((letter for letter in letters if letter not in self.letters), "")

    def encode(self, protein: Record) -> tuple[np.ndarray, int]:
        """Token ids int64 [S], and the site of the first residue; ValueError unless each residue is one token."""
        tokens = self.tokenizer(protein.sequence, return_special_tokens_mask=True, verbose=False)
        sites = np.flatnonzero(np.array(tokens["special_tokens_mask"]) == 0)
        if len(sites) != len(protein.sequence) or sites[-1] - sites[0] + 1 != len(sites):
            raise ValueError(
                f"{protein.id}: its {len(protein.sequence)} residues are {len(sites)} tokens of this model"
            )
        return np.array(tokens["input_ids"], dtype=np.int64), int(sites[0])


@dataclass
class Pass:
    """One row of tokens through the model. ids: int64 [S]. reads: where in it, for which key, with what weight."""

    protein: int
    ids: np.ndarray
    reads: list[tuple[int, Any, float]]


class Reader:
    """Runs passes of proteins through a model and reads the log-probabilities of residues."""

    def __init__(
        self,
        model: Any,
        residues: Residues,
        proteins: Sequence[Record],
        rule: str,
        window: int | None,
        batch_tokens: int | None,
        show_progress: bool,
    ):
        self.model, self.residues, self.proteins = model, residues, proteins
        self.rule, self.window = RULES[rule], window
        self.residue_ids = torch.from_numpy(residues.ids).to(model.device)
        self.budget = Budget(batch_tokens or default_budget(model))
        self.show_progress = show_progress
        self.encoded: dict[int, tuple[np.ndarray, int]] = {}

    def row(self, protein: int) -> tuple[np.ndarray, int]:
        """As `Residues.encode`, once for each protein."""
        if protein not in self.encoded:
            self.encoded[protein] = self.residues.encode(self.proteins[protein])
        return self.encoded[protein]

    def windows(self, site: int, length: int) -> Weighted:
        """Where the model looks from for what it says of a site."""
        if self.window is None or length <= self.window:
            return whole(site, length, length)
        return self.rule(site, length, self.window)

    def masked(self, ids: np.ndarray, sites: Sequence[int]) -> np.ndarray:
        """A copy with those sites masked."""
        ids, places = ids.copy(), list(sites)
        ids[places] = self.residues.masks[self.residues.state_of[ids[places]]]
        return ids

    def run(self, passes: Iterable[Pass], total: int, what: str) -> Iterator[tuple[Pass, np.ndarray]]:
        """Each pass with log-probabilities float64 [R, A] at its reads, in an order that only the passes decide."""
        shown = track(
            self._run(passes),
            what,
            total,
            console=Console(stderr=True),
            transient=True,
            disable=not self.show_progress,
        )
        yield from shown

    def _run(self, passes: Iterable[Pass]) -> Iterator[tuple[Pass, np.ndarray]]:
        source = iter(passes)
        while planned := list(islice(source, PLANNED)):
            try:
                yield from self._run_planned(planned)
            except SequenceTooLongError as error:
                one = planned[error.row]
                raise RuntimeError(
                    f"{self.proteins[one.protein].id}: {len(one.ids):,} tokens at once do not fit into the memory of "
                    f"{self.model.device}: choose shorter windows, or a smaller dtype"
                ) from error

    def _run_planned(self, planned: list[Pass]) -> Iterator[tuple[Pass, np.ndarray]]:
        def step(rows: list[int]) -> tuple[list[Pass], np.ndarray]:
            batch = [planned[row] for row in rows]
            return batch, self._read(batch)

        lengths = [len(one.ids) for one in planned]
        for rows in token_batches(lengths, self.budget.tokens):
            for batch, found in self.budget.run(rows, lengths, step):
                ends = np.cumsum([len(one.reads) for one in batch])
                yield from zip(batch, np.split(found, ends[:-1]), strict=True)

    @torch.inference_mode()
    def _read(self, batch: list[Pass]) -> np.ndarray:
        """One batch through the model: log-probabilities float64 [R, A] at the reads of all its passes."""
        starts = np.cumsum([0, *(len(one.ids) for one in batch[:-1])])
        reads = [start + at for start, one in zip(starts, batch, strict=True) for at, _, _ in one.reads]
        logits = self.model(**packed([one.ids for one in batch], self.model.device)).logits[0]  # [T, V]
        logits = logits[torch.tensor(reads, device=logits.device)].double()  # [R, V]
        found = logits.log_softmax(-1)[:, self.residue_ids].logsumexp(-1)  # [R, A, states] -> [R, A]
        return found.cpu().numpy()


def _marginals(reader: Reader, variants: Sequence[Variant], scoring: Scoring) -> np.ndarray:
    """Sums over sites of log p(mutant) less log p(wild), the wild type being around."""
    keys: list[list[Key]] = []
    for variant in variants:
        first = reader.row(variant.protein)[1] if variant.substitutions else 0
        sites = tuple(first + place for _, place, _ in variant.substitutions)
        masks = [sites if scoring.multi == "joint" else (site,) for site in sites]
        if scoring.method == "wt-marginals":
            masks = [()] * len(sites)
        keys.append([(variant.protein, masked, site) for masked, site in zip(masks, sites, strict=True)])
    reads: dict[tuple[int, int, int, tuple[int, ...]], list[tuple[int, Key, float]]] = {}
    for protein, masked, site in dict.fromkeys(key for some in keys for key in some):
        ids, _ = reader.row(protein)
        for start, end, weight in reader.windows(site, len(ids)):
            inside = tuple(other - start for other in masked if start <= other < end)
            reads.setdefault((protein, start, end, inside), []).append((site - start, (protein, masked, site), weight))
    passes = (
        Pass(protein, reader.masked(reader.row(protein)[0][start:end], inside), wanted)
        for (protein, start, end, inside), wanted in reads.items()
    )
    tables: dict[Key, Any] = {}
    for one, found in reader.run(passes, len(reads), scoring.method):
        for (_, key, weight), row in zip(one.reads, found, strict=True):
            tables[key] = tables.get(key, 0.0) + weight * row
    letters = reader.residues.letters
    return np.array([
        sum(
            tables[key][letters[part.mutant]] - tables[key][letters[part.wild]]
            for key, part in zip(some, variant.substitutions, strict=True)
        )
        for some, variant in zip(keys, variants, strict=True)
    ], dtype=np.float64)  # fmt: skip


def _pseudo_perplexity(reader: Reader, variants: Sequence[Variant]) -> np.ndarray:
    """Sums over residues of log p of the residue where it is masked: of the mutant, less of the wild type."""
    mutants = [variant for variant in variants if variant.substitutions]
    wanted = list(dict.fromkeys([*(Variant(variant.protein, ()) for variant in mutants), *mutants]))
    number_of = {variant: number for number, variant in enumerate(wanted)}
    sums = np.zeros(len(wanted))
    counts = {
        variant.protein: sum(1 for _ in _each_masked(reader, Variant(variant.protein, ()), 0)) for variant in wanted
    }
    passes = (one for variant, number in number_of.items() for one in _each_masked(reader, variant, number))
    total = sum(counts[variant.protein] for variant in wanted)
    for one, found in reader.run(passes, total, "pseudo-perplexity"):
        for (_, (number, letter), weight), row in zip(one.reads, found, strict=True):
            sums[number] += weight * row[letter]
    wild = [sums[number_of[Variant(variant.protein, ())]] if variant.substitutions else 0.0 for variant in variants]
    own = [sums[number_of[variant]] if variant.substitutions else 0.0 for variant in variants]
    return np.array(own, dtype=np.float64) - np.array(wild, dtype=np.float64)


def _each_masked(reader: Reader, variant: Variant, number: int) -> Iterator[Pass]:
    """A pass for each residue that the model knows, masked alone in the mutant."""
    residues = reader.residues
    ids, first = reader.row(variant.protein)
    ids = ids.copy()
    for _, place, mutant in variant.substitutions:
        ids[first + place] = residues.ids[residues.letters[mutant], residues.state_of[ids[first + place]]]
    for site in range(first, first + len(reader.proteins[variant.protein].sequence)):
        letter = int(residues.letter_of[ids[site]])
        if letter < 0:
            continue
        for start, end, weight in reader.windows(site, len(ids)):
            row = reader.masked(ids[start:end], [site - start])
            yield Pass(variant.protein, row, [(site - start, (number, letter), weight)])
