import pytest
import torch

from biote.testing import contract
from biote_geneformer import GeneformerTEForMaskedLM, GeneformerTEForSequenceClassification
from biote_geneformer.convert import PORT


@pytest.mark.parametrize("auto", PORT.classes)
def test_save_and_load(case, auto, tmp_path):
    contract.assert_save_and_load(case, auto, tmp_path)


def test_export_stands_alone(case, golden_folder, tmp_path, capsys):
    contract.assert_export_stands_alone(case, golden_folder, tmp_path, capsys)


@pytest.mark.parametrize("auto", PORT.classes)
def test_every_class_loads(case, auto, tmp_path):
    contract.assert_every_class_loads(case, auto, tmp_path)


@pytest.mark.parametrize("tag", PORT.tags)
def test_sizes_of_the_published_checkpoints(tag):
    with torch.device("meta"):
        model = GeneformerTEForMaskedLM(PORT.config_class(**PORT.tags[tag].shape, engine="torch"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == PORT.tags[tag].facts["parameters"]


def dropping(hidden, attention):
    torch.manual_seed(0)
    config = PORT.config_class(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=48,
        hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention, engine="torch",
    )  # fmt: skip
    return GeneformerTEForSequenceClassification(config).train()


def test_dropout_stands_where_the_original_has_it():
    """After the embeddings' norm, after both projections of a block, and before the classifier."""
    model = dropping(hidden=0.3, attention=0.0)
    seen = {}
    first, second = model.model.layers
    first.attention.qkv.register_forward_pre_hook(lambda _, given: seen.update(embeddings=given[0]))
    second.attention.qkv.register_forward_pre_hook(lambda _, given: seen.update(later_norm=given[0]))
    first.mlp.register_forward_pre_hook(lambda _, given: seen.update(attention=given[1]))
    second.register_forward_pre_hook(lambda _, given: seen.update(feed_forward=given[1]))
    model.classifier.out_proj.register_forward_pre_hook(lambda _, given: seen.update(classifier=given[0]))
    model(torch.randint(4, 48, (8, 30)))
    dropped = {name: float((tensor == 0).float().mean()) for name, tensor in seen.items()}
    assert dropped.pop("later_norm") == 0
    assert all(abs(share - 0.3) < 0.1 for share in dropped.values()), dropped
    with torch.no_grad():
        ids = torch.randint(4, 48, (2, 9))
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_attention_drops_its_weights():
    model, ids = dropping(hidden=0.0, attention=0.3), torch.randint(4, 48, (2, 9))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
