"""The mapping language: one list of rules says how a checkpoint's tensors become ours, and ours the checkpoint's.

A rule names keys of the foreign format on one side (`theirs`) and keys of our layout on the other (`ours`). Names may
hold fields such as {i} and {k}, which `Mapping.of(..., i=range(layers), k=("weight", "bias"))` expands. Every key of
the source must be read by exactly one rule and every key of the result made by exactly one; `Mapping.plan` checks
that, and every shape, on meta tensors, and raises all it finds in one MappingError before any tensor moves.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["from", "to"]  # from the foreign format, or to it
Specs = MappingABC[str, Tensor]  # meta tensors by key: shapes and dtypes
SHOWN = 10  # of a list in a message


def some_of(items: Sequence[str], separator: str = ", ") -> str:
    """The items in a row; of many the first few, and how many more there are."""
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])


class MappingError(ValueError):
    """Everything that keeps a checkpoint from being converted, in one message; of many problems the first few."""

    def __init__(self, where: str, problems: Sequence[str]):
        super().__init__(f"{where}: {len(problems)} problem{'s'[: len(problems) > 1]}: {some_of(problems, '; ')}")
        self.problems = list(problems)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One correspondence. `read` takes the foreign tensors to ours, `write` takes ours back; both keep dtypes.

    keep_dtype: a cast asked for by the user leaves these tensors alone.
    """

    theirs: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    keep_dtype: bool = False

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def sources(self, direction: Direction) -> tuple[str, ...]:
        """Keys the rule consumes."""
        return self.theirs if direction == "from" else self.ours

    def targets(self, direction: Direction) -> tuple[str, ...]:
        """Keys the rule produces."""
        return self.ours if direction == "from" else self.theirs

    def missing(self, direction: Direction, available: Specs) -> list[str]:
        """Source keys that must be there and are not."""
        return [key for key in self.sources(direction) if key not in available]

    def present(self, direction: Direction, available: Specs) -> list[str]:
        """Source keys that are there, in order."""
        return [key for key in self.sources(direction) if key in available]


@dataclass(frozen=True, kw_only=True)
class Rename(Rule):
    """The same tensor under another name."""


@dataclass(frozen=True, kw_only=True)
class FuseQKV(Rule):
    """Query, key and value become one tensor, rows ordered [head, (q, k, v), head_dim]; weights and biases alike."""

    heads: int

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        if len({x.dtype for x in tensors}) > 1:
            raise ValueError("query, key and value, one tensor of ours, have different dtypes: save them in one")
        rows = [x.unflatten(0, (self.heads, -1)) for x in tensors]  # each [heads, head_dim, ...]
        return [torch.stack(rows, 1).flatten(0, 2)]

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        rows = tensors[0].unflatten(0, (self.heads, 3, -1))
        return [rows[:, part].flatten(0, 1) for part in range(3)]


@dataclass(frozen=True, kw_only=True)
class Shared(Rule):
    """One tensor of ours that the foreign format stores once or several times over, always equal.

    It is written to `theirs` (a key with a field: to each) and read from them, or from any of the keys in `also`;
    all copies that are there must be equal. Tied weights and per-layer copies of one buffer are such tensors.
    """

    also: tuple[str, ...] = ()

    def sources(self, direction: Direction) -> tuple[str, ...]:
        return self.theirs + self.also if direction == "from" else self.ours

    def missing(self, direction: Direction, available: Specs) -> list[str]:
        if direction == "to":
            return super().missing(direction, available)
        if any(key in available for key in self.also):
            return []
        return [key for key in self.theirs if key not in available]

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        first, *others = tensors
        if any(x.shape != first.shape or x.dtype != first.dtype for x in others):
            raise ValueError("copies that must be equal have different shapes or dtypes")
        if not first.is_meta and not all(torch.equal(x, first) for x in others):
            raise ValueError("copies that must be equal differ")
        return [first]

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors * len(self.theirs)


@dataclass(frozen=True, kw_only=True)
class PadRows(Shared):
    """The foreign tensor has rows we do not have, `their_rows` for our `our_rows`, past the vocabulary.

    Reading drops them: no token id reaches them. Writing makes them anew, of `fill` (a number, or "min" for the lowest
    of the dtype, which keeps a softmax from ever choosing them).
    """

    our_rows: int
    their_rows: int
    fill: float | Literal["min"] = 0.0

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        self._expect_rows(tensors[0], self.their_rows)
        return [super().read(tensors)[0][: self.our_rows]]

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        x = tensors[0]
        self._expect_rows(x, self.our_rows)
        fill = torch.finfo(x.dtype).min if self.fill == "min" else self.fill
        padding = x.new_full((self.their_rows - self.our_rows, *x.shape[1:]), fill)
        return super().write([torch.cat((x, padding))])

    def _expect_rows(self, x: Tensor, rows: int) -> None:
        if x.shape[:1] != (rows,):
            raise ValueError(f"has the shape {list(x.shape)}, expected {rows} rows")


@dataclass(frozen=True, kw_only=True)
class Drop(Rule):
    """A foreign tensor that is read past, if it is there at all; never written. `why` says what makes that exact."""

    why: str

    def missing(self, direction: Direction, available: Specs) -> list[str]:
        return []

    def targets(self, direction: Direction) -> tuple[str, ...]:
        return ()

    def sources(self, direction: Direction) -> tuple[str, ...]:
        return self.theirs if direction == "from" else ()

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        return []


@dataclass(frozen=True, kw_only=True)
class Recompute(Rule):
    """A tensor of ours that the foreign format does not store: made by `make` when reading, left out when writing.

    exact: what is left out must be what `make` gives, else the tensor would come back another.
    """

    make: Callable[[], Tensor]
    why: str
    exact: bool = False

    def read(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self.make()]

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.exact and not tensors[0].is_meta and not torch.equal(tensors[0].cpu(), self.make()):
            raise ValueError("is not what it would be recomputed to, and the format has no place for it")
        return []


@dataclass(frozen=True, kw_only=True)
class LeaveOut(Rule):
    """Tensors of ours that the foreign format has no place for; only ever written (lost), never read."""

    why: str

    def missing(self, direction: Direction, available: Specs) -> list[str]:
        return []

    def targets(self, direction: Direction) -> tuple[str, ...]:
        return ()

    def write(self, tensors: list[Tensor]) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class Step:
    """One rule, bound to the keys of one checkpoint."""

    rule: Rule
    direction: Direction
    sources: tuple[str, ...]  # keys as the checkpoint spells them
    targets: tuple[str, ...]

    def apply(self, tensors: list[Tensor]) -> list[Tensor]:
        """Source tensors, in the order of `sources`, to target tensors, in the order of `targets`."""
        convert = self.rule.read if self.direction == "from" else self.rule.write
        try:
            return convert(tensors)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{', '.join(self.sources)}: {error}") from error


@dataclass(frozen=True)
class Plan:
    """The steps of one conversion, and what they make: a meta tensor (shape and dtype) by target key, in order."""

    steps: list[Step]
    made: dict[str, Tensor]


@dataclass(frozen=True)
class Mapping:
    """The rules of one format. `respell`: (regex, replacement) pairs from other spellings of keys to `theirs`."""

    rules: tuple[Rule, ...]
    respell: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, *rules: Rule, respell: Sequence[tuple[str, str]] = (), **fields: Iterable[object]) -> "Mapping":
        """Expand the fields that the names of `rules` hold."""
        values = {name: tuple(options) for name, options in fields.items()}
        return cls(tuple(one for rule in rules for one in _expand(rule, values)), tuple(respell))

    def under(self, theirs: str, ours: str) -> "Mapping":
        """The mapping of the bare model alone: rules whose keys lie under the two prefixes, without them."""
        inside = [r for r in self.rules if _all_under(r.theirs, theirs) and _all_under(r.ours, ours)]
        return Mapping(tuple(_strip(rule, theirs, ours) for rule in inside), self.respell)

    def plan(self, source: Specs, ours: Specs | None, direction: Direction, where: str = "checkpoint") -> Plan:
        """Bind the rules to the keys of `source`, and check keys and shapes.

        ours: the keys and shapes of our layout, which a reading must make and a writing must find; None trusts.
        Raises MappingError listing every missing, unknown, doubly claimed and mis-shaped key.
        """
        spelled = {self._canonical(key) if direction == "from" else key: key for key in source}
        known = {name: source[key] for name, key in spelled.items()}
        chosen = set(spelled.values())
        problems = [f"{key} is there under two spellings" for key in source if key not in chosen]
        steps: list[Step] = []
        made: dict[str, Tensor] = {}
        for rule in self.rules:
            missing, names = rule.missing(direction, known), rule.present(direction, known)
            problems += [f"missing {key}" for key in missing]
            if missing or not (names or isinstance(rule, Recompute)):
                continue
            step = Step(rule, direction, tuple(spelled[name] for name in names), rule.targets(direction))
            steps.append(step)
            try:
                made.update(zip(step.targets, step.apply([known[name] for name in names]), strict=True))
            except ValueError as error:
                problems.append(f"mis-shaped {error}")
        problems += self._claims(known, direction)
        if ours is not None and direction == "from":
            problems += self._against(ours, made)
        elif ours is not None:
            problems += mis_shaped(known, ours)
        if problems:
            raise MappingError(where, problems)
        return Plan(steps, {key: torch.empty_like(spec, device="meta") for key, spec in made.items()})

    def _claims(self, known: Specs, direction: Direction) -> list[str]:
        claims = Counter(key for rule in self.rules for key in rule.present(direction, known))
        twice = [f"{key} is read by {count} rules" for key, count in claims.items() if count > 1]
        products = Counter(key for rule in self.rules for key in rule.targets(direction))
        twice += [f"{key} is made by {count} rules" for key, count in products.items() if count > 1]
        return twice + [f"unknown {key}" for key in known if not claims[key]]

    def _against(self, ours: Specs, made: Specs) -> list[str]:
        makeable = {key for rule in self.rules for key in rule.ours}
        problems = [f"no rule makes {key}" for key in ours if key not in makeable]
        problems += [f"{key} is made, but the model has no such weight" for key in made if key not in ours]
        return problems + mis_shaped(made, ours)

    def _canonical(self, key: str) -> str:
        for pattern, replacement in self.respell:
            key = re.sub(pattern, replacement, key)
        return key


def mis_shaped(found: Specs, expected: Specs) -> list[str]:
    """What keeps tensors from standing for those expected, of the keys that both have."""
    both = {key: (found[key], spec) for key, spec in expected.items() if key in found}
    shapes = [
        f"mis-shaped {key}: {list(ours.shape)} instead of {list(spec.shape)}"
        for key, (ours, spec) in both.items()
        if ours.shape != spec.shape
    ]
    kinds = [
        f"{key} holds {str(ours.dtype).removeprefix('torch.')}, where floating-point numbers are due"
        for key, (ours, spec) in both.items()
        if spec.is_floating_point() and not ours.is_floating_point()
    ]
    return shapes + kinds


def refuse_nan(key: str, tensor: Tensor) -> None:
    """ValueError if a tensor holds NaN. A sum is NaN or infinite if any element is, and costs one pass."""
    if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())) and bool(tensor.isnan().any()):
        raise ValueError(f"{key} holds NaN")


def _expand(rule: Rule, values: dict[str, tuple[object, ...]]) -> Iterable[Rule]:
    names = sorted({name for key in rule.theirs + rule.ours for name in _fields(key)})
    if isinstance(rule, Shared):  # many copies of one tensor: the fields of `theirs` and `also` make a list
        yield replace(
            rule,
            theirs=tuple(one for key in rule.theirs for one in _fill(key, values)),
            also=tuple(one for key in rule.also for one in _fill(key, values)),
        )
        return
    for combination in product(*(values[name] for name in names)):
        chosen = dict(zip(names, combination, strict=True))
        yield replace(
            rule,
            theirs=tuple(key.format(**chosen) for key in rule.theirs),
            ours=tuple(key.format(**chosen) for key in rule.ours),
        )


def _fields(key: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(key) if name]


def _fill(key: str, values: dict[str, tuple[object, ...]]) -> list[str]:
    names = _fields(key)
    return [key.format(**dict(zip(names, c, strict=True))) for c in product(*(values[n] for n in names))]


def _all_under(keys: tuple[str, ...], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def _strip(rule: Rule, theirs: str, ours: str) -> Rule:
    rule = replace(
        rule,
        theirs=tuple(key.removeprefix(theirs) for key in rule.theirs),
        ours=tuple(key.removeprefix(ours) for key in rule.ours),
    )
    if isinstance(rule, Shared):
        rule = replace(rule, also=tuple(key.removeprefix(theirs) for key in rule.also if key.startswith(theirs)))
    return rule
