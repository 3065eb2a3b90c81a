import json

import pytest
import torch
from safetensors.torch import load_file

from biote.convert import convert_folder
from biote.files import WEIGHTS
from biote.testing import contract
from biote_amplify.convert import PORT, convert_te_to_hf, write_nvidia_config
from biote_amplify.modeling_amplify import AMPLIFY

AUTO = "AutoModelForMaskedLM"


@pytest.mark.parametrize("options", [{}, {"hidden_act": "relu", "att_bias": True, "rms_norm": False}], ids=str)
def test_models_round_trip(case, options):
    contract.assert_round_trip(case.with_options(**options), AUTO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_round_trip(case, dtype, tmp_path):
    contract.assert_file_round_trip(case, AUTO, tmp_path, dtype)


def test_the_configuration_survives(case):
    contract.assert_config_survives(case, AUTO, but=("embedding_init_range", "tie_word_embeddings"))


def test_missing_weights_are_refused(case, tmp_path):
    contract.assert_missing_weights_refused(case, AUTO, tmp_path)


def test_the_checkpoints_own_code_is_never_run(golden_folder, tmp_path):
    source = tmp_path / "original"
    source.mkdir()
    (source / WEIGHTS).write_bytes((golden_folder / WEIGHTS).read_bytes())
    config = json.loads((golden_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "amplify.AMPLIFYConfig", "AutoModel": "amplify.AMPLIFY"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "amplify.py").write_text("raise SystemExit('the remote code was run')")
    convert_folder(source, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    expected = AMPLIFY.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(tmp_path / "back" / WEIGHTS).items())


def test_nvidia_layout(golden_folder, tmp_path):
    convert_folder(golden_folder, tmp_path / "nvidia", "nvidia")
    theirs, ours = load_file(tmp_path / "nvidia" / WEIGHTS), load_file(golden_folder / WEIGHTS)
    layer = "amplify.transformer_encoder.1."
    assert torch.equal(theirs["decoder.layer_norm_weight"], ours["layer_norm_2.weight"])
    assert torch.equal(theirs[layer + "layernorm_mlp.fc1_weight"], ours["transformer_encoder.1.ffn.w12.weight"])
    second_head = theirs[layer + "self_attention.layernorm_qkv.weight"][48:96].split(16)  # rows [head, (q, k, v), D]
    for part, rows in zip("qkv", second_head, strict=True):
        assert torch.equal(rows, ours[f"transformer_encoder.1.{part}.weight"][16:32])
    assert theirs["decoder.bias"].shape == (32,)
    assert (theirs["decoder.bias"][27:] == torch.finfo(torch.float32).min).all()


def test_nvidia_layout_refuses_what_it_cannot_hold():
    config = PORT.config_class(mlp_bias=True, hidden_act="relu", engine="torch")
    with pytest.raises(ValueError, match="no counterpart of hidden_act='relu', mlp_bias=True"):
        write_nvidia_config(config, AUTO)


def test_frequencies_that_the_original_cannot_store_are_refused(case):
    _, ours = case.pair(AUTO)
    ours.model.rotary[0].inv_freq.mul_(1.1)
    with pytest.raises(ValueError, match=r"model.rotary.0.inv_freq: is not what it would be recomputed to"):
        convert_te_to_hf(ours)
