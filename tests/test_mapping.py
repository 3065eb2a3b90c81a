"""The mapping language on state dicts small enough to write out by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biote.mapping import (
    Drop,
    FuseQKV,
    LeaveOut,
    Mapping,
    MappingError,
    PadRows,
    Recompute,
    Rename,
    Rule,
    Shared,
    refuse_nan,
)

State = dict[str, Tensor]
FUSE = FuseQKV(theirs=("q", "k", "v"), ours=("qkv",), heads=2)
PAD = PadRows(theirs=("w",), ours=("w",), our_rows=2, their_rows=4)
SHARED = Shared(theirs=("a.{i}",), also=("all", "b.{i}"), ours=("x",))


def numbers(*shape: int, start: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that are all different, so that no two rows can be taken for each other."""
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + start).reshape(shape).to(dtype)


def meta(state: State) -> State:
    return {key: tensor.to("meta") for key, tensor in state.items()}


def convert(mapping: Mapping, state: State, direction: Any, target: State | None = None) -> State:
    made: State = {}
    for step in mapping.plan(meta(state), target, direction).steps:
        made.update(zip(step.targets, step.apply([state[key] for key in step.sources]), strict=True))
    return made


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def problems_of(rules: list[Rule], source: State, target: State | None, direction: Any = "from") -> list[str]:
    with pytest.raises(MappingError) as caught:
        Mapping.of(*rules, i=range(2)).plan(meta(source), target and meta(target), direction, "somewhere")
    assert str(caught.value).startswith(f"somewhere: {len(caught.value.problems)} problem")
    return caught.value.problems


def fused_by_loop(parts: list[Tensor], heads: int) -> Tensor:
    """[head, (q, k, v), head_dim], one row after another."""
    head_dim = len(parts[0]) // heads
    return torch.stack([part[h * head_dim + d] for h in range(heads) for part in parts for d in range(head_dim)])


@pytest.mark.parametrize("tail", [(), (5,)], ids=["bias", "weight"])
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_fuse_qkv_orders_rows_by_head(heads: int, tail: tuple[int, ...]) -> None:
    mapping = Mapping.of(FuseQKV(theirs=("q", "k", "v"), ours=("qkv",), heads=heads))
    theirs = {name: numbers(6, *tail, start=100 * i) for i, name in enumerate("qkv")}
    ours = {"qkv": fused_by_loop(list(theirs.values()), heads)}
    assert_same(convert(mapping, theirs, "from"), ours)
    assert_same(convert(mapping, ours, "to"), theirs)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 4),
    tail=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_fuse_qkv_round_trip(heads: int, head_dim: int, tail: list[int], dtype: torch.dtype) -> None:
    mapping = Mapping.of(FuseQKV(theirs=("q", "k", "v"), ours=("qkv",), heads=heads))
    theirs = {name: numbers(heads * head_dim, *tail, start=200 * i, dtype=dtype) for i, name in enumerate("qkv")}
    fused = convert(mapping, theirs, "from")
    assert_same(fused, {"qkv": fused_by_loop(list(theirs.values()), heads)})
    assert_same(convert(mapping, fused, "to"), theirs)


CASES: dict[str, tuple[Rule, State, State]] = {  # rule, their state, our state
    "rename": (
        Rename(theirs=("layer.{i}.{k}",), ours=("layers.{i}.x.{k}",)),
        {f"layer.{i}.{k}": numbers(2, start=10 * i + len(k)) for i in range(2) for k in ("weight", "bias")},
        {f"layers.{i}.x.{k}": numbers(2, start=10 * i + len(k)) for i in range(2) for k in ("weight", "bias")},
    ),
    "fuse": (FUSE, {"q": numbers(2), "k": numbers(2, start=5), "v": numbers(2, start=9)},
             {"qkv": torch.tensor([1.0, 5.0, 9.0, 2.0, 6.0, 10.0])}),
    "shared": (SHARED, {"a.0": numbers(3), "a.1": numbers(3)}, {"x": numbers(3)}),
    "pad_zeros": (PAD, {"w": torch.tensor([[1.0], [2.0], [0.0], [0.0]])}, {"w": torch.tensor([[1.0], [2.0]])}),
    "pad_number": (PadRows(theirs=("w",), ours=("w",), our_rows=1, their_rows=3, fill=-7.0),
                   {"w": torch.tensor([1.0, -7.0, -7.0])}, {"w": torch.tensor([1.0])}),
    "pad_nothing": (PadRows(theirs=("w",), ours=("w",), our_rows=3, their_rows=3), {"w": numbers(3, 2)},
                    {"w": numbers(3, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_read_and_write(case: str) -> None:
    rule, theirs, ours = CASES[case]
    mapping = Mapping.of(rule, i=range(2), k=("weight", "bias"))
    assert_same(convert(mapping, theirs, "from", meta(ours)), ours)
    assert_same(convert(mapping, ours, "to"), theirs)


@pytest.mark.parametrize(
    ("dtype", "lowest"),
    [(torch.float16, -65504.0), (torch.bfloat16, -(2 - 2**-7) * 2.0**127), (torch.float32, -(2 - 2**-23) * 2.0**127)],
)
def test_pad_rows_with_the_lowest_number(dtype: torch.dtype, lowest: float) -> None:
    rule = PadRows(theirs=("b",), ours=("b",), our_rows=1, their_rows=2, fill="min")
    expected = torch.tensor([3.0, lowest], dtype=dtype)
    assert_same(convert(Mapping.of(rule), {"b": torch.tensor([3.0], dtype=dtype)}, "to"), {"b": expected})


def test_drop_is_read_past_and_never_written() -> None:
    rules = (Drop(theirs=("old.{i}",), why="unused"), Rename(theirs=("a",), ours=("b",)))
    mapping = Mapping.of(*rules, i=range(2))
    for extra in ({}, {"old.1": numbers(1)}, {"old.0": numbers(1), "old.1": numbers(9)}):
        assert_same(convert(mapping, {"a": numbers(2), **extra}, "from", {"b": numbers(2)}), {"b": numbers(2)})
    assert_same(convert(mapping, {"b": numbers(2)}, "to"), {"a": numbers(2)})
    with pytest.raises(MappingError, match=r"1 problem: unknown old\.0$"):
        mapping.plan(meta({"b": numbers(2), "old.0": numbers(1)}), None, "to")


def test_recompute_is_made_when_reading_and_left_out_when_writing() -> None:
    mapping = Mapping.of(Recompute(ours=("f",), make=lambda: numbers(3), why="not stored"))
    assert_same(convert(mapping, {}, "from", {"f": numbers(3)}), {"f": numbers(3)})
    assert_same(convert(mapping, {"f": numbers(3, start=50)}, "to"), {})


def test_leave_out_is_lost_when_writing_and_never_made() -> None:
    mapping = Mapping.of(LeaveOut(ours=("head.{k}",), why="no place"), k=("weight", "bias"))
    for state in ({}, {"head.bias": numbers(1)}, {"head.weight": numbers(2), "head.bias": numbers(1)}):
        assert_same(convert(mapping, state, "to"), {})
    assert_same(convert(mapping, {}, "from", {}), {})


@pytest.mark.parametrize("keys", [("a.0", "a.1"), ("all",), ("b.1",), ("a.0", "all"), ("a.0", "a.1", "b.0", "all")])
def test_shared_is_read_from_any_copies(keys: tuple[str, ...]) -> None:
    mapping = Mapping.of(SHARED, i=range(2))
    assert_same(convert(mapping, {key: numbers(3) for key in keys}, "from"), {"x": numbers(3)})


@pytest.mark.parametrize(("there", "absent"), [((), ("a.0", "a.1")), (("a.0",), ("a.1",))])
def test_shared_without_enough_copies(there: tuple[str, ...], absent: tuple[str, ...]) -> None:
    found = problems_of([SHARED], {key: numbers(3) for key in there}, {"x": numbers(3)})
    assert found == [f"missing {key}" for key in absent]
    assert problems_of([SHARED], {}, None, "to") == ["missing x"]


@pytest.mark.parametrize(
    "rule", [SHARED, PadRows(theirs=("a.0",), also=("all",), ours=("x",), our_rows=1, their_rows=3)]
)
def test_copies_that_differ(rule: Rule) -> None:
    mapping = Mapping.of(rule, i=range(1))
    state = {"a.0": numbers(3), "all": numbers(3)}
    state["all"][2] += 1
    (step,) = mapping.plan(meta(state), None, "from").steps  # values are not known yet
    with pytest.raises(ValueError, match=r"^a\.0, all: copies that must be equal differ$"):
        step.apply(list(state.values()))
    with pytest.raises(MappingError, match=r"mis-shaped a\.0, all: .*"):
        mapping.plan(meta({"a.0": numbers(3), "all": numbers(4)}), None, "from")


def test_keys_in_other_spellings() -> None:
    respell = [(r"gamma$", "weight"), (r"^old\.", "new.")]
    mapping = Mapping.of(Rename(theirs=("new.{k}",), ours=("x.{k}",)), respell=respell, k=("weight", "bias"))
    spelled = {"old.gamma": numbers(2), "new.bias": numbers(3)}
    assert_same(convert(mapping, spelled, "from"), {"x.weight": numbers(2), "x.bias": numbers(3)})
    ours = {"x.weight": numbers(2), "x.bias": numbers(3)}
    assert_same(convert(mapping, ours, "to"), {"new.weight": numbers(2), "new.bias": numbers(3)})
    with pytest.raises(MappingError, match=r"old\.bias is there under two spellings") as caught:
        mapping.plan(meta({"old.bias": numbers(2), **spelled}), None, "from")
    assert len(caught.value.problems) == 1


def test_our_keys_have_one_spelling() -> None:
    mapping = Mapping.of(Rename(theirs=("weight",), ours=("gamma",)), respell=[("gamma$", "weight")])
    assert_same(convert(mapping, {"gamma": numbers(2)}, "to"), {"weight": numbers(2)})


def test_under_keeps_the_bare_model_alone() -> None:
    rules = [
        Rename(theirs=("esm.{k}",), ours=("model.x.{k}",)),
        Rename(theirs=("head.{k}",), ours=("head.{k}",)),
        Rename(theirs=("esm.pooler",), ours=("pooler",)),
        Shared(theirs=("esm.words",), also=("decoder", "esm.copy"), ours=("model.words",)),
        Drop(theirs=("esm.old",), why="unused"),
        Drop(theirs=("older",), why="unused"),
        Recompute(ours=("model.f",), make=lambda: numbers(1), why="not stored"),
    ]
    bare = Mapping.of(*rules, respell=[("gamma$", "weight")], k=("weight",)).under("esm.", "model.")
    ours = {"x.weight": numbers(2), "words": numbers(4), "f": numbers(1)}
    theirs = {"gamma": numbers(2), "copy": numbers(4), "old": numbers(3)}
    assert_same(convert(bare, theirs, "from", meta(ours)), ours)
    assert_same(convert(bare, ours, "to"), {"weight": numbers(2), "words": numbers(4)})
    for key in ("head.weight", "pooler", "decoder", "older", "esm.words"):
        with pytest.raises(MappingError, match=f"1 problem: unknown {key}$"):
            bare.plan(meta({**theirs, key: numbers(4)}), None, "from")


def test_every_problem_in_one_error() -> None:
    rules: list[Rule] = [
        Rename(theirs=("a",), ours=("a",)),
        Rename(theirs=("absent.{i}",), ours=("absent.{i}",)),
        Rename(theirs=("twice",), ours=("first",)),
        Rename(theirs=("twice",), ours=("second",)),
        Rename(theirs=("one",), ours=("both",)),
        Rename(theirs=("two",), ours=("both",)),
        Rename(theirs=("spare",), ours=("spare",)),
        Rename(theirs=("long",), ours=("long",)),
        FUSE,
    ]
    there = ["a", "twice", "one", "two", "spare", "long", "stranger", "q", "k"]
    target = ["a", "absent.0", "absent.1", "first", "second", "both", "nobody", "qkv"]
    found = problems_of(
        rules,
        {key: numbers(3) for key in there},
        {**{key: numbers(3) for key in target}, "long": numbers(5), "qkv": numbers(9)},
    )
    assert sorted(found) == sorted([
        "missing absent.0",
        "missing absent.1",
        "missing v",
        "twice is read by 2 rules",
        "unknown stranger",
        "both is made by 2 rules",
        "no rule makes nobody",
        "spare is made, but the model has no such weight",
        "mis-shaped long: [3] instead of [5]",
    ])  # fmt: skip


def test_problems_when_writing() -> None:
    found = problems_of(
        [FUSE, Rename(theirs=("x.{i}",), ours=("y.{i}",)), Recompute(ours=("f",), make=lambda: numbers(1), why="")],
        {"qkv": numbers(12), "y.1": numbers(1), "stranger": numbers(1)},
        None,
        "to",
    )
    assert sorted(found) == ["missing f", "missing y.0", "unknown stranger"]


def test_two_rules_that_write_one_foreign_key() -> None:
    rules: list[Rule] = [Rename(theirs=("x",), ours=("a",)), Rename(theirs=("x",), ours=("b",))]
    assert problems_of(rules, {"a": numbers(1), "b": numbers(1)}, None, "to") == ["x is made by 2 rules"]


@pytest.mark.parametrize(
    ("rule", "source", "direction"),
    [
        (FUSE, {"q": (3,), "k": (3,), "v": (3,)}, "from"),  # 2 heads
        (FUSE, {"q": (4,), "k": (2,), "v": (4,)}, "from"),
        (FUSE, {"q": (4, 2), "k": (4, 3), "v": (4, 2)}, "from"),
        (FUSE, {"q": (), "k": (), "v": ()}, "from"),
        (FUSE, {"qkv": (4,)}, "to"),
        (PAD, {"w": (3, 5)}, "from"),
        (PAD, {"w": ()}, "from"),
        (PAD, {"w": (3, 5)}, "to"),
        (PAD, {"w": ()}, "to"),
    ],
)
def test_shapes_that_a_rule_cannot_take(rule: Rule, source: dict[str, tuple[int, ...]], direction: str) -> None:
    (problem,) = problems_of([rule], {key: numbers(*shape) for key, shape in source.items()}, None, direction)
    assert problem.startswith(f"mis-shaped {', '.join(source)}: ")


def test_plan_moves_nothing_and_says_what_will_be_made() -> None:
    theirs = {**{name: numbers(4, 3, dtype=torch.float16) for name in "qkv"}, "n": numbers(2).long()}
    made_anew = Recompute(ours=("f",), make=lambda: numbers(5), why="not stored")
    plan = Mapping.of(Rename(theirs=("n",), ours=("m",)), FUSE, made_anew).plan(meta(theirs), None, "from")
    assert [step.sources for step in plan.steps] == [("n",), ("q", "k", "v"), ()]
    made = {key: (spec.device.type, spec.dtype, tuple(spec.shape)) for key, spec in plan.made.items()}
    expected = {"m": (torch.int64, (2,)), "qkv": (torch.float16, (12, 3)), "f": (torch.float32, (5,))}
    assert made == {key: ("meta", *spec) for key, spec in expected.items()}


def test_what_becomes_one_tensor_has_one_dtype() -> None:
    """Or the way back would not give each its own again."""
    with pytest.raises(ValueError, match="different shapes or dtypes"):
        Shared(theirs=("a", "b"), ours=("c",)).read([numbers(2), numbers(2).double()])
    theirs = {"q": numbers(4, 3, dtype=torch.float16), "k": numbers(4, 3), "v": numbers(4, 3)}
    with pytest.raises(MappingError, match="query, key and value, one tensor of ours, have different dtypes"):
        Mapping.of(FUSE).plan(meta(theirs), None, "from")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_is_refused_and_infinity_is_not(dtype: torch.dtype) -> None:
    inf = float("inf")
    for fine in ([inf, -inf, 0.0], [inf, inf], [60000.0] * 4, []):
        refuse_nan("x", torch.tensor(fine, dtype=dtype))
    refuse_nan("x", torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^x holds NaN$"):
        refuse_nan("x", torch.tensor([[1.0, inf], [float("nan"), -inf]], dtype=dtype))
