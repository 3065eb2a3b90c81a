"""The te engine on real hardware: graphs, quantised layers, devices and recomputation, on a tiny random ESM-2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from biote.runtime.cuda_graphs import MAX_GRAPHS
from biote.runtime.verify import relative_l2
from biote_esm2 import Esm2TEConfig, Esm2TEForMaskedLM, Esm2TEModel

pytestmark = pytest.mark.gpu
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "engine": "te",
}


def build(cls=Esm2TEForMaskedLM, **fields):
    """The same weights for whatever fields: constructors of different layers draw differently."""
    torch.manual_seed(0)
    state = cls(Esm2TEConfig(**SHAPE)).state_dict()
    model = cls(Esm2TEConfig(**{**SHAPE, **fields}))
    model.load_state_dict(state)
    return model.to("cuda", torch.bfloat16).eval()


def packed(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 33, (1, sum(lengths)), generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"input_ids": ids.cuda(), "cu_seq_lens_q": bounds.cuda(), "max_length_q": max(lengths)}


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=pytest.mark.fp8)])
def test_graphs_replay_for_changing_lengths_and_equal_eager(precision):
    eager, graphed = build(layer_precision=precision), build(layer_precision=precision, cuda_graphs=True)
    batches = [
        packed(100, 37, 5, seed=1),
        packed(70, 64, 9, seed=2),
        packed(128, 10, 1, seed=3),
        packed(700, 20, seed=4),
    ]
    with torch.inference_mode():
        for _ in range(3):  # fp8: both have seen the same range of values
            for batch in batches:
                expected, found = eager(**batch).logits, graphed(**batch).logits
        for batch in batches:
            expected, found = eager(**batch).logits, graphed(**batch).logits
            assert relative_l2(found.double(), expected.double()) < (0.01 if precision == "bf16" else 0.1)
    with torch.no_grad():  # a graph recorded in one mode replays in another
        assert relative_l2(graphed(**batches[-1]).logits.double(), found.double()) < 0.1
    assert len(graphed.model.graphed.graphs) == 2, "three of the four batches share one graph"


def test_graphs_stay_bounded_and_training_does_not_use_them():
    model = build(cuda_graphs=True)
    with torch.inference_mode():
        for length in range(64, 64 * (MAX_GRAPHS + 4), 64):
            model(**packed(length))
    assert len(model.model.graphed.graphs) <= MAX_GRAPHS
    before = list(model.model.graphed.graphs)
    batch = packed(50, 60)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert list(model.model.graphed.graphs) == before


def test_graphs_are_recorded_again_after_weights_moved():
    model, batch = build(cuda_graphs=True), packed(50, 60)
    with torch.inference_mode():
        expected = model(**batch).logits
        assert len(model.cpu().model.graphed.graphs) == 0
        assert torch.equal(model.cuda()(**batch).logits, expected)
        model(**packed(700))  # in the memory of the first
        assert torch.equal(model(**batch).logits, expected)
    assert len(model.model.graphed.graphs) == 2


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_fp8_takes_odd_token_counts_and_trains(recipe):
    exact, quantised = build(), build(layer_precision="fp8", fp8_recipe=recipe)
    batch = packed(101, 36, 6)
    with torch.inference_mode():
        for _ in range(3):
            found = quantised(**batch).logits
        assert 1e-4 < relative_l2(found.double(), exact(**batch).logits.double()) < 0.2
    quantised.train()(**batch, labels=batch["input_ids"]).loss.backward()
    exact.train()(**batch, labels=batch["input_ids"]).loss.backward()
    expected = dict(exact.named_parameters())
    for name, parameter in quantised.named_parameters():
        if parameter.grad is not None and "qkv.bias" not in name:  # the gradient of a key's bias is almost nothing
            assert relative_l2(parameter.grad.double(), expected[name].grad.double()) < 0.5, name


@pytest.mark.fp8
def test_precision_by_layer():
    mixed = build(layer_precision=["bf16", "fp8", "fp8", "bf16"])
    exact, all_fp8 = build(), build(layer_precision="fp8")
    batch = packed(90, 38)
    with torch.inference_mode():
        for _ in range(3):
            outputs = [model(**batch).logits.double() for model in (exact, mixed, all_fp8)]
    assert 0 < relative_l2(outputs[1], outputs[0]) < relative_l2(outputs[2], outputs[0])


@pytest.mark.fp8
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_quantised_weights_take_less_memory_and_give_nearly_the_same(recipe):
    model = build(layer_precision=["bf16", "fp8", "fp8", "fp8"], fp8_recipe=recipe)
    before = torch.cuda.memory_allocated()
    quantised = model.with_quantized_weights()
    weights = sum(p.numel() for layer in model.model.layers[1:] for p in layer.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert torch.cuda.memory_allocated() - before < 2 * everything - 0.8 * weights
    batch = packed(90, 38)
    with torch.inference_mode():
        for _ in range(3):
            outputs = [each(**batch).logits.double() for each in (model, quantised)]
    assert relative_l2(*outputs) < 0.1


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_what_the_gpu_cannot_do_is_said(precision):
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU can")
    with pytest.raises(RuntimeError, match=f"layer_precision='{precision}' cannot run on this GPU: "):
        build(layer_precision=precision)


@pytest.mark.fp8
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_recomputation_gives_the_same_gradients(precision):
    gradients = []
    for checkpointing in (False, True):
        model = build(layer_precision=precision).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = packed(70, 42)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=2e-2, atol=1e-4, msg=name)


def test_checkpoints_move_between_devices_and_engines(tmp_path: Path):
    model = build(layer_precision="bf16")
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "_extra_state" in key]
    on_gpu = AutoModelForMaskedLM.from_pretrained(tmp_path, engine="te", device_map="cuda", dtype=torch.bfloat16)
    on_cpu = AutoModelForMaskedLM.from_pretrained(tmp_path, engine="torch", dtype=torch.bfloat16)
    batch = packed(20, 30)
    with torch.inference_mode():
        assert torch.equal(on_gpu(**batch).logits, model(**batch).logits)
        there = on_cpu(**{key: x.cpu() if torch.is_tensor(x) else x for key, x in batch.items()}).logits
        assert relative_l2(there.double(), model(**batch).logits.double().cpu()) < 0.05
    on_cpu.save_pretrained(tmp_path / "cpu")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "cpu", engine="te").cuda()
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in again.state_dict().items())


def test_te_on_the_cpu_says_what_to_do():
    model = Esm2TEModel(Esm2TEConfig(**SHAPE))
    with pytest.raises(RuntimeError, match='engine="te" runs on CUDA only'):
        model(torch.zeros(1, 4, dtype=torch.long))
