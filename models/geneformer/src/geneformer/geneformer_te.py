"""Geneformer (Theodoris et al. 2023, Nature 618:616) on TransformerEngine or PyTorch layers.

Reproduces `transformers`' BertModel family as Geneformer's checkpoints use it: a post-norm encoder over genes ranked
by expression, absolute positions, token types, ReLU. Any BERT of that shape will do.
Shapes: T packed tokens, N hidden size, V vocabulary, B cells, C labels.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from biote.runtime.activations import ACTIVATIONS
from biote.runtime.config import EncoderConfig
from biote.runtime.encoder import EncoderModel
from biote.runtime.heads import MaskedLMModel, SequenceClassificationModel, TokenClassificationModel
from biote.runtime.layers import untouched
from biote.runtime.packing import Tokens


@strict
class GeneformerTEConfig(EncoderConfig):
    """Configuration of Geneformer; the defaults are the V2-316M model's.

    The blocks are those of a post-norm model, shifted: see `block.py`.
    """

    model_type = "geneformer_te"

    vocab_size: int = 20275
    hidden_size: int = 1152
    num_hidden_layers: int = 18
    num_attention_heads: int = 18
    intermediate_size: int = 4608
    hidden_act: str = "relu"
    layer_norm_eps: float | int = 1e-12
    rope: str = "none"
    post_norm: bool = True
    pad_token_id: int | None = 0
    max_position_embeddings: int = 4096
    type_vocab_size: int = 2
    tie_word_embeddings: bool = True


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed; their norm is the first block's, their dropout follows it."""

    def __init__(self, config: GeneformerTEConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings [T, N]: of token ids, or words as the caller made them; of token types, 0 if not given."""
        words = self.word_embeddings(tokens.ids) if tokens.embeds is None else tokens.embeds
        table = self.token_type_embeddings
        types = table.weight[0] if tokens.types is None else table(tokens.types)
        return words + types + self.position_embeddings(tokens.packing.positions)


class GeneformerTEModel(EncoderModel):
    """The encoder. Its hidden states are the embeddings of genes; `embeddings.py` takes means of them."""

    config_class = GeneformerTEConfig

    def __init__(self, config: GeneformerTEConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.max_positions, self.token_types = config.max_position_embeddings, config.type_vocab_size
        self.post_init()

    def original_states(self, states: list[Tensor], last: Tensor) -> list[Tensor]:
        """The normed embeddings and each block's normed output, which the next block's first norm makes."""
        blocks: Any = self.layers
        return [*(block.attention.norm(x) for x, block in zip(states[:-1], blocks, strict=True)), last]


class LMHead(nn.Module):
    """Dense, activation, layer norm, then the decoder, whose weight is the word embeddings'."""

    def __init__(self, config: GeneformerTEConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.activation = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        """[T, N] -> [T, V]."""
        x = self.layer_norm(ACTIVATIONS[self.activation](self.dense(x)))
        genes = self.decoder.out_features
        surplus = -genes % 64
        if not x.is_cuda or not surplus or not untouched(self.decoder, nn.Linear):
            return self.decoder(x)
        # a weight padded on the way: a product with 20,275 columns takes up to 7 times as long (docs/performance.md)
        weight, bias = F.pad(self.decoder.weight, (0, 0, 0, surplus)), F.pad(self.decoder.bias, (0, surplus))
        return F.linear(x, weight, bias)[:, :genes]


class GeneformerTEForMaskedLM(MaskedLMModel):
    """The encoder with its masked-language-model head: a distribution over genes at each rank."""

    config_class = GeneformerTEConfig
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: GeneformerTEConfig):
        super().__init__(config)
        self.model = GeneformerTEModel(config)
        self.lm_head = LMHead(config)
        self.post_init()


class GeneformerTEForTokenClassification(TokenClassificationModel):
    """Gene classification: the encoder with one linear layer over each gene."""

    config_class = GeneformerTEConfig
    encoder_class = GeneformerTEModel


class CellClassificationHead(nn.Module):
    """Dense, tanh, dropout, projection to the labels; input is the cell's first token, as BERT's pooler reads it."""

    def __init__(self, config: GeneformerTEConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N] -> [B, C]."""
        return self.out_proj(self.dropout(self.dense(x).tanh()))


class GeneformerTEForSequenceClassification(SequenceClassificationModel):
    """Cell classification: the encoder with a classifier over each cell's first token."""

    config_class = GeneformerTEConfig

    def __init__(self, config: GeneformerTEConfig):
        super().__init__(config)
        self.model = GeneformerTEModel(config)
        self.classifier = CellClassificationHead(config)
        self.post_init()
