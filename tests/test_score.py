"""Scores of variants equal plain loops over the original in float64, written from ProteinGym's rules."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch

from biote.apps.score import AMINO_ACIDS, Scoring, score, window_of
from biote.apps.variants import Variant, read_variant
from biote.apps.windows import optimal, overlapping
from biote.convert import convert_model
from biote.data.sequences import Record
from biote.port import TE, ModelPort, port_named
from biote.testing.contract import randomize

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQ"
LONG = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSG"  # 50 residues, 52 tokens
VARIANTS = ["A4V", "K2R", "A4V:S13T", "M1A:Q22K", "S13T:A4G:H18H", "Y5Y"]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


@dataclass(frozen=True)
class Pair:
    """A tiny original in float64, every parameter random, and our model with its weights."""

    port: ModelPort
    original: Any
    model: Any

    @cached_property
    def tokenizer(self) -> Any:
        return self.port.build_tokenizer()

    def log_p(self, ids: list[int]) -> list[list[float]]:
        """log p [S][V] of one row, by the original."""
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = self.original(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        return (logits - logits.exp().sum(-1, keepdim=True).log()).tolist()

    def ids(self, sequence: str) -> list[int]:
        return self.tokenizer(sequence)["input_ids"]

    def id(self, letter: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(letter)

    def score(self, variants: list[str], sequence: str = SEQUENCE, **options: Any) -> np.ndarray:
        read = [read_variant(text, 0, sequence) for text in variants]
        return score(self.model, self.tokenizer, [Record("p", sequence)], read, Scoring(**options), batch_tokens=100)


@pytest.fixture(scope="module", params=["amplify", "esm2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Text ports: those that read proteins."""
    port = port_named(request.param)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = port.classes["AutoModelForMaskedLM"](port.config_class(engine="torch", **shape))
    original = convert_model(port, randomize(model, 0).double(), "hf", {}).eval()
    return Pair(port, original, convert_model(port, original, TE, {"engine": "torch"}).eval())


def split(variant: str) -> list[tuple[str, int, str]]:
    """`A4V` -> wild residue, its token (one special token before it), mutant; what changes nothing left out."""
    parts = [(part[0], int(part[1:-1]), part[-1]) for part in variant.split(":")]
    return [part for part in parts if part[0] != part[2]]


def masked_at(pair: Pair, ids: list[int], *sites: int) -> list[int]:
    return [pair.tokenizer.mask_token_id if at in sites else one for at, one in enumerate(ids)]


def mutated(pair: Pair, sequence: str, variant: str) -> list[int]:
    ids = pair.ids(sequence)
    for _, site, mutant in split(variant):
        ids[site] = pair.id(mutant)
    return ids


def test_wt_marginals(pair):
    log_p = pair.log_p(pair.ids(SEQUENCE))
    expected = [
        sum(log_p[site][pair.id(mutant)] - log_p[site][pair.id(wild)] for wild, site, mutant in split(variant))
        for variant in VARIANTS
    ]
    np.testing.assert_allclose(pair.score(VARIANTS, method="wt-marginals"), expected, **TOLERANCE)


def masked_marginals(pair: Pair, sequence: str, variant: str, joint: bool = False) -> float:
    total, ids = 0.0, pair.ids(sequence)
    sites = [site for _, site, _ in split(variant)]
    for wild, site, mutant in split(variant):
        log_p = pair.log_p(masked_at(pair, ids, *(sites if joint else [site])))[site]
        total += log_p[pair.id(mutant)] - log_p[pair.id(wild)]
    return total


@pytest.mark.parametrize("multi", ["sum", "joint"])
def test_masked_marginals(pair, multi):
    expected = [masked_marginals(pair, SEQUENCE, variant, multi == "joint") for variant in VARIANTS]
    np.testing.assert_allclose(pair.score(VARIANTS, multi=multi), expected, **TOLERANCE)


def test_sum_and_joint_differ_for_several_sites_only(pair):
    difference = abs(pair.score(VARIANTS) - pair.score(VARIANTS, multi="joint"))
    assert (difference[[0, 1, 5]] < 1e-9).all()
    assert (difference[[2, 3, 4]] > 1e-3).all()


def pseudo_perplexity(pair: Pair, ids: list[int]) -> float:
    """Sum of log p of each residue masked alone; ids begin and end with a special token."""
    return sum(pair.log_p(masked_at(pair, ids, site))[site][ids[site]] for site in range(1, len(ids) - 1))


def test_pseudo_perplexity(pair):
    wild = pseudo_perplexity(pair, pair.ids(SEQUENCE))
    expected = [pseudo_perplexity(pair, mutated(pair, SEQUENCE, variant)) - wild for variant in VARIANTS]
    found = pair.score(VARIANTS, method="pseudo-perplexity")
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    assert found[-1] == 0  # Y5Y


def optimal_window(site: int, tokens: int, window: int) -> tuple[int, int]:
    """MODELS: [0, W) if site < W/2; the last W if site >= tokens - W/2; else W/2 to either side."""
    if site < window // 2:
        return 0, window
    return (tokens - window, tokens) if site >= tokens - window // 2 else (site - window // 2, site + window // 2)


LONG_VARIANTS = ["M1A", "A4V:G50K", "L23A", "E31W", "K16D"]


def test_optimal_windows(pair):
    ids, expected = pair.ids(LONG), []
    for variant in LONG_VARIANTS:
        total = 0.0
        for wild, site, mutant in split(variant):
            start, end = optimal_window(site, len(ids), 20)
            log_p = pair.log_p(masked_at(pair, ids, site)[start:end])[site - start]
            total += log_p[pair.id(mutant)] - log_p[pair.id(wild)]
        expected.append(total)
    np.testing.assert_allclose(pair.score(LONG_VARIANTS, LONG, window_tokens=20), expected, **TOLERANCE)
    assert abs(pair.score(LONG_VARIANTS, LONG, window_tokens=0) - expected).min() > 1e-6


def test_optimal_windows_of_sites_masked_together(pair):
    """Each site in its own window, in which those of the others are masked that it reaches."""
    variant, sites, ids, expected = "K16D:R26K:G41A", (16, 26, 41), pair.ids(LONG), 0.0  # 26 - 10 is 16
    for wild, site, mutant in split(variant):
        start, end = optimal_window(site, len(ids), 20)
        log_p = pair.log_p(masked_at(pair, ids, *sites)[start:end])[site - start]
        expected += log_p[pair.id(mutant)] - log_p[pair.id(wild)]
    found = pair.score([variant], LONG, window_tokens=20, multi="joint")
    np.testing.assert_allclose(found, [expected], **TOLERANCE)


def test_optimal_windows_of_pseudo_perplexity(pair):
    def total(ids: list[int]) -> float:
        found = 0.0
        for site in range(1, len(ids) - 1):
            start, end = optimal_window(site, len(ids), 20)
            found += pair.log_p(masked_at(pair, ids, site)[start:end])[site - start][ids[site]]
        return found

    expected = [total(mutated(pair, LONG, variant)) - total(pair.ids(LONG)) for variant in LONG_VARIANTS[:2]]
    found = pair.score(LONG_VARIANTS[:2], LONG, window_tokens=20, method="pseudo-perplexity")
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def overlapping_log_p(pair: Pair, ids: list[int], window: int, masked: int | None = None) -> np.ndarray:
    """log p [S, V] as the text of MODELS has it, for windows of `window` tokens in place of 1,024.

    Windows from both ends, stride half a window less one, till they overlap, and one in the middle if by less than
    the stride; sigmoid weights over a quarter of a window.
    """
    scale = window / 1024
    weights = np.ones(window)
    for i in range(1, round(256 * scale) + 1):
        weights[i] = 1 / (1 + math.exp(-(i - 128 * scale) / (16 * scale)))
    for i in range(window - 2 - round(256 * scale), window - 1):
        weights[i] = 1 / (1 + math.exp((i - (window - 2) + 128 * scale) / (16 * scale)))
    total, sums, row = np.zeros(len(ids)), None, ids if masked is None else masked_at(pair, ids, masked)
    starts, left, right = [], 0, len(ids) - window
    while True:
        starts += [left, right]
        if left + window - 1 > right:
            break
        left, right = left + window // 2 - 1, right - (window // 2 - 1)
    if left + window - right < window // 2 - 1:
        starts.append(len(ids) // 2 - window // 2)
    for start in starts:
        log_p = np.array(pair.log_p(row[start : start + window]))
        sums = np.zeros((len(ids), log_p.shape[1])) if sums is None else sums
        sums[start : start + window] += weights[:, None] * log_p
        total[start : start + window] += weights
    return sums / total[:, None]


@pytest.mark.parametrize("window", [16, 20, 32, 48, 51])
def test_overlapping_windows(pair, window):
    ids = pair.ids(LONG)
    log_p = overlapping_log_p(pair, ids, window)
    expected = [
        sum(log_p[site][pair.id(mutant)] - log_p[site][pair.id(wild)] for wild, site, mutant in split(variant))
        for variant in LONG_VARIANTS
    ]
    found = pair.score(LONG_VARIANTS, LONG, window_tokens=window, method="wt-marginals")
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_a_rule_may_be_asked_for(pair):
    ids, wild, site, mutant = pair.ids(LONG), *split(LONG_VARIANTS[0])[0]
    log_p = overlapping_log_p(pair, ids, 20, masked=site)[site]
    found = pair.score(LONG_VARIANTS[:1], LONG, window_tokens=20, window="overlapping")
    np.testing.assert_allclose(found, [log_p[pair.id(mutant)] - log_p[pair.id(wild)]], **TOLERANCE)


@pytest.mark.parametrize("length", [1025, 1536, 1537, 2046, 2047, 2048, 2558, 2559, 5000])
def test_windows_of_1024_tokens_are_proteingyms(length):
    """Those of 1,024 tokens by the literal numbers of ProteinGym."""
    weights = [1.0] * 1024
    for i in range(1, 257):
        weights[i] = 1 / (1 + math.exp(-(i - 128) / 16))
    for i in range(1022 - 256, 1023):
        weights[i] = 1 / (1 + math.exp((i - 1022 + 128) / 16))
    first, last = [0, 1023], [length - 1024, length - 1]
    windows = [tuple(first), tuple(last)]
    while first[1] <= last[0]:
        first, last = [x + 511 for x in first], [x - 511 for x in last]
        windows += [tuple(first), tuple(last)]
    if first[1] - last[0] + 1 < 511:
        windows.append((length // 2 - 512, length // 2 + 511))
    for site in range(length):
        over = [(a, b + 1, weights[site - a]) for a, b in windows if a <= site <= b]
        total = sum(weight for *_, weight in over)
        found = overlapping(site, length, 1024)
        assert found == tuple((a, b, weight / total) for a, b, weight in over)
        start, end, weight = optimal(site, length, 1024)[0]
        assert (start, end) == optimal_window(site, length, 1024)
        assert weight == 1


def test_several_proteins_and_any_order(pair):
    """Batches hold passes of several proteins; a score is a variant's own."""
    proteins = [Record("one", SEQUENCE), Record("two", LONG), Record("three", SEQUENCE[::-1])]
    texts = [(1, "A4V"), (0, "A4V"), (2, "R2K"), (1, "E31W"), (0, "K2R")]
    variants = [read_variant(text, number, proteins[number].sequence) for number, text in texts]
    for method in ("masked-marginals", "wt-marginals", "pseudo-perplexity"):
        together = score(pair.model, pair.tokenizer, proteins, variants, Scoring(method), batch_tokens=200)
        alone = [pair.score([text], proteins[number].sequence, method=method)[0] for number, text in texts]
        np.testing.assert_allclose(together, alone, **TOLERANCE)


def test_only_what_is_needed_is_run(pair, monkeypatch):
    rows: list[int] = []
    forward = pair.model.forward

    def counting(**inputs: Any) -> Any:
        rows.append(len(inputs["cu_seq_lens_q"]) - 1)
        return forward(**inputs)

    monkeypatch.setattr(pair.model, "forward", counting)
    pair.score(VARIANTS)
    assert sum(rows) == 5  # sites 1, 2, 4, 13 and 22, each once
    assert max(rows) == 4  # of 24 tokens in a budget of 100
    rows.clear()
    pair.score(VARIANTS, method="wt-marginals")
    assert rows == [1]
    rows.clear()
    assert pair.score(["Y5Y"]) == [0.0]
    assert rows == []


def test_out_of_memory_halves_the_budget(pair, monkeypatch):
    expected, forward = pair.score(VARIANTS), pair.model.forward

    def small(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] > 30:
            raise torch.OutOfMemoryError("no")
        return forward(**inputs)

    monkeypatch.setattr(pair.model, "forward", small)
    np.testing.assert_allclose(pair.score(VARIANTS), expected, **TOLERANCE)
    with pytest.raises(RuntimeError, match="p: 52 tokens at once do not fit into the memory of cpu"):
        pair.score(["A4V"], LONG)


class PairTokenizer:
    """A token for each residue and state of it; a residue's state is its place modulo 3."""

    mask_token_id = 4

    def get_vocab(self) -> dict[str, int]:
        tokens = [letter + state for letter in AMINO_ACIDS + "#" for state in "xyz"]
        return {token: number for number, token in enumerate(tokens, 5)}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = [self.get_vocab()[letter + "xyz"[place % 3]] for place, letter in enumerate(text)]
        return {"input_ids": [0, *ids, 2], "special_tokens_mask": [1, *[0] * len(ids), 1]}


@pytest.mark.parametrize("method", ["masked-marginals", "pseudo-perplexity"])
def test_a_residue_of_several_tokens(monkeypatch, method):
    """Their probabilities add up, a mask keeps the state, and so does a mutant."""
    port, tokenizer = port_named("esm2"), PairTokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = port.config_class(engine="torch", vocab_size=5 + 3 * 21, token_dropout=False, **shape)
    model = randomize(port.classes["AutoModelForMaskedLM"](config), 0).double().eval()
    declared = replace(port, residue_tokens=lambda letter: tuple(letter + state for state in "xyz"), mask_letter="#")
    monkeypatch.setattr("biote.apps.score.port_of", lambda cls: declared)
    vocabulary = tokenizer.get_vocab()

    def log_p(ids: list[int], site: int, letter: str) -> float:
        masked = [vocabulary["#" + "xyz"[(site - 1) % 3]] if at == site else one for at, one in enumerate(ids)]
        with torch.no_grad():
            p = model(input_ids=torch.tensor([masked])).logits[0, site].softmax(-1)
        return math.log(sum(float(p[vocabulary[letter + state]]) for state in "xyz"))

    wild = tokenizer(SEQUENCE)["input_ids"]
    if method == "masked-marginals":
        expected = log_p(wild, 4, "V") - log_p(wild, 4, "A") + log_p(wild, 2, "R") - log_p(wild, 2, "K")
    else:
        sequence = "MRTV" + SEQUENCE[4:]
        mutant = tokenizer(sequence)["input_ids"]
        expected = sum(log_p(mutant, site, letter) for site, letter in enumerate(sequence, 1)) - sum(
            log_p(wild, site, letter) for site, letter in enumerate(SEQUENCE, 1)
        )
    variant = read_variant("A4V:K2R", 0, SEQUENCE)
    found = score(model, tokenizer, [Record("p", SEQUENCE)], [variant], Scoring(method))
    np.testing.assert_allclose(found, [expected], **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "dtype"), [("torch", "float64"), ("torch", "float32"), ("te", "float32")])
@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "pseudo-perplexity"])
def test_on_a_gpu(pair, method, engine, dtype):
    expected = pair.score(LONG_VARIANTS, LONG, method=method, window_tokens=20)
    model = convert_model(pair.port, pair.original, TE, {"engine": engine}).to("cuda", getattr(torch, dtype)).eval()
    found = replace(pair, model=model).score(LONG_VARIANTS, LONG, method=method, window_tokens=20)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 if dtype == "float64" else 1e-2)


def test_windows_are_as_long_as_the_model_was_trained():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    for name, fields, expected in (
        ("esm2", {}, 1024),  # it can read any length
        ("amplify", {}, 2048),
        ("amplify", {"max_position_embeddings": 512}, 512),
    ):
        port = port_named(name)
        model = port.classes["AutoModelForMaskedLM"](port.config_class(engine="torch", **shape, **fields))
        assert window_of(model) == expected
        assert window_of(model, 0) is None
        assert window_of(model, 100) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"multi": "both"}, "unknown multi 'both'"),
        ({"window": "none"}, "unknown window 'none'"),
        ({"multi": "joint", "method": "wt-marginals"}, "which wt-marginals does not"),
        ({"multi": "joint", "method": "pseudo-perplexity"}, "which pseudo-perplexity does not"),
        ({"window_tokens": 5}, "window of 5 tokens is too short"),
    ],
)
def test_choices_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A4", "is no variant like"),
        ("A4V,S13T", "is no variant like"),
        ("", "is no variant like"),
        ("a4v", "is no variant like"),
        ("A4_5del", "is no variant like"),
        ("S4V", "says S, but residue 4 of the protein is A"),
        ("A0V", "outside the protein, whose residues are 1 to 22"),
        ("A23V", "outside the protein"),
        ("A-1V", "outside the protein"),
        ("A4V:A4G", "has residue 4 twice"),
    ],
)
def test_variants_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        read_variant(text, 0, SEQUENCE)


def test_offset():
    assert read_variant("A103V", 0, SEQUENCE, offset=100) == read_variant("A4V", 0, SEQUENCE)
    assert read_variant("M-1A", 0, SEQUENCE, offset=-1).substitutions[0].place == 0


def test_applied():
    variant = read_variant("A4V:K2R", 3, SEQUENCE)
    assert variant.applied(SEQUENCE) == "MRTV" + SEQUENCE[4:]
    assert variant == Variant(3, (("K", 1, "R"), ("A", 3, "V")))
    assert len(set(AMINO_ACIDS)) == 20
