import pytest
import torch

from biote.testing import contract
from geneformer import GeneformerTEForMaskedLM
from geneformer.convert import PORT


@pytest.mark.parametrize("auto", PORT.classes)
def test_save_and_load(case, auto, tmp_path):
    contract.assert_save_and_load(case, auto, tmp_path)


def test_export_stands_alone(case, golden_folder, tmp_path, capsys):
    contract.assert_export_stands_alone(case, golden_folder, tmp_path, capsys)


@pytest.mark.parametrize("tag", PORT.tags)
def test_sizes_of_the_published_checkpoints(tag):
    with torch.device("meta"):
        model = GeneformerTEForMaskedLM(PORT.config_class(**PORT.tags[tag].shape, engine="torch"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == PORT.tags[tag].facts["parameters"]


def test_dropout_stands_where_the_original_has_it(case):
    """After the embeddings' norm, in attention, after both projections and before classifiers; nowhere at 0."""
    _, ours = case.pair("AutoModelForSequenceClassification")
    config = PORT.config_class.from_dict({**ours.config.to_dict(), "hidden_dropout_prob": 0.3})
    model = type(ours)(config)
    norms = [layer.attention.qkv.norm_dropout for layer in model.model.layers]
    assert norms == [0.3, 0.0, 0.0]
    assert [layer.dropout for layer in model.model.layers] == [0.3] * 3
    assert model.classifier.dropout.p == 0.3
    x = torch.ones(1000, 64)
    qkv = model.model.layers[0].attention.qkv.train()
    kept = qkv(torch.randn(1000, 64))[0]
    assert abs(float((kept == 0).float().mean()) - 0.3) < 0.02
    assert not (qkv.eval()(x + torch.randn(1000, 64))[0] == 0).any()
