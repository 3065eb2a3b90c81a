"""ESM-2 (Lin et al. 2023, Science 379:1123) on TransformerEngine or PyTorch layers.

Reproduces `transformers`' EsmModel family for ESM-2 checkpoints (rotary positions, token dropout, pre-norm).
Shapes: B batch, S padded length, T packed tokens, N hidden size, V vocabulary, H heads.
"""

from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from biote.runtime.config import EncoderConfig
from biote.runtime.encoder import EncoderModel
from biote.runtime.heads import MaskedLMModel, SequenceClassificationModel, TokenClassificationModel
from biote.runtime.packing import Tokens

TRAINED_MASK_RATIO = 0.15 * 0.8  # share of tokens that were <mask> while ESM-2 was trained


@strict
class Esm2TEConfig(EncoderConfig):
    """Configuration of ESM-2; the defaults are the 8M model's.

    token_dropout: zero the embeddings of <mask> and rescale the rest, as in training.
    contact_head: False for checkpoints that never had one (NVIDIA's); `predict_contacts` then raises.
    mask_token_id: None only without token_dropout, which looks for it.
    """

    model_type = "esm2_te"

    mask_token_id: int | None = 32
    cls_token_id: int = 0
    eos_token_id: int | list[int] | None = 2
    max_position_embeddings: int = 1026
    rope_theta: float | int = 10000.0
    token_dropout: bool = True
    contact_head: bool = True
    tie_word_embeddings: bool = True

    def check(self) -> None:
        """As for every port; token dropout has to know the token."""
        super().check()
        if self.token_dropout and self.mask_token_id is None:
            raise ValueError("token_dropout needs a mask_token_id, which is null")


class Embeddings(nn.Module):
    """Word embeddings with ESM-2's token dropout."""

    def __init__(self, config: Esm2TEConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.mask_token_id = config.mask_token_id if config.token_dropout else None

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings [T, N]; those that the caller made are used as they are."""
        if tokens.embeds is not None:
            return tokens.embeds
        assert tokens.ids is not None
        x = self.word_embeddings(tokens.ids)
        if self.mask_token_id is None:
            return x
        is_mask, packing = tokens.ids == self.mask_token_id, tokens.packing
        bounds = packing.cu_seqlens
        lengths = (bounds.roll(-1) - bounds).clamp(min=1)  # [B + 1], the last of none; in a CUDA graph others too
        counts = torch.zeros_like(lengths, dtype=torch.float32)
        sequence = packing.sequence_of_token()
        counts.index_add_(0, sequence, is_mask.float())
        kept = (1 - counts / lengths)[sequence, None]  # float32, as in the original
        return (x.masked_fill(is_mask[:, None], 0.0) * (1 - TRAINED_MASK_RATIO) / kept).to(x.dtype)


class Regression(nn.Module):
    """Weight [1, layers * H] and bias [1]. No nn.Linear: adapters of "all-linear" pass it by."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, features))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, residues: Tensor, layer: int, maps: Tensor) -> Tensor:
        """What a layer's maps A [B, H, S, S] add to the log odds [B, S, S], float32 at least; the first with the bias.

        That plus its transpose is the sum over heads h of w_h (P_h - s_h s_h^T / sum(s_h)), where P_h is A_h + A_h^T,
        and s_h its row sums: products of A itself, which is neither copied nor corrected. residues: bool [B, S]; a
        pair that is not of two residues gets the bias alone.
        """
        heads = maps.shape[1]
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
            weight = self.weight[0, layer * heads : (layer + 1) * heads].to(maps)  # [H]
            keep = residues.to(maps)
            sums = maps @ keep[:, None, :, None] + maps.mT @ keep[:, None, :, None]  # [B, H, S, 1]
            sums = sums.squeeze(-1) * keep[:, None]
            weighed = sums * (weight[:, None] / sums.sum(-1, keepdim=True))
            plain = torch.bmm(weight.expand(len(maps), 1, heads), maps.flatten(2)).view(-1, *maps.shape[2:])
            plain = plain.masked_fill(~(residues[:, None] & residues[..., None]).to(maps.device), 0.0)
            half = torch.baddbmm(plain, weighed.mT, sums, alpha=-0.5)  # [B, S, S]
            return half if layer else half + self.bias.to(maps) / 2


class ContactHead(nn.Module):
    """Logistic regression over the symmetrised, average-product-corrected attention maps of all layers and heads."""

    def __init__(self, config: Esm2TEConfig):
        super().__init__()
        self.regression = Regression(config.num_hidden_layers * config.num_attention_heads)

    def forward(self, residues: Tensor, layer: int, maps: Tensor, before: Tensor | None) -> Tensor:
        """`Regression` of this layer and those before, [B, S, S]: layers add up, so no maps are kept."""
        added = self.regression(residues, layer, maps).to(maps.device)
        return added if before is None else before + added


class Esm2TEModel(EncoderModel):
    """The encoder: embeddings, pre-norm blocks, final norm. Its last hidden state is ESM-2's protein embedding."""

    config_class = Esm2TEConfig
    contact_head: ContactHead | None

    def __init__(self, config: Esm2TEConfig):
        super().__init__(config, rope_base=config.rope_theta)
        self.embeddings = Embeddings(config)
        self.contact_head = ContactHead(config) if config.contact_head else None
        self.post_init()

    def predict_contacts(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """tokens int64 [B, S]: <cls>, residues, <eos>, padded on either side -> contact probabilities [B, S-2, S-2].

        attention_mask: [B, S], as of `plan_packing`; rows of several sequences are not taken. What is token c of a
        row is contact c - 1 of it: a right-padded row's residues begin at 0. Each row's contacts are those of the row
        alone; the original's are not where rows are padded on the left, whose <cls> it leaves in. Float32 at least,
        whatever the model's dtype. One layer's maps are held at a time.
        """
        if self.contact_head is None:
            raise ValueError("this checkpoint has no contact head: convert the original (facebook/...) to get one")
        special = tokens == self.config.eos_token_id  # [B, S]
        first = 0 if attention_mask is None else attention_mask.to(tokens.device).int().argmax(1, keepdim=True)
        special = special | (torch.arange(tokens.shape[1], device=tokens.device) == first)
        special[:, -1] = True
        read = partial(self.contact_head, ~special)
        found = self(tokens, attention_mask=attention_mask, output_attentions=read, return_dict=True).attentions
        return (found + found.mT)[:, 1:-1, 1:-1].sigmoid()


class LMHead(nn.Module):
    """Dense, GELU, layer norm, then the decoder, whose weight is the word embeddings'."""

    def __init__(self, config: Esm2TEConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, N] -> [T, V]."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(x))))


class Esm2TEForMaskedLM(MaskedLMModel):
    """The encoder with its masked-language-model head: a distribution over residues at each position."""

    config_class = Esm2TEConfig
    model: Esm2TEModel
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def __init__(self, config: Esm2TEConfig):
        super().__init__(config)
        self.model = Esm2TEModel(config)
        self.lm_head = LMHead(config)
        self.post_init()

    def predict_contacts(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As `Esm2TEModel.predict_contacts`."""
        return self.model.predict_contacts(tokens, attention_mask)


class Esm2TEForTokenClassification(TokenClassificationModel):
    """The encoder with one linear layer over each residue."""

    config_class = Esm2TEConfig
    encoder_class = Esm2TEModel


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection to the labels; input is the <cls> token."""

    def __init__(self, config: Esm2TEConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N] -> [B, C]."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class Esm2TEForSequenceClassification(SequenceClassificationModel):
    """The encoder with a classifier over each protein's <cls> token."""

    config_class = Esm2TEConfig

    def __init__(self, config: Esm2TEConfig):
        super().__init__(config)
        self.model = Esm2TEModel(config)
        self.classifier = ClassificationHead(config)
        self.post_init()
