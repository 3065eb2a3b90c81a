import pytest

from biote.testing import contract

AUTO = "AutoModelForMaskedLM"  # the original's one class
OPTIONS = [
    {"hidden_act": "relu"},
    {"hidden_act": "GELU"},
    {"rms_norm": False},
    {"att_bias": True, "ffn_bias": True},
    {"hidden_act": "gelu", "ffn_bias": True, "rms_norm": False, "layer_norm_after_embedding": True},
    {"layer_norm_after_embedding": True, "layer_norm_before_last_layer": False, "norm_eps": 1e-3},
]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_committed_golden_values(case, golden_folder, dtype):
    contract.assert_golden(case, golden_folder, dtype)


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_float64_equals_the_original_with_gradients(case, options):
    contract.assert_matches_original(case.with_options(**options), AUTO)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_dtypes_stay_at_the_noise_floor(case, dtype):
    contract.assert_noise_floor(case, AUTO, contract.Setting(dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("setting", contract.GPU_SETTINGS, ids=str)
def test_contract_on_the_gpu(case, setting, tmp_path, noise_rows):
    noise_rows.extend(contract.assert_contract_on_gpu(case, AUTO, setting, tmp_path))


def test_the_contract(case):
    contract.assert_inputs_and_outputs(case, AUTO)
    contract.assert_batch_invariant(case, AUTO)
    contract.assert_every_parameter_matters(case, AUTO)
    contract.assert_gradient_checkpointing(case, AUTO)
