import pytest
import torch
from safetensors.torch import load_file, save_file

from biote.convert import convert_folder
from biote.files import WEIGHTS
from biote.testing import contract
from biote_esm2 import Esm2TEForMaskedLM
from biote_esm2.convert import PORT

INV_FREQ = "rotary_embeddings.inv_freq"


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


def published(state):
    """The spelling of the files on the Hub: frequencies in each layer, and two tensors that nothing reads."""
    frequencies = next(tensor for key, tensor in state.items() if key.endswith(INV_FREQ))
    state = {key.replace("gamma", "weight").replace("beta", "bias"): tensor for key, tensor in state.items()}
    state = {key: tensor for key, tensor in state.items() if not key.endswith(INV_FREQ)}
    for i in range(3):
        state[f"esm.encoder.layer.{i}.attention.self.{INV_FREQ}"] = frequencies.clone()
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    state["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 64)
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
    return state


def shared(state):
    return {("esm." + INV_FREQ if key.endswith(INV_FREQ) else key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("respell", [published, shared, lambda state: state])
def test_every_spelling_of_the_original_is_read(golden_folder, tmp_path, respell):
    (tmp_path / "config.json").write_text((golden_folder / "config.json").read_text())
    save_file(respell(load_file(golden_folder / WEIGHTS)), tmp_path / WEIGHTS)
    found = Esm2TEForMaskedLM.from_original(str(tmp_path), engine="torch").state_dict()
    expected = Esm2TEForMaskedLM.from_original(str(golden_folder), engine="torch").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_frequencies_survive_a_cast(golden_folder, tmp_path):
    convert_folder(golden_folder, tmp_path / "te", "te", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "te" / WEIGHTS)
    assert {tensor.dtype for key, tensor in stored.items() if "inv_freq" not in key} == {torch.bfloat16}
    assert stored["model.rotary.0.inv_freq"].dtype == torch.float32
