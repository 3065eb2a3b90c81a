"""The heads that the original does not have, and the end of the position table."""

import pytest
import torch

from biote_amplify import AMPLIFY, AmplifyTEForSequenceClassification, AmplifyTEForTokenClassification, AmplifyTEModel


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
    _, ours = case.pair("AutoModelForMaskedLM")
    with pytest.raises(ValueError, match="needs 65 positions, but this model has 64"):
        ours(torch.full((1, 65), 7))
    with pytest.raises(ValueError, match="needs 65 positions"):
        ours(torch.full((1, 3), 7), position_ids=torch.tensor([[62, 63, 64]]))
