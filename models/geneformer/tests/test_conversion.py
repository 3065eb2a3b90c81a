import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from biote.files import WEIGHTS
from biote.testing import contract
from biote_geneformer import GeneformerTEForMaskedLM, GeneformerTEModel, convert_te_to_hf
from biote_geneformer.convert import PORT, read_hf_config


@pytest.mark.parametrize("auto", PORT.classes)
def test_models_round_trip(case, auto):
    contract.assert_round_trip(case, auto)


@pytest.mark.parametrize("auto", PORT.classes)
def test_files_round_trip(case, auto, tmp_path):
    contract.assert_file_round_trip(case, auto, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_keep_their_dtype(case, dtype, tmp_path):
    contract.assert_file_round_trip(case, "AutoModelForMaskedLM", tmp_path, dtype)


def test_the_configuration_survives(case):
    contract.assert_config_survives(case, "AutoModelForMaskedLM")


def test_missing_weights_are_refused(case, tmp_path):
    contract.assert_missing_weights_refused(case, "AutoModelForMaskedLM", tmp_path)


def test_old_spellings_are_read(golden_folder, tmp_path):
    state = load_file(golden_folder / WEIGHTS)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for key, x in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(32)[None]
    old["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    save_file(old, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((golden_folder / "config.json").read_text())
    found = GeneformerTEForMaskedLM.from_original(str(tmp_path), engine="torch").state_dict()
    expected = GeneformerTEForMaskedLM.from_original(str(golden_folder), engine="torch").state_dict()
    assert all(torch.equal(x, expected[key]) for key, x in found.items())


@pytest.mark.parametrize(
    ("field", "value"), [("post_norm", False), ("rms_norm", True), ("tie_word_embeddings", False), ("mlp_bias", False)]
)
def test_what_bert_cannot_hold_is_refused(field, value):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    model = GeneformerTEForMaskedLM(PORT.config_class(**small, engine="torch", **{field: value}))
    with pytest.raises(ValueError, match=f"transformers' BERT has no counterpart of {field}={value}"):
        convert_te_to_hf(model)


def test_a_folder_of_variants(golden_folder, tmp_path):
    """One repository with a folder a variant, as on the Hub."""
    variant = tmp_path / "repository" / "Geneformer-V2-104M"
    variant.mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        (variant / name).write_bytes((golden_folder / name).read_bytes())
    model = GeneformerTEModel.from_original(
        str(tmp_path / "repository"), subfolder="Geneformer-V2-104M", engine="torch"
    )
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_act", "silu"), ("is_decoder", True), ("tie_word_embeddings", False)]
)
def test_other_berts_are_refused(case, field, value):
    theirs = {**case.make_original("AutoModelForMaskedLM", 0).config.to_dict(), field: value}
    with pytest.raises(ValueError, match=f"not one that this port computes: {field}={value!r}"):
        read_hf_config(theirs, ())


def test_a_tag_names_a_subfolder_of_the_hub_repository(golden_folder, tmp_path):
    """A stand-in for the Hub's cache, already filled; the command line in a process of its own reads it."""
    repository = tmp_path / "hub" / "models--ctheodoris--Geneformer"
    snapshot = repository / "snapshots" / f"f45a6c7d{0:032}"
    (snapshot / "Geneformer-V2-104M").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "f45a6c7d").write_text(snapshot.name)
    for name in ("config.json", WEIGHTS):
        (snapshot / "Geneformer-V2-104M" / name).write_bytes((golden_folder / name).read_bytes())
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "biote.cli", "export", "Geneformer-V2-104M", str(tmp_path / "te")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    converted, source = load_file(tmp_path / "te" / WEIGHTS), load_file(golden_folder / WEIGHTS)
    first = "model.layers.0.attention.norm.weight"
    assert torch.equal(converted[first], source["bert.embeddings.LayerNorm.weight"])
    last = "model.layers.2.attention.norm.bias"
    assert torch.equal(converted[last], source["bert.encoder.layer.1.output.LayerNorm.bias"])
    assert torch.equal(converted["model.final_norm.weight"], source["bert.encoder.layer.2.output.LayerNorm.weight"])
    card = (tmp_path / "te" / "README.md").read_text()
    assert "ctheodoris/Geneformer, Geneformer-V2-104M (revision `f45a6c7d`)" in card
    assert "| 104,386,867 |" in card, "the facts of this variant, not of another one in the repository"
