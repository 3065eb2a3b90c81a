from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import EsmConfig

from biote import convert, port
from biote.convert import locate, state_specs
from biote.files import WEIGHTS
from biote.port import identify
from biote_esm2 import Esm2TEConfig, Esm2TEForMaskedLM, convert_te_to_hf
from biote_esm2.convert import PORT, read_hf_config


@pytest.mark.parametrize("fields", [{"engine": "te"}, {"layer_precision": "fp8"}, {"quantized_weights": True}])
def test_the_keys_of_a_model_are_known_where_its_engine_cannot_run(fields):
    fields = {"layer_precision": "fp8", **fields}
    assert set(state_specs(Esm2TEForMaskedLM, Esm2TEConfig(**fields))) == set(
        state_specs(Esm2TEForMaskedLM, Esm2TEConfig(engine="torch"))
    )


@pytest.mark.parametrize(
    ("source", "given", "asked"),
    [
        ("Geneformer-V2-104M", (None, None), ("ctheodoris/Geneformer", "f45a6c7d", "Geneformer-V2-104M")),
        ("Geneformer-V2-104M", ("abc", "other"), ("ctheodoris/Geneformer", "abc", "other")),
        ("AMPLIFY_120M", ("abc", None), ("chandar-lab/AMPLIFY_120M", "abc", None)),
        ("me/mine", ("abc", "part"), ("me/mine", "abc", "part")),
        ("me/mine", (None, None), ("me/mine", None, None)),
    ],
)
def test_a_tag_stands_for_a_pinned_revision_unless_another_is_named(monkeypatch, tmp_path, source, given, asked):
    def download(repo_id, revision, allow_patterns, ignore_patterns):
        subfolder = asked[2]
        files = ["config.json", "model.safetensors", "sub/model.safetensors", "sub/config.json", "README.md"]
        files = [f"{subfolder}/{file}" if subfolder else file for file in files[:2]] + files[2:]
        chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(chosen) == files[:2]
        assert (repo_id, revision) == asked[:2]
        (tmp_path / (subfolder or "")).mkdir(exist_ok=True)
        return tmp_path

    monkeypatch.setattr(convert, "snapshot_download", download)
    assert locate(source, *given) == tmp_path / (asked[2] or "")


def test_ports_of_one_model_type_are_told_apart_by_what_their_configs_say(monkeypatch):
    def refuse(theirs, keys):
        raise ValueError("not mine")

    hf = PORT.formats["hf"]
    twin = replace(PORT, name="twin")
    sibling = replace(PORT, name="sibling", formats={"hf": replace(hf, read_config=refuse)})
    config = {**EsmConfig(vocab_size=33, position_embedding_type="rotary").to_dict(), "architectures": ["EsmModel"]}
    monkeypatch.setattr(port, "installed_ports", lambda: {"sibling": sibling, "esm2": PORT})
    assert identify(config) == (PORT, "hf", "AutoModel")
    with pytest.raises(ValueError, match=r"no port reads config\.json: sibling: not mine; esm2: .*not an ESM-2 one"):
        identify({**config, "position_embedding_type": "absolute"})
    monkeypatch.setattr(port, "installed_ports", lambda: {"twin": twin, "esm2": PORT})
    for both in (config, {**Esm2TEConfig().to_dict(), "architectures": ["Esm2TEModel"]}):
        with pytest.raises(ValueError, match="fits twin, esm2; say --port NAME"):
            identify(both)


def test_a_misspelled_field_is_refused():
    model = Esm2TEForMaskedLM(Esm2TEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, engine="torch"))
    assert convert_te_to_hf(model, hidden_dropout_prob=0.5).config.hidden_dropout_prob == 0.5
    with pytest.raises(TypeError, match="the 'hf' format has no field hiden_dropout_prob"):
        convert_te_to_hf(model, hiden_dropout_prob=0.5)


@pytest.mark.parametrize("wrong", [{"hidden_act": "silu"}, {"rope": "foo"}, {"fp8_recipe": "zzz"}])
def test_an_unknown_word_is_refused_wherever_it_comes_from(tmp_path, wrong):
    config = Esm2TEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, engine="torch")
    Esm2TEForMaskedLM(config).save_pretrained(tmp_path)
    ((name, word),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}='{word}' is unknown; choose one of"):
        Esm2TEForMaskedLM.from_pretrained(tmp_path, **wrong)


def test_a_field_that_the_original_leaves_out_has_its_default():
    shape = {"vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config, defaults = read_hf_config({**shape, "position_embedding_type": "rotary"}, ()), EsmConfig()
    for field in ("layer_norm_eps", "hidden_dropout_prob", "token_dropout", "intermediate_size"):
        assert getattr(config, field) == getattr(defaults, field)


def test_mixed_dtypes_are_loaded_as_the_widest(tiny_original: Path, tmp_path: Path):
    state = load_file(tiny_original / WEIGHTS)
    names = [name for name, tensor in state.items() if tensor.dim() == 2 and "self" not in name][::2]
    save_file({**state, **{name: state[name].bfloat16() for name in names}}, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_original / "config.json").read_bytes())
    assert Esm2TEForMaskedLM.from_original(str(tmp_path), engine="torch").dtype == torch.float32
