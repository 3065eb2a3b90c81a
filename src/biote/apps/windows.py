"""Which part of a long protein a model sees: the two rules of ProteinGym (Notin et al. 2023, NeurIPS).

Both cut the row of tokens, special ones included; none is added to a window. `length` and `window` count tokens.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import exp

Weighted = tuple[tuple[int, int, float], ...]  # (start, end, weight), half open; the weights add up to 1
SHORTEST = 16  # tokens of a window


def whole(site: int, length: int, window: int) -> Weighted:
    """All of a protein that fits into one window."""
    return ((0, length, 1.0),)


def optimal(site: int, length: int, window: int) -> Weighted:
    """The one window with the site in its middle, or as near to that as the ends allow."""
    half = window // 2
    if site < half:
        return ((0, window, 1.0),)
    if site >= length - half:
        return ((length - window, length, 1.0),)
    return ((site - half, site + half, 1.0),)


def overlapping(site: int, length: int, window: int) -> Weighted:
    """Every window of a fixed tiling that holds the site, weighted less towards a window's ends."""
    weights = _weights(window)
    here = [(start, weights[site - start]) for start in _starts(length, window) if start <= site < start + window]
    total = sum(weight for _, weight in here)
    return tuple((start, start + window, weight / total) for start, weight in here)


@lru_cache
def _starts(length: int, window: int) -> tuple[int, ...]:
    """Windows from both ends inwards till they meet, and one in the middle if they overlap by less than half."""
    return tuple(_tiling(length, window))


def _tiling(length: int, window: int) -> Iterator[int]:
    stride = window // 2 - 1  # 511 of 1,024
    left, right = 0, length - window
    yield from (left, right)
    while left + window - 1 <= right:
        left, right = left + stride, right - stride
        yield from (left, right)
    if left + window - right < stride:
        yield length // 2 - window // 2


@lru_cache
def _weights(window: int) -> tuple[float, ...]:
    """Of a window's tokens: sigmoids over a quarter at either end, and 1 for the first token and the last.

    For 1,024 tokens they are ProteinGym's: over 256 tokens, centred at 128, 16 tokens wide; others in proportion.
    """
    ramp, centre, width = window // 4, window / 8, window / 64
    weights = [1.0] * window
    for place in range(1, ramp + 1):
        weights[place] = 1 / (1 + exp(-(place - centre) / width))
    for place in range(window - 2 - ramp, window - 1):
        weights[place] = 1 / (1 + exp((place - (window - 2) + centre) / width))
    return tuple(weights)


RULES: dict[str, Callable[[int, int, int], Weighted]] = {"optimal": optimal, "overlapping": overlapping}
