"""Who hooks, wraps, parametrises or replaces a module gets what it says, though engines fuse around untouched ones."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize, prune

LEAVES = ("attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.fc1", "mlp.fc2")


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors_of(one)] if isinstance(value, (tuple, list)) else []


class Watcher:
    """A hook that keeps what it sees, and a copy of it as it was at that time."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[tuple[list[Tensor], list[Tensor]]]] = {}

    def __call__(self, module: nn.Module, given: Any, out: Any) -> None:
        kept = tensors_of(given) + tensors_of(out)
        self.calls.setdefault(module, []).append((kept, [tensor.clone() for tensor in kept]))

    def check(self) -> None:
        for module, calls in self.calls.items():
            for kept, copies in calls:
                assert all(torch.equal(now, then) for now, then in zip(kept, copies, strict=True)), module


@contextmanager
def watched(model: nn.Module, everywhere: bool) -> Iterator[Watcher]:
    watcher = Watcher()
    if everywhere:
        handles = [global_hooks.register_module_forward_hook(watcher)]
    else:
        handles = [module.register_forward_hook(watcher) for module in model.modules()]
    yield watcher
    for handle in handles:
        handle.remove()


def by_definition(module: Any, x: Tensor) -> Tensor:
    """What a norm or a product is, in float64."""
    x, weight = x.detach().double(), module.weight.detach().double()
    if isinstance(module, nn.Linear):
        out = x @ weight.T
    else:
        x = x if isinstance(module, nn.RMSNorm) else x - x.mean(-1, keepdim=True)
        out = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * weight
    bias = getattr(module, "bias", None)
    return out if bias is None else out + bias.detach().double()


@pytest.mark.parametrize("everywhere", [False, True], ids=["each", "global"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_hook_sees_what_every_module_got_and_gave(tiny, everywhere, mode):
    model, batch = tiny.model().train(mode == "training"), tiny.batch()
    expected = model(**batch).logits
    with watched(model, everywhere) as watcher, torch.set_grad_enabled(mode == "training"):
        output = model(**batch)
        if mode == "training":
            output.loss.backward()
    assert tiny.agree(output.logits.double(), expected.double())
    watcher.check()
    for block in model.model.layers:
        for module in (block, block.attention, block.mlp):
            assert len(watcher.calls[module]) == 1
        for name in LEAVES:
            module = block.get_submodule(name)
            ((given, out), _), *again = watcher.calls[module]
            assert not again
            assert tiny.agree(out.double(), by_definition(module, given)), name
    for once in (model.lm_head.decoder, model.model.embeddings):
        assert len(watcher.calls[once]) == 1


def test_a_hook_on_one_product_sees_it_before_rotation(tiny):
    """Attention turns queries and keys in place where nobody looks."""
    model = tiny.model()
    seen: list[Tensor] = []
    for block in model.model.layers:
        block.attention.qkv.register_forward_hook(lambda at, given, out: seen.append((at, given[0], out)))
    expected = tiny.logits(tiny.model())
    assert tiny.agree(tiny.logits(model), expected)
    for module, given, out in seen:
        assert tiny.agree(out.double(), by_definition(module, given))


@pytest.mark.parametrize("name", LEAVES)
def test_gradients_pass_backward_hooks(tiny, name):
    """What a backward hook sees of a product's output gives the gradient of its weight."""
    model, batch = tiny.model().train(), tiny.batch()
    module, seen = model.model.layers[0].get_submodule(name), {}
    module.register_forward_hook(lambda _, given, out: seen.update(given=given[0]))
    module.register_full_backward_hook(lambda _, into, out: seen.update(out=out[0]))
    model(**batch).loss.backward()
    again = tiny.model().train()
    again(**batch).loss.backward()
    expected = again.model.layers[0].get_submodule(name).weight.grad.double()
    assert tiny.agree(module.weight.grad.double(), expected)
    if isinstance(module, nn.Linear):
        assert tiny.agree(seen["out"].double().T @ seen["given"].double(), expected)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "parametrised": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "pruned": lambda module: prune.random_unstructured(module, "weight", 0.5),
    "hooked": lambda module: module.register_forward_hook(lambda _, __, out: 1.5 * out),
    "called otherwise": lambda module: setattr(module, "forward", Half(module.forward)),
}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Half:
    """Stands for what offloading does: the instance's own forward."""

    def __init__(self, forward: Callable[[Tensor], Tensor]):
        self.old = forward

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * self.old(x)


def change_by_hand(module: Any, changed: Any, kind: str) -> None:
    """Write into the weights what the change says."""
    factor = {"parametrised": 2.0, "hooked": 1.5, "called otherwise": 0.5, "pruned": 1.0}[kind]
    with torch.no_grad():
        if kind == "pruned":
            module.weight.mul_(changed.weight_mask)
        module.weight.mul_(factor)
        if kind in ("hooked", "called otherwise") and getattr(module, "bias", None) is not None:
            module.bias.mul_(factor)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", [*(f"layers.1.{leaf}" for leaf in LEAVES), "final_norm"])
def test_a_changed_module_is_what_runs(tiny, name, kind):
    model, expected = tiny.model(), tiny.model()
    unchanged = tiny.logits(model)
    torch.manual_seed(0)
    CHANGES[kind](model.model.get_submodule(name))
    change_by_hand(expected.model.get_submodule(name), model.model.get_submodule(name), kind)
    found = tiny.logits(model)
    assert tiny.agree(found, tiny.logits(expected))
    assert not tiny.agree(found, unchanged)


class Recorder(nn.Module):
    """Another module in the place of one of ours."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self.seen.append((x, out, x.clone(), out.clone()))
        return out


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_replaced_module_is_called(tiny, leaf):
    model = tiny.model()
    expected = tiny.logits(model)
    parent, _, name = f"model.layers.0.{leaf}".rpartition(".")
    recorder = Recorder(model.get_submodule(f"{parent}.{name}"))
    setattr(model.get_submodule(parent), name, recorder)
    assert tiny.agree(tiny.logits(model), expected)
    ((given, out, given_then, out_then),) = recorder.seen
    assert torch.equal(given, given_then)
    assert torch.equal(out, out_then)


def test_attention_maps_come_from_the_one_call(tiny):
    model, batch = tiny.model(), tiny.batch()
    batch.pop("labels")
    with watched(model, False) as watcher:
        with_maps = model(**batch, output_attentions=True)
    assert tiny.agree(with_maps.logits.double(), tiny.logits(model))
    watcher.check()
    assert all(len(watcher.calls[block.attention.qkv]) == 1 for block in model.model.layers)
    keep = batch["attention_mask"].bool()
    for weights in with_maps.attentions:
        rows = weights.double().sum(-1).transpose(1, 2)  # [B, S, H]
        torch.testing.assert_close(rows[keep], torch.ones_like(rows[keep]), rtol=0, atol=tiny.tolerance)


@pytest.mark.gpu
@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_hooks_on_quantised_layers_see_plain_tensors(on_te, recipe):
    model = on_te.model(layer_precision="fp8", fp8_recipe=recipe)
    with torch.inference_mode():
        for _ in range(3):  # until the scales fit
            expected = on_te.logits(model)
        with watched(model, False) as watcher:
            found = on_te.logits(model)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    watcher.check()
    for block in model.model.layers:
        for name in LEAVES:
            module = block.get_submodule(name)
            (((given, out), _),) = watcher.calls[module]
            assert type(given) is Tensor
            assert type(out) is Tensor
            expected = by_definition(module, given)
            assert float((out.detach().double() - expected).norm() / expected.norm()) < 0.1, name


def test_copies_of_a_watched_model_are_watched_too(tiny):
    model = tiny.model()
    calls: list[int] = []
    model.model.layers[0].mlp.norm.register_forward_hook(lambda *_: calls.append(1))
    tiny.logits(copy.deepcopy(model))
    assert calls == [1]
