"""A graph is replayed as long as it does what the modules would do, and never else.

On a machine without a GPU a tape stands in for torch's graph: it, too, computes again on the memory it saw.
"""

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from biote.runtime import cuda_graphs
from biote.runtime.cuda_graphs import GraphedEncoder
from biote.runtime.encoder import EncoderModel
from biote.runtime.packing import plan_packing
from biote_esm2 import Esm2TEConfig, Esm2TEModel

OFF = "runs without CUDA graphs: "


class Tape(TorchDispatchMode):
    """The operations of a run and the memory they worked on, which `replay` has them work on again."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, out))))
        return out

    def pool(self) -> "Tape":
        return self

    def replay(self) -> None:
        Tape.replays += 1
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def stand_ins(monkeypatch) -> list[Any]:
    """Returns the pools that graphs were recorded into."""
    pools: list[Any] = []

    @contextmanager
    def record(graph, pool, stream, capture_error_mode):
        pools.append(pool)
        with graph:
            yield

    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(cuda_graphs, "_LANES", {})
    monkeypatch.setattr(EncoderModel, "_can_replay", on_cpu)
    return pools


def on_cpu(encoder: Any, _: Any) -> bool:
    return encoder.config.cuda_graphs and not encoder.training and not torch.is_grad_enabled()


@pytest.fixture(params=["cpu", *(pytest.param(engine, marks=pytest.mark.gpu) for engine in ("te", "torch"))])
def tiny(request, on_te):
    """Every port, where graphs are recorded: on both engines, and on the CPU by the stand-in."""
    if request.param != "cpu":
        return replace(on_te, engine=request.param)
    request.getfixturevalue("stand_ins")
    return replace(on_te, engine="torch", dtype=torch.float64, device="cpu", tolerance=1e-9)


def eager(tiny: Any, model: Any) -> Tensor:
    """What the model gives without graphs, as it is now."""
    model.config.cuda_graphs = False
    logits = tiny.logits(model)
    model.config.cuda_graphs = True
    return logits


def recorded(tiny: Any, **fields: Any) -> Any:
    """A model with one graph, which has been replayed."""
    model = tiny.model(cuda_graphs=True, **fields)
    for _ in range(2):
        found = tiny.logits(model)
    assert tiny.agree(found, eager(tiny, model))
    graph_of(model)
    return model


def graph_of(model: Any) -> Any:
    (graph,) = model.base_model.graphed.graphs.values()
    return graph


def fc1(model: Any) -> Any:
    return model.model.layers[1].mlp.fc1


def assigned(model: Any) -> None:
    state = {key: tensor.flip(0) if "layers.1." in key else tensor for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model: Any) -> None:
    model.model.layers[1].mlp.fc1 = copy.deepcopy(fc1(model))
    fc1(model).weight.data.copy_(fc1(model).weight.data.flip(0))


def exchanged(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def transposed(model: Any) -> None:
    weight = model.model.layers[1].attention.proj.weight
    weight.data = weight.data.T


def other_data(model: Any) -> None:
    fc1(model).weight.data = fc1(model).weight.data.flip(0)


RECORDED_ANEW: dict[str, Callable[[Any], Any]] = {
    "load_state_dict(assign=True)": assigned,
    "another Parameter": lambda model: setattr(fc1(model), "weight", nn.Parameter(fc1(model).weight.detach().flip(0))),
    "other data": other_data,
    "a transposed view": transposed,
    "another Linear": replaced,
    "layers exchanged": exchanged,
    "another eps": lambda model: setattr(model.model.layers[1].mlp.norm, "eps", 10.0),
}


@pytest.mark.parametrize("change", RECORDED_ANEW)
def test_what_has_changed_is_recorded_anew(tiny, change):
    model = recorded(tiny)
    before = eager(tiny, model)
    RECORDED_ANEW[change](model)
    expected = eager(tiny, model)
    assert not tiny.agree(before, expected)
    for _ in range(2):
        assert tiny.agree(tiny.logits(model), expected)
    graph_of(model)


class Doubled(nn.Module):
    """A parametrisation, and a module in the place of one of ours."""

    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x if self.inner is None else self.inner(x))


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Half:
    """Stands for what offloading does: the instance's own forward."""

    def __init__(self, forward: Callable[[Tensor], Tensor]):
        self.old = forward

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * self.old(x)


def twice_the_stream(block: nn.Module, _: Any, out: tuple) -> tuple:
    return 2 * out[0], *out[1:]


def hooked_everywhere(model: Any) -> Any:
    return global_hooks.register_module_forward_hook(lambda module, _, out: 2 * out if module is fc1(model) else None)


EAGER: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: fc1(model).register_forward_hook(lambda _, __, out: 2 * out),
    "pre-hook": lambda model: fc1(model).register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "hook of a layer": lambda model: model.model.layers[0].register_forward_hook(twice_the_stream),
    "global hook": hooked_everywhere,
    "parametrised": lambda model: parametrize.register_parametrization(fc1(model), "weight", Doubled()),
    "another class": lambda model: setattr(fc1(model), "__class__", Louder),
    "own forward": lambda model: setattr(fc1(model), "forward", Half(fc1(model).forward)),
    "wrapped": lambda model: setattr(model.model.layers[1].mlp, "fc1", Doubled(fc1(model))),
}


@pytest.mark.parametrize("other_size", [False, True], ids=["recorded", "other size"])
@pytest.mark.parametrize("change", EAGER)
def test_what_runs_the_python_of_others_is_not_replayed(tiny, change, other_size):
    """Nor recorded, in a size that has no graph yet."""
    model = recorded(tiny)
    if other_size:
        model.base_model.graphed.graphs["other"] = model.base_model.graphed.graphs.popitem()[1]
    before = eager(tiny, model)
    handle = EAGER[change](model)
    try:
        expected = eager(tiny, model)
        assert not tiny.agree(before, expected)
        with pytest.warns(UserWarning, match=f"{OFF}.*(fc1|layers.0|global)"):
            assert torch.equal(tiny.logits(model), expected)
        assert torch.equal(tiny.logits(model), expected)  # without another warning, which would be an error
        assert not model.base_model.graphed.graphs
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    if hasattr(handle, "remove"):
        assert tiny.agree(tiny.logits(model), before)
        graph_of(model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own affair
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_adapters_are_never_replayed(tiny):
    """Added, disabled, switched, merged: flags of peft's layers, which no graph reads."""
    model = recorded(tiny)
    seen = [eager(tiny, model)]

    def check(count: int) -> None:
        """What the model gives now; count: of different results until now."""
        expected = eager(tiny, model)
        assert torch.equal(tiny.logits(model), expected)
        if all(not tiny.agree(expected, other) for other in seen):
            seen.append(expected)
        assert len(seen) == count

    torch.manual_seed(1)
    options: Any = {"r": 2, "init_lora_weights": False, "target_modules": ["qkv", "proj", "fc1", "fc2"]}
    adapted = get_peft_model(model, LoraConfig(lora_alpha=8, **options)).eval()
    with pytest.warns(UserWarning, match=f"{OFF}layers.0.*peft"):
        tiny.logits(model)
    check(2)
    with adapted.disable_adapter():
        check(2)
        assert tiny.agree(tiny.logits(model), seen[0])
    adapted.add_adapter("other", LoraConfig(lora_alpha=16, **options))
    adapted.eval()
    check(2)
    adapted.set_adapter("other")
    check(3)
    adapted.merge_adapter()
    check(3)
    with torch.no_grad():
        adapted.unmerge_adapter()
    adapted.set_adapter("default")
    check(3)
    adapted.merge_and_unload()
    assert tiny.agree(tiny.logits(model), seen[1])
    graph_of(model)


@pytest.mark.parametrize("way", ["optimizer", "load_state_dict"])
def test_weights_updated_in_place_are_what_a_graph_reads(tiny, way):
    model = recorded(tiny)
    before, graph = eager(tiny, model), graph_of(model)
    if way == "optimizer":
        model.train()(**tiny.batch()).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.eval()
    else:
        state = {key: x.flip(0) if "layers.1." in key else x for key, x in model.state_dict().items()}
        model.load_state_dict(state)
    expected = eager(tiny, model)
    assert not tiny.agree(before, expected)
    assert tiny.agree(tiny.logits(model), expected)
    assert graph_of(model) is graph


def test_a_layer_in_training_drops_anew_each_time(tiny):
    model = recorded(tiny, hidden_dropout_prob=0.5)
    model.model.layers[1].train()
    with pytest.warns(UserWarning, match=rf"{OFF}layers.1 is in training mode"):
        first = tiny.logits(model)
    assert not tiny.agree(tiny.logits(model), first)
    model.eval()
    assert tiny.agree(tiny.logits(model), eager(tiny, model))
    graph_of(model)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own rms_norm under autocast
@pytest.mark.parametrize("engine", ["te", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_eager(on_te, engine, dtype):
    tiny = replace(on_te, engine=engine, dtype=torch.float16 if dtype is torch.bfloat16 else torch.bfloat16)
    model = recorded(tiny)
    without, graph = tiny.logits(model), graph_of(model)
    with torch.autocast("cuda", dtype=dtype):
        expected = eager(tiny, model)
        assert not torch.equal(expected, without)
        with pytest.warns(UserWarning, match=f"{OFF}torch.autocast is on"):
            assert torch.equal(tiny.logits(model), expected)
        assert torch.equal(tiny.logits(model), expected)
    assert torch.equal(tiny.logits(model), without)
    assert graph_of(model) is graph


def test_deterministic_algorithms_are_eager(stand_ins, on_te):
    tiny = replace(on_te, engine="torch", dtype=torch.float64, device="cpu", tolerance=1e-9)
    model = recorded(tiny)
    graph, replays = graph_of(model), Tape.replays
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(UserWarning, match=f"{OFF}torch.use_deterministic_algorithms is on"):
            assert tiny.agree(tiny.logits(model), eager(tiny, model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert Tape.replays == replays
    assert tiny.agree(tiny.logits(model), eager(tiny, model))
    assert graph_of(model) is graph
    assert Tape.replays == replays + 1


def test_inference_mode_and_no_grad_share_a_graph(tiny):
    model = tiny.model(cuda_graphs=True)
    expected, found = eager(tiny, model), []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(model(**{key: x for key, x in tiny.batch().items() if key != "labels"}).logits)
    assert [x.is_inference() for x in found] == [True, False, True]
    assert all(tiny.agree(x.double(), expected) for x in found)
    graph_of(model)


def other_rows(tiny: Any) -> dict[str, Tensor]:
    """Of the same lengths as the batch, so that they take the same graph."""
    batch = tiny.batch()
    return {"input_ids": batch["input_ids"].roll(1, 0), "attention_mask": batch["attention_mask"]}


def in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of tasks that start together."""
    barrier, results = threading.Barrier(len(tasks)), [None] * len(tasks)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = tasks[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def calls(tiny: Any, model: Any, batch: dict[str, Tensor], times: int = 20) -> list[Tensor]:
    """The logits of many calls, on a stream of their own."""
    on_cuda = tiny.device != "cpu"
    stream = torch.cuda.Stream(tiny.device) if on_cuda else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(tiny.device))
    with torch.cuda.stream(stream) if on_cuda else nullcontext(), torch.no_grad():
        found = [model(**batch).logits for _ in range(times)]
        if stream is not None:
            stream.synchronize()
    return [logits.double() for logits in found]


@pytest.mark.parametrize("models", [1, 2])
def test_two_threads(tiny, models):
    """They call one model, or one each, and record its graph while the other runs."""
    first = tiny.model(cuda_graphs=True)
    second = first if models == 1 else assigned_copy(first)
    batches = [{**tiny.batch()}, other_rows(tiny)]
    batches[0].pop("labels")
    expected = []
    for model, batch in zip((first, second), batches, strict=True):
        model.config.cuda_graphs = False
        expected.append(calls(tiny, model, batch, 1)[0])
        model.config.cuda_graphs = True
    assert not tiny.agree(*expected)
    found = in_threads(lambda: calls(tiny, first, batches[0]), lambda: calls(tiny, second, batches[1]))
    for results, right in zip(found, expected, strict=True):
        assert isinstance(results, list), results
        assert all(tiny.agree(logits, right) for logits in results)
    graph_of(first)
    graph_of(second)


def assigned_copy(model: Any) -> Any:
    other = copy.deepcopy(model)
    assigned(other)
    return other


def test_copies_record_graphs_of_their_own(tiny, tmp_path):
    model = recorded(tiny)
    graph, expected = graph_of(model), eager(tiny, model)
    other = copy.deepcopy(model)
    assert not other.base_model.graphed.graphs
    with torch.no_grad():
        fc1(other).weight.copy_(fc1(other).weight.flip(0))
    assert not tiny.agree(eager(tiny, other), expected)
    assert tiny.agree(tiny.logits(other), eager(tiny, other))
    assert graph_of(other) is not graph
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=tiny.dtype).to(tiny.device)
    assert tiny.agree(tiny.logits(again), expected)
    assert tiny.agree(tiny.logits(model), expected)
    assert graph_of(model) is graph


def test_graphs_end_with_their_model(tiny):
    """At once, by no collector of cycles; and a replaced weight's memory does not wait for the next call."""
    model = recorded(tiny)
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(fc1(model).weight)
        fc1(model).weight = nn.Parameter(torch.zeros_like(fc1(model).weight))
        assert weight() is None
        graph, encoder = weakref.ref(graph_of(model)), weakref.ref(model.base_model)
        del model
        assert encoder() is None
        assert graph() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["te", "torch"])
def test_memory_of_dropped_graphs_is_released(on_te, engine):
    model = replace(on_te, engine=engine).model(cuda_graphs=True)

    def held() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    with_graphs, without = [], []
    for _ in range(3):
        with torch.no_grad():
            for length in (64, 700, 1500):
                model(torch.full((1, length), 7, device="cuda"))
        assert len(model.base_model.graphed.graphs) == 3
        with_graphs.append(held())
        model.base_model.graphed.graphs.clear()
        without.append(held())
    assert with_graphs[1] > without[1]
    assert without[1] == without[0], "libraries keep what they took in the first round, graphs nothing"
    assert without[2] == without[0]


@pytest.mark.gpu
@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_scales_that_training_moves_are_those_of_a_replay(on_te, recipe):
    tiny = replace(on_te, tolerance=0.1)
    model = tiny.model(cuda_graphs=True, layer_precision="fp8", fp8_recipe=recipe)
    for _ in range(3):
        before = tiny.logits(model)
    assert tiny.agree(before, eager(tiny, model))
    graph = graph_of(model)
    tiny.logits(model)
    assert graph_of(model) is graph, "an eager run in between is no reason to record"
    model.train()(**tiny.batch()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.eval()
    expected = eager(tiny, model)
    assert not tiny.agree(before, expected)
    assert tiny.agree(tiny.logits(model), expected)


@pytest.mark.gpu
@pytest.mark.fp8
@pytest.mark.parametrize("assign", [False, True])
def test_quantised_weights_that_change_are_seen(on_te, assign):
    tiny = replace(on_te, tolerance=0.1)
    plain = tiny.model(layer_precision="fp8")
    model = plain.with_quantized_weights()
    model.config.cuda_graphs = True
    for _ in range(2):
        before = tiny.logits(model)
    assert tiny.agree(before, eager(tiny, model))
    assigned(plain)
    other = plain.with_quantized_weights().state_dict() if assign else plain.state_dict()
    model.load_state_dict(other, assign=assign)
    expected = eager(tiny, model)
    assert not tiny.agree(before, expected)
    for _ in range(2):
        assert tiny.agree(tiny.logits(model), expected)
    graph_of(model)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("engine", ["te", "torch"])
def test_graphs_are_of_the_gpu_the_model_is_on(on_te, engine):
    """There and back, with the current device always the first."""
    tiny = replace(on_te, engine=engine)
    model = recorded(tiny)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        there = replace(tiny, device=device)
        model.to(device)
        for batch in (there.batch(), other_rows(there)):
            batch.pop("labels", None)
            model.config.cuda_graphs = False
            (expected,) = calls(there, model, batch, 1)
            model.config.cuda_graphs = True
            assert all(there.agree(logits, expected) for logits in calls(there, model, batch, 3))
            with torch.no_grad():
                assert there.agree(model(**batch).logits.double(), expected)  # on the default stream
        graph_of(model)
        assert torch.cuda.current_device() == 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        model(torch.ones(1, 8, dtype=torch.long, device="cuda:0"))


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("engine", ["te", "torch"])
def test_two_threads_on_two_gpus(on_te, engine):
    tinies = [replace(on_te, engine=engine, device=device) for device in ("cuda:0", "cuda:1")]
    models = [tinies[0].model(cuda_graphs=True), assigned_copy(tinies[0].model(cuda_graphs=True)).to("cuda:1")]
    expected = [eager(tiny, model) for tiny, model in zip(tinies, models, strict=True)]
    assert not on_te.agree(*(logits.cpu() for logits in expected))
    tasks = [
        lambda tiny=tiny, model=model: calls(tiny, model, {k: x for k, x in tiny.batch().items() if k != "labels"})
        for tiny, model in zip(tinies, models, strict=True)
    ]
    for tiny, results, right in zip(tinies, in_threads(*tasks), expected, strict=True):
        assert isinstance(results, list), results
        assert all(tiny.agree(logits, right) for logits in results)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("engine", ["te", "torch"])
def test_replicas_of_data_parallel_are_eager(on_te, engine):
    tiny = replace(on_te, engine=engine, device="cuda:0")
    model = recorded(tiny)
    expected = eager(tiny, model)
    graph = graph_of(model)
    assert tiny.agree(tiny.logits(nn.DataParallel(model, [0, 1])), expected)
    assert graph_of(model) is graph


@pytest.fixture
def model():
    config = Esm2TEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, engine="torch")
    return Esm2TEModel(config).eval()


def test_a_pickle_has_no_graph(model):
    model.graphed.graphs["recorded"] = None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert not torch.load(buffer, weights_only=False).graphed.graphs
    assert model.graphed.graphs


@pytest.mark.parametrize("move", [lambda model: model.half(), lambda model: model.to("meta")])
def test_weights_that_move_leave_no_graph(model, move):
    model.graphed.graphs["recorded"] = None
    assert not move(model).graphed.graphs


def test_graphs_share_memory_which_ends_with_the_last(model, stand_ins):
    encoder = GraphedEncoder()

    def record(tokens):
        ids = torch.ones(1, tokens, dtype=torch.long)
        encoder(model, lambda ids, _: ids + 1, ids[0], plan_packing(ids))
        return next(reversed(encoder.graphs.values())).graph

    first = record(64)
    record(700)
    encoder.graphs.clear()
    record(64)
    assert stand_ins == [None, first, None]


BATCHES = [[[300], [290, 1]], [[64]], [[1] * 200, [65, *[1] * 140]], [[60] * 200, [7] * 1700]]


@pytest.mark.parametrize("batches", BATCHES)
def test_every_token_of_a_graph_is_in_a_sequence(batches, model, stand_ins):
    """Attention writes no row outside of the sequences, so the tokens that fill a graph up must be one."""
    encoder = GraphedEncoder()
    for lengths in batches:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.ones(1, int(bounds[-1]), dtype=torch.long)
        encoder(model, lambda ids, _: ids + 1, ids[0], plan_packing(ids, cu_seq_lens_q=bounds))
        graph = next(reversed(encoder.graphs.values())).packing
        within = graph.lengths
        assert within[: len(lengths)] == lengths
        assert sum(within) == len(graph.positions)
        assert max(within) <= graph.max_seqlen
        assert set(within[len(lengths) + 1 :]) <= {0}
