import pytest
import torch

from biote.testing import contract
from biote_amplify import AmplifyTEForMaskedLM
from biote_amplify.convert import PORT, read_config

AUTO = "AutoModelForMaskedLM"


def test_save_and_load(case, tmp_path):
    contract.assert_save_and_load(case, AUTO, tmp_path)


def test_export_stands_alone(case, golden_folder, tmp_path, capsys):
    contract.assert_export_stands_alone(case, golden_folder, tmp_path, capsys)


def test_every_class_loads(case, tmp_path):
    contract.assert_every_class_loads(case, AUTO, tmp_path)


@pytest.mark.parametrize("tag", PORT.tags)
def test_sizes_of_the_published_checkpoints(tag):
    with torch.device("meta"):
        model = AmplifyTEForMaskedLM(PORT.config_class(**PORT.tags[tag].shape, engine="torch"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == PORT.tags[tag].facts["parameters"]


@pytest.mark.parametrize(("intermediate_size", "width"), [(2560, 1712), (3840, 2560), (12, 8), (13, 8)])
def test_the_width_of_swiglu(intermediate_size, width):
    assert PORT.config_class(intermediate_size=intermediate_size, engine="torch").feed_forward_width == width


def test_published_config_is_read():
    config = read_config({
        "model_type": "AMPLIFY", "architectures": ["AMPLIFY"], "vocab_size": 27, "hidden_size": 960, "dropout_prob": 0,
        "num_hidden_layers": 32, "num_attention_heads": 15, "intermediate_size": 3840, "hidden_act": "SwiGLU",
        "norm_eps": 1e-05, "max_length": 512, "torch_dtype": "float32", "other_special_token_ids": None,
    }, ())  # fmt: skip
    assert (config.hidden_act, config.feed_forward_width, config.max_position_embeddings) == ("swiglu", 2560, 512)
    with pytest.raises(ValueError, match="hidden_act='silu' is none of the original's"):
        read_config({**config.to_dict(), "hidden_act": "silu"}, ())
