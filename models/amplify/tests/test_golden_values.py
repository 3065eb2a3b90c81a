import pytest
import torch

from amplify import AMPLIFY, AmplifyTEForSequenceClassification, AmplifyTEForTokenClassification, AmplifyTEModel
from biote.testing import contract

AUTO = "AutoModelForMaskedLM"  # the original's one class
OPTIONS = [
    {"hidden_act": "relu"},
    {"hidden_act": "GELU"},
    {"rms_norm": False},
    {"att_bias": True, "ffn_bias": True},
    {"hidden_act": "gelu", "ffn_bias": True, "rms_norm": False, "layer_norm_after_embedding": True},
    {"layer_norm_after_embedding": True, "layer_norm_before_last_layer": False},
]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_committed_golden_values(case, golden_folder, dtype):
    contract.assert_golden(case, golden_folder, dtype)


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_float64_equals_the_original_with_gradients(case_with, options):
    contract.assert_matches_original(case_with(**options), AUTO)


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


def test_other_heads_read_the_normed_encoder(golden_folder):
    """Expected from the reference's last hidden state (the published embedding), by hand."""
    original = AMPLIFY.from_pretrained(golden_folder, dtype=torch.float64).eval()
    ids = torch.tensor([[3, 17, 7, 2, 14, 10, 18, 4]])
    with torch.no_grad():
        published = original(ids, output_hidden_states=True).hidden_states[-1]
        root = (published.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed = published / root * original.layer_norm_2.weight
        encoder = AmplifyTEModel.from_original(str(golden_folder), dtype=torch.float64, engine="torch").eval()
        output = encoder(ids, output_hidden_states=True)
        torch.testing.assert_close(output.hidden_states[-1], published, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output.last_hidden_state, normed, rtol=1e-9, atol=1e-12)
        for cls, read in (
            (AmplifyTEForTokenClassification, normed),
            (AmplifyTEForSequenceClassification, normed[:, 0]),
        ):
            model = cls.from_original(str(golden_folder), dtype=torch.float64, engine="torch", num_labels=5).eval()
            expected = read @ model.classifier.weight.T + model.classifier.bias
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-12)


def test_a_sequence_past_the_last_position_is_refused(case):
    _, ours = case.pair(AUTO)
    with pytest.raises(ValueError, match="needs 65 positions, but this model has 64"):
        ours(torch.full((1, 65), 7))
    with pytest.raises(ValueError, match="needs 65 positions"):
        ours(torch.full((1, 3), 7), position_ids=torch.tensor([[62, 63, 64]]))
