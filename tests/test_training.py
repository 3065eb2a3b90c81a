"""Losses, dropout of heads, and transformers' Trainer, on one GPU, several, or none."""

import inspect

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import EsmConfig, EsmForSequenceClassification, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from biote.testing.contract import randomize
from biote_amplify import AmplifyTEConfig, AmplifyTEModel
from biote_esm2 import (
    Esm2TEConfig,
    Esm2TEForMaskedLM,
    Esm2TEForSequenceClassification,
    Esm2TEForTokenClassification,
    convert_hf_to_te,
)

SHAPE = {
    "vocab_size": 33, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "pad_token_id": 1, "mask_token_id": 32,
}  # fmt: skip
IDS = torch.tensor([[0, 5, 9, 13, 2], [0, 6, 6, 20, 2], [0, 11, 12, 7, 2]])
LABELS = {
    "classes": (3, torch.tensor([2, 0, 1])),
    "several labels": (3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])),
    "regression": (1, torch.tensor([0.3, -2.0, 1.5])),
    "regression of columns": (1, torch.tensor([[0.3], [-2.0], [1.5]])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_the_loss_of_sequence_classification_is_the_originals(kind):
    """Which kind it is follows from num_labels and the labels' type, as in transformers."""
    num_labels, labels = LABELS[kind]
    torch.manual_seed(0)
    config = EsmConfig(**SHAPE, position_embedding_type="rotary", num_labels=num_labels)
    original = EsmForSequenceClassification(config).double().eval()
    labels = labels.double() if labels.is_floating_point() else labels
    ours = convert_hf_to_te(original, engine="torch").eval()
    theirs = labels[:, 0] if kind == "regression of columns" else labels  # which the original would broadcast
    expected = original(IDS, labels=theirs).loss
    torch.testing.assert_close(ours(IDS, labels=labels).loss, expected, rtol=1e-9, atol=1e-12)


def test_losses_are_float32_in_a_lower_dtype():
    model = Esm2TEForMaskedLM(Esm2TEConfig(**SHAPE, engine="torch")).to(torch.bfloat16)
    output = model(IDS, labels=IDS)
    assert output.loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("cls", "layers"),
    [
        (Esm2TEForTokenClassification, ["classifier"]),
        (Esm2TEForSequenceClassification, ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_heads_drop_their_inputs(cls, layers):
    model = cls(Esm2TEConfig(**{**SHAPE, "hidden_size": 512}, hidden_dropout_prob=0.3, engine="torch")).train()
    seen = {}
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    torch.manual_seed(0)
    model(IDS)
    shares = {name: float((tensor == 0).float().mean()) for name, tensor in seen.items()}
    assert shares.keys() == set(layers)
    assert all(abs(share - 0.3) < 0.05 for share in shares.values()), shares


def test_amplify_starts_uniform():
    """As its original: within the range of initialisation, and up to its ends."""
    config = AmplifyTEConfig(vocab_size=27, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, engine="torch")
    spread = config.initializer_range
    for name, parameter in AmplifyTEModel(config).named_parameters():
        if parameter.dim() == 2:
            assert 0.98 * spread < float(parameter.detach().abs().max()) <= spread, name


def test_trainer_accumulates_gradients_like_one_large_batch(tmp_path):
    weights = []
    for rows, steps in ((3, 1), (1, 3)):
        torch.manual_seed(0)
        model = Esm2TEForMaskedLM(Esm2TEConfig(**SHAPE, engine="torch"))
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=1, optim="sgd",
            learning_rate=1.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
        weights.append(model.model.layers[0].mlp.fc1.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_no_norm_and_no_bias_is_decayed(tiny, auto, tmp_path):
    """By the Trainer's rule, which goes by class and name; what is left is every table and matrix."""
    model = tiny.model(auto)
    arguments = TrainingArguments(tmp_path, weight_decay=0.5, report_to=[], use_cpu=tiny.device == "cpu")
    decayed, others = Trainer(model, arguments).create_optimizer().param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert {id(parameter) for parameter in decayed["params"]} == {id(p) for p in model.parameters() if p.dim() > 1}


def test_trainer_reads_the_arguments_of_forward(tiny):
    """It drops columns that forward does not name; only a model with a loss names labels."""
    classes = tiny.port.classes
    lists = {auto: list(inspect.signature(cls.forward).parameters) for auto, cls in classes.items()}
    bare = lists.pop("AutoModel")
    for auto, names in lists.items():
        assert find_labels(classes[auto]) == ["labels"]
        assert sorted(names) == sorted([*bare, "labels"])
    assert {"input_ids", "attention_mask", "cu_seq_lens_q", "max_length_q", "return_dict"} <= set(bare)
    assert find_labels(classes["AutoModel"]) == []
    with pytest.raises(TypeError, match="has no loss: leave labels out"):
        tiny.model("AutoModel")(**tiny.batch())


def test_gradients_of_gradients_are_right_or_refused():
    """On the torch engine, whose attention has them where it is told to be computed by its definition."""
    model = Esm2TEForMaskedLM(Esm2TEConfig(**SHAPE, engine="torch")).double()
    weight = model.model.layers[0].attention.qkv.weight

    def slope() -> torch.Tensor:
        return torch.autograd.grad(model(IDS, labels=IDS).loss, weight, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
        slope().backward()
    with sdpa_kernel(SDPBackend.MATH):
        (found,) = torch.autograd.grad(slope(), weight)
        step = torch.zeros_like(weight)
        step[3, 5] = 1e-3  # the rotation rounds to float32
        with torch.no_grad():
            weight += step
        above = slope().detach()
        with torch.no_grad():
            weight -= 2 * step
        below = slope().detach()
    torch.testing.assert_close(found[3, 5], (above - below) / 2e-3, rtol=1e-3, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_te_engine_refuses_gradients_of_gradients(port, dtype):
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    model = port.classes["AutoModelForMaskedLM"](port.config_class(**shape, vocab_size=40, engine="te"))
    ids, model = torch.full((2, 16), 6, device="cuda"), model.to("cuda", dtype)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match='engine="te" has no gradients of gradients'):
        torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), create_graph=True)


def replicas(model: torch.nn.Module) -> torch.nn.Module:
    """A copy as DataParallel makes them, whose weights are plain attributes: it has no parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        copied._modules = {name: child and copies[child] for name, child in module._modules.items()}
        copied._parameters = {}
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.detach().clone())
    return copies[model]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForTokenClassification"])
def test_a_replica_of_dataparallel_computes_the_same(tiny, auto):
    model = tiny.model(auto)
    replica = replicas(model)
    assert not list(replica.parameters())
    batch = {key: tensor for key, tensor in tiny.batch().items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(replica(**batch)[0], model(**batch)[0])
        bounds = torch.tensor([0, 5], device=tiny.device)
        with pytest.raises(RuntimeError, match=r"DataParallel.* cannot run packed input: .*torchrun.*CUDA_VISIBLE"):
            replica(batch["input_ids"][:1, :5], cu_seq_lens_q=bounds)


@pytest.mark.gpu
@pytest.mark.fp8
def test_a_replica_with_quantised_layers_says_what_to_do(on_te):
    model = on_te.model(layer_precision="fp8")
    with pytest.raises(RuntimeError, match=r"DataParallel.* cannot run layer_precision='fp8': .*torchrun"):
        replicas(model)(**on_te.batch())


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["te", "torch"])
def test_a_model_on_the_second_gpu(port, engine):
    """Kernels run where the tensors are, whatever the current device is."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    ids = torch.randint(5, 24, (3, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = port.classes["AutoModelForMaskedLM"](port.config_class(**shape, vocab_size=40, engine=engine))
        model = randomize(model, 0, 0.2).to(device, torch.bfloat16).eval()
        output = model(ids.to(device), labels=ids.to(device))
        output.loss.backward()
        found.append([output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert torch.cuda.current_device() == 0
    for first, second in zip(*found, strict=True):
        assert float((second.cpu() - first.cpu()).norm()) <= 0.02 * float(first.norm()), first.shape


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Was asked to gather along dimension 0:UserWarning")  # of scalar losses
@pytest.mark.parametrize("engine", ["te", "torch"])
def test_a_plain_trainer_on_two_gpus(port, engine, tmp_path):
    """It wraps the model in DataParallel: the same weights after a step as by one GPU, from rows of equal length."""
    rows = torch.randint(5, 24, (4, 16), generator=torch.Generator().manual_seed(0))
    weights = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        config = port.config_class(**shape, vocab_size=40, engine=engine)
        model = randomize(port.classes["AutoModelForMaskedLM"](config), 0, 0.2).to("cuda:0", torch.bfloat16)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2 if wrapped else 4, max_steps=1, optim="sgd", learning_rate=1.0,
            report_to=[], save_strategy="no", disable_tqdm=True, seed=0, max_grad_norm=0.0,
        )  # fmt: skip
        if not wrapped:
            arguments._n_gpu = 1
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        assert (trainer.args.n_gpu > 1) == wrapped
        trainer.train()
        weights.append(torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()]))
    fresh = randomize(port.classes["AutoModelForMaskedLM"](config), 0, 0.2).to("cuda:0", torch.bfloat16)
    before = torch.cat([parameter.detach().double().flatten() for parameter in fresh.parameters()])
    two, one = (after - before for after in weights)
    assert float((two - one).norm() / one.norm()) < 0.1
