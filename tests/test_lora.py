"""LoRA as in every tutorial, by peft, on both engines: against the same computation by hand."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import te as peft_te
from torch import Tensor, nn

from biote.runtime.lora_te import explain_quantised_layers

pytestmark = [  # peft's own affairs
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
PRODUCTS = ["qkv", "proj", "fc1", "fc2"]
PATHS = ["attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"]
HEADS = {"esm2": {"lm_head.dense"}, "amplify": set(), "geneformer": {"lm_head.dense"}}


def adapt(model: nn.Module, targets: Any = "all-linear", **options: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=targets, **options)
    return get_peft_model(model, config).eval()


def adapters(adapted: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Each adapted layer's tensors, by the layer's name in the model."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapted.state_dict().items():
        if "lora_" in key:
            layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            found.setdefault(layer, {})[part.split(".")[0]] = tensor
    return found


def by_hand(model: Any, adapted: nn.Module) -> Any:
    """The model with what the adapters say written into its weights: W + s B A, or DoRA's scaled rows of it."""
    model = copy.deepcopy(model)
    for name, parts in adapters(adapted).items():
        weight = model.get_submodule(name).weight.data
        weight += 1.5 * parts["B"] @ parts["A"]
        if "magnitude_vector" in parts:
            weight *= (parts["magnitude_vector"] / weight.norm(dim=1))[:, None]
    return model


@pytest.mark.parametrize("targets", [PRODUCTS, "all-linear"], ids=["named", "all-linear"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_compute_what_they_say_merge_and_load(tiny, targets, dora, tmp_path):
    model = tiny.model()
    adapted = adapt(copy.deepcopy(model), targets, use_dora=dora)
    blocks = {
        f"model.layers.{i}.{at}" for i in range(2) for at in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    }
    assert set(adapters(adapted)) == blocks | (HEADS[tiny.port.name] if targets == "all-linear" else set())
    if dora:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(torch.linspace(0.5, 2, len(parameter), device=parameter.device))
    expected = tiny.logits(by_hand(model, adapted))
    assert not tiny.agree(tiny.logits(model), expected)
    assert tiny.agree(tiny.logits(adapted), expected)
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted), tiny.logits(model))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(adapted))
    merged = adapted.merge_and_unload()
    assert tiny.agree(tiny.logits(merged), expected)
    assert merged.state_dict().keys() == model.state_dict().keys()


def test_the_adapters_alone_are_trained_and_drop_the_products_input(tiny):
    adapted = adapt(tiny.model(), lora_dropout=0.4).train()
    seen: dict[str, dict[str, Tensor]] = {}
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lora_dropout") and hasattr(layer, "base_layer"):
            parts = {"whole": layer, "base": layer.base_layer, "dropout": layer.lora_dropout["default"]}
            seen[name] = {}
            for part, module in parts.items():
                module.register_forward_hook(
                    lambda _, given, out, into=seen[name], part=part: into.update({part: out, f"{part} in": given[0]})
                )
    adapted(**tiny.batch()).loss.backward()
    assert len(seen) >= 8
    for name, tensors in seen.items():
        layer = adapted.get_submodule(name)
        dropped, given = tensors["dropout"], tensors["base in"]
        kept = dropped != 0
        assert abs(float(kept.float().mean()) - 0.6 * float((given != 0).float().mean())) < 0.05, name
        assert tiny.agree(dropped[kept].double(), given[kept].double() / 0.6)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        base = given.double() @ layer.base_layer.weight.double().T
        base = base if layer.base_layer.bias is None else base + layer.base_layer.bias
        assert tiny.agree(tensors["base"].double(), base)
        expected = base + 1.5 * dropped.double() @ a.double().T @ b.double().T
        assert tiny.agree(tensors["whole"].double(), expected), name
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


@pytest.mark.parametrize("auto", ["AutoModelForTokenClassification", "AutoModelForSequenceClassification"])
def test_a_new_classifier_is_trained_whole(tiny, auto):
    adapted = adapt(
        tiny.model(auto, num_labels=3),
        task_type="SEQ_CLS" if "Sequence" in auto else "TOKEN_CLS",
        modules_to_save=["classifier"],
        exclude_modules=["classifier"],
    )
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
    assert not [name for name in trained if "classifier" in name and "lora" in name]
    assert not [name for name in trained if "contact" in name]


@pytest.mark.gpu
@pytest.mark.fp8
@pytest.mark.parametrize("held", ["bf16", "quantised"])
@pytest.mark.parametrize("targets", [PRODUCTS, "all-linear"], ids=["named", "all-linear"])
def test_quantised_layers_take_plain_lora(on_te, targets, held):
    tiny, model = on_te, on_te.model(layer_precision="fp8")
    model = model.with_quantized_weights() if held == "quantised" else model
    plain = tiny.logits(model)
    adapted = adapt(model, targets)
    assert len([name for name in adapters(adapted) if ".layers." in name]) == 8
    outputs: dict[nn.Module, list[Tensor]] = {}
    layers = [module for module in adapted.modules() if isinstance(module, peft_te.TeLinear)]
    assert len(layers) == 8
    for layer in layers:
        layer.base_layer.register_forward_hook(lambda _, given, out, at=layer: outputs.update({at: [given[0], out]}))
        layer.register_forward_hook(lambda at, _, out: outputs[at].append(out))
    assert not tiny.agree(tiny.logits(adapted), plain)
    for layer, (given, base, whole) in outputs.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert tiny.agree(whole.double(), base.double() + 1.5 * given.double() @ a.double().T @ b.double().T)
    with pytest.raises(NotImplementedError, match="load in bf16"):
        adapted.merge_and_unload()
    adapted.train()(**tiny.batch()).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in adapted.named_parameters() if "lora_" in n)


@pytest.mark.gpu
@pytest.mark.fp8
def test_quantised_layers_say_what_they_do_not_take(on_te):
    with pytest.raises(ValueError, match=r"does not support DoRA.*load in bf16"):
        adapt(on_te.model(layer_precision="fp8"), PRODUCTS, use_dora=True)


def test_what_peft_cannot_do_on_quantised_layers_says_what_to_do(monkeypatch):
    """peft's own class for TransformerEngine's layers, around any product."""
    monkeypatch.setattr(peft_te, "TeLinear", peft_te.TeLinear)  # as it was, afterwards
    for _ in range(2):
        explain_quantised_layers()
    with pytest.raises(ValueError, match=r"does not support DoRA.*load in bf16"):
        peft_te.TeLinear(nn.Linear(4, 4), "default", LoraConfig(use_dora=True), r=2)
    layer = peft_te.TeLinear(nn.Linear(4, 4), "default", LoraConfig(), r=2, lora_alpha=3)
    assert layer(torch.ones(1, 4)).shape == (1, 4)
    for undo in (layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match="load in bf16"):
            undo()
    with pytest.raises(ValueError, match="positive") as other:
        peft_te.TeLinear(nn.Linear(4, 4), "default", LoraConfig(), r=0)
    assert "bf16" not in str(other.value)
