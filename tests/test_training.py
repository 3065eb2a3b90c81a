"""Losses, dropout of heads and transformers' Trainer, on tiny ESM-2 models."""

import pytest
import torch
from biote_amplify import AmplifyTEConfig, AmplifyTEModel
from biote_esm2 import (
    Esm2TEConfig,
    Esm2TEForMaskedLM,
    Esm2TEForSequenceClassification,
    Esm2TEForTokenClassification,
    convert_hf_to_te,
)
from peft import LoraConfig, get_peft_model
from transformers import EsmConfig, EsmForSequenceClassification, Trainer, TrainingArguments

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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's affair
def test_lora_on_the_weights_of_fused_layers():
    torch.manual_seed(0)
    model = Esm2TEForMaskedLM(Esm2TEConfig(**SHAPE, engine="torch")).eval()
    before = model(IDS).logits
    weights = ["attention.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_parameters=weights)).eval()
    with_adapters = adapted(IDS).logits
    assert not torch.allclose(with_adapters, before, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, with_adapters)


@pytest.mark.parametrize("layer", ["qkv", "fc1", "fc2"])
def test_lora_around_a_fused_layer_is_refused(layer):
    """It would see the input of the norm or of the activation, not of the product."""
    model = Esm2TEForMaskedLM(Esm2TEConfig(**SHAPE, engine="torch"))
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(model, LoraConfig(target_modules=[layer]))
