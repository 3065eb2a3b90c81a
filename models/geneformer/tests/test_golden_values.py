import pytest
import torch

from biote.testing import contract
from biote_geneformer.convert import PORT


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_committed_golden_values(case, golden_folder, dtype):
    contract.assert_golden(case, golden_folder, dtype)


@pytest.mark.parametrize("auto", PORT.classes)
def test_float64_equals_the_original_with_gradients(case, auto):
    contract.assert_matches_original(case, auto)


@pytest.mark.parametrize(
    "options", [{"hidden_act": "gelu"}, {"num_hidden_layers": 1, "layer_norm_eps": 1e-3}], ids=str
)
def test_other_berts(case, options):
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
def test_the_contract(case, auto):
    contract.assert_inputs_and_outputs(case, auto)
    contract.assert_batch_invariant(case, auto)
    if auto != "AutoModel":
        contract.assert_gradient_checkpointing(case, auto)


def test_every_parameter_matters(case):
    contract.assert_every_parameter_matters(case, "AutoModelForMaskedLM")


def test_token_types(case):
    original, ours = case.pair("AutoModelForMaskedLM")
    batch = {**case.batch("AutoModelForMaskedLM"), "token_type_ids": torch.arange(19).expand(4, 19) % 2}
    keep = batch["attention_mask"].bool()
    expected = original(**batch).logits[keep]
    torch.testing.assert_close(ours(**batch).logits[keep], expected, rtol=1e-5, atol=1e-8)
    packed = {name: batch[name][keep][None] for name in ("input_ids", "token_type_ids")}
    bounds = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    torch.testing.assert_close(ours(**packed, cu_seq_lens_q=bounds).logits[0], expected, rtol=1e-5, atol=1e-8)
    for bad in (-1, 2):
        with pytest.raises(ValueError, match="token_type_ids must lie between 0 and 1"):
            ours(batch["input_ids"], token_type_ids=torch.full((4, 19), bad))


def test_a_sequence_past_the_position_table_is_refused(case):
    _, ours = case.pair("AutoModel")
    with pytest.raises(ValueError, match="needs 33 positions, but this model has 32"):
        ours(torch.full((1, 33), 7))
    with pytest.raises(ValueError, match="negative"):
        ours(torch.full((1, 3), 7), position_ids=torch.tensor([[-1, 0, 1]]))
