import pytest
import torch

from biote.testing import contract
from biote_esm2.convert import PORT


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_committed_golden_values(case, golden_folder, dtype):
    contract.assert_golden(case, golden_folder, dtype)


@pytest.mark.parametrize("auto", PORT.classes)
def test_float64_equals_the_original_with_gradients(case, auto):
    contract.assert_matches_original(case, auto)


@pytest.mark.parametrize("options", [{"token_dropout": False}, {"mask_token_id": 31, "layer_norm_eps": 1e-3}], ids=str)
def test_options_of_the_original(case, options):
    contract.assert_matches_original(case.with_options(**options), "AutoModelForMaskedLM")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("auto", PORT.classes)
def test_lower_dtypes_stay_at_the_noise_floor(case, auto, dtype):
    contract.assert_noise_floor(case, auto, contract.Setting(dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("setting", contract.GPU_SETTINGS, ids=str)
@pytest.mark.parametrize("auto", PORT.classes)
def test_contract_on_the_gpu(case, auto, setting, tmp_path, noise_rows):
    noise_rows.extend(contract.assert_contract_on_gpu(case, auto, setting, tmp_path))


@pytest.mark.parametrize("auto", PORT.classes)
def test_inputs_and_outputs(case, auto):
    contract.assert_inputs_and_outputs(case, auto)


def test_sequences_longer_than_the_position_table_run_as_in_the_original(case):
    original, ours = case.pair("AutoModelForMaskedLM")
    ids = torch.randint(4, 24, (1, 1100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("auto", PORT.classes)
def test_same_output_alone_padded_and_packed(case, auto):
    contract.assert_batch_invariant(case, auto)


def test_every_parameter_matters(case):
    contract.assert_every_parameter_matters(case, "AutoModelForMaskedLM")


@pytest.mark.parametrize("auto", [auto for auto in PORT.classes if auto != "AutoModel"])
def test_gradient_checkpointing(case, auto):
    contract.assert_gradient_checkpointing(case, auto)
