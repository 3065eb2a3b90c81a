"""Task heads: what each makes of the packed states. A port's classes inherit from them.

Shapes: B batch, S padded length, T packed tokens, N hidden size, V vocabulary, C labels.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput

from .config import EncoderConfig
from .encoder import EncoderModel
from .losses import sequence_labels, sequence_loss, token_labels, token_loss
from .packing import Packing
from .pretrained import BiotePreTrainedModel, Encoded


class MaskedLMModel(BiotePreTrainedModel):
    """A port's ...ForMaskedLM, which owns `model` and `lm_head`."""

    model: EncoderModel
    lm_head: Any  # [T, N] -> [T, V]; its `decoder` is the output embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    def read_labels(self, labels: Tensor, packing: Packing) -> Tensor:
        """See `token_labels`; a label is a token id."""
        return token_labels(labels, self.config.vocab_size, packing)

    def outputs(self, encoded: Encoded, labels: Tensor | None) -> MaskedLMOutput:
        """Logits [B, S, V]; loss is the mean cross-entropy over real tokens whose label (int [B, S]) is not -100."""
        logits = self.lm_head(encoded.last)  # [T, V]
        loss = token_loss(logits, labels)
        return MaskedLMOutput(loss=loss, logits=encoded.packing.unpack(logits))


class TokenClassificationModel(BiotePreTrainedModel):
    """A port's ...ForTokenClassification, which names its `encoder_class`: one linear layer over each token."""

    encoder_class: type[EncoderModel]
    _new_head = "classifier"

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.model: Any = self.encoder_class(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def read_labels(self, labels: Tensor, packing: Packing) -> Tensor:
        """See `token_labels`."""
        return token_labels(labels, self.config.num_labels, packing)  # type: ignore[arg-type]

    def outputs(self, encoded: Encoded, labels: Tensor | None) -> TokenClassifierOutput:
        """Logits [B, S, C]; loss is the mean cross-entropy over real tokens whose label (int [B, S]) is not -100."""
        logits = self.classifier(self.dropout(encoded.last))  # [T, C]
        loss = token_loss(logits, labels)
        return TokenClassifierOutput(loss=loss, logits=encoded.packing.unpack(logits))


class SequenceClassificationModel(BiotePreTrainedModel):
    """A port's ...ForSequenceClassification, which owns `model` and `classifier`."""

    model: EncoderModel
    classifier: nn.Module
    _new_head = "classifier"

    def read_labels(self, labels: Tensor, packing: Packing) -> Tensor:
        """See `sequence_labels`."""
        return sequence_labels(labels, self.config, packing)

    def outputs(self, encoded: Encoded, labels: Tensor | None) -> SequenceClassifierOutput:
        """Logits [B, C] from each sequence's first token; loss and labels: see `losses.py`."""
        logits = self.classifier(encoded.last[encoded.packing.first_tokens])  # [B, C]
        return SequenceClassifierOutput(loss=sequence_loss(logits, labels, self.config), logits=logits)
