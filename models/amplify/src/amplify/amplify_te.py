"""AMPLIFY (Fournier et al. 2024, bioRxiv 2024.09.23.614603) on TransformerEngine or PyTorch layers.

Reproduces chandar-lab's AMPLIFY: pre-norm blocks with RMS norms, SwiGLU, rotary pairs and no biases.
Shapes: T packed tokens, N hidden size, V vocabulary.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from biote.runtime.block import norm_of
from biote.runtime.config import EncoderConfig
from biote.runtime.encoder import EncoderModel
from biote.runtime.heads import MaskedLMModel, SequenceClassificationModel, TokenClassificationModel
from biote.runtime.packing import Tokens


@strict
class AmplifyTEConfig(EncoderConfig):
    """Configuration of AMPLIFY; the defaults are the 120M model's.

    intermediate_size: the original's number; with SwiGLU its layers are two thirds as wide (`feed_forward_width`).
    layer_norm_after_embedding, layer_norm_before_last_layer: where else the model has a norm.
    """

    model_type = "amplify_te"
    uniform_initializer: ClassVar[bool] = True

    vocab_size: int = 27
    hidden_size: int = 640
    num_hidden_layers: int = 24
    num_attention_heads: int = 10
    intermediate_size: int = 2560
    hidden_act: str = "swiglu"
    rms_norm: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: str = "pairs"
    pad_token_id: int | None = 0
    mask_token_id: int = 2
    bos_token_id: int | None = 3
    eos_token_id: int | list[int] | None = 4
    max_position_embeddings: int = 2048
    layer_norm_after_embedding: bool = False
    layer_norm_before_last_layer: bool = True
    tie_word_embeddings: bool = False

    @property
    def feed_forward_width(self) -> int:
        """Two thirds of intermediate_size for SwiGLU, rounded up to a multiple of 8; else intermediate_size itself."""
        if self.hidden_act != "swiglu":
            return self.intermediate_size
        return -(-int(2 * self.intermediate_size / 3) // 8) * 8


class Embeddings(nn.Module):
    """Word embeddings, and a norm where the configuration asks for one."""

    def __init__(self, config: AmplifyTEConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layer_norm = norm_of(config) if config.layer_norm_after_embedding else nn.Identity()

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings [T, N], of token ids or as the caller made them."""
        return self.layer_norm(self.word_embeddings(tokens.ids) if tokens.embeds is None else tokens.embeds)


class AmplifyTEModel(EncoderModel):
    """The encoder. Its last hidden state comes after the final norm; the published embedding is hidden_states[-1]."""

    config_class = AmplifyTEConfig

    def __init__(self, config: AmplifyTEConfig):
        super().__init__(config, rope_base=10000.0)
        self.embeddings = Embeddings(config)
        if not config.layer_norm_before_last_layer:
            self.final_norm = nn.Identity()
        self.max_positions = config.max_position_embeddings
        self.post_init()

    def original_states(self, states: list[Tensor], last: Tensor) -> list[Tensor]:
        """Each block's output, before the final norm; the original leaves the embeddings out."""
        return states[1:]


class LMHead(nn.Module):
    """A linear layer to the vocabulary, its weight not tied to the embeddings."""

    def __init__(self, config: AmplifyTEConfig):
        super().__init__()
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, N] -> [T, V]."""
        return self.decoder(x)


class AmplifyTEForMaskedLM(MaskedLMModel):
    """The encoder with its masked-language-model head: a distribution over residues at each position."""

    config_class = AmplifyTEConfig

    def __init__(self, config: AmplifyTEConfig):
        super().__init__(config)
        self.model = AmplifyTEModel(config)
        self.lm_head = LMHead(config)
        self.post_init()


class AmplifyTEForTokenClassification(TokenClassificationModel):
    """The encoder with one linear layer over each residue. The original has no such class."""

    config_class = AmplifyTEConfig
    encoder_class = AmplifyTEModel


class AmplifyTEForSequenceClassification(SequenceClassificationModel):
    """The encoder with one linear layer over each protein's <bos> token. The original has no such class."""

    config_class = AmplifyTEConfig

    def __init__(self, config: AmplifyTEConfig):
        super().__init__(config)
        self.model = AmplifyTEModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()
