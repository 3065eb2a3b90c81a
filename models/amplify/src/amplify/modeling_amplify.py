"""AMPLIFY in plain PyTorch, with the parameter names of chandar-lab's published code: what the port is held against.

Written from the paper (Fournier et al. 2024, bioRxiv 2024.09.23.614603) and the published configurations, since the
original lives in its checkpoints' remote code, needs xformers, and is never run by biote. Any dtype, float64 included.
Shapes: B batch, S length, H heads, D head dim, N hidden size, V vocabulary.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

ROPE_BASE = 10000.0


@strict
class AMPLIFYConfig(PreTrainedConfig):
    """The fields of the published config.json files that the computation reads; the defaults are the 120M model's."""

    model_type = "AMPLIFY"

    vocab_size: int = 27
    hidden_size: int = 640
    num_hidden_layers: int = 24
    num_attention_heads: int = 10
    intermediate_size: int = 2560
    hidden_act: str = "SwiGLU"
    dropout_prob: float = 0.0
    rms_norm: bool = True
    norm_eps: float = 1e-5
    att_bias: bool = False
    ffn_bias: bool = False
    layer_norm_after_embedding: bool = False
    layer_norm_before_last_layer: bool = True
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    max_length: int = 2048
    pad_token_id: int | None = 0
    mask_token_id: int = 2
    bos_token_id: int | None = 3
    eos_token_id: int | list[int] | None = 4
    tie_word_embeddings: bool = False


class RMSNorm(nn.Module):
    """x over the root of its mean square, computed in float32 at least, cast back, then times a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def norm_of(config: AMPLIFYConfig) -> nn.Module:
    """The kind of norm that the configuration asks for."""
    return (RMSNorm if config.rms_norm else nn.LayerNorm)(config.hidden_size, eps=config.norm_eps)


def rotations(length: int, head_dim: int, device: torch.device) -> Tensor:
    """exp(i * position / base^(2j/D)), complex64 [S, D/2]."""
    frequencies = 1.0 / ROPE_BASE ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply each pair (2j, 2j + 1) of x [B, S, H, D], as a complex number, by its position's turn [S, D/2]."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """w3(silu(gate) * value), gate and value the halves of w12(x); two thirds as wide, up to a multiple of 8."""

    def __init__(self, config: AMPLIFYConfig):
        super().__init__()
        width = (int(2 * config.intermediate_size / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(config.hidden_size, 2 * width, bias=config.ffn_bias)
        self.w3 = nn.Linear(width, config.hidden_size, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


def feed_forward_of(config: AMPLIFYConfig) -> nn.Module:
    """The feed-forward layers, by `hidden_act`."""
    if config.hidden_act.lower() == "swiglu":
        return SwiGLU(config)
    activation = {"relu": nn.ReLU, "gelu": nn.GELU}[config.hidden_act.lower()]
    size, width, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
    return nn.Sequential(nn.Linear(size, width, bias=bias), activation(), nn.Linear(width, size, bias=bias))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: AMPLIFYConfig):
        super().__init__()
        size, bias = config.hidden_size, config.att_bias
        self.heads, self.dropout = config.num_attention_heads, config.dropout_prob
        self.q, self.k, self.v, self.wo = (nn.Linear(size, size, bias=bias) for _ in range(4))
        self.ffn = feed_forward_of(config)
        self.attention_norm, self.ffn_norm = norm_of(config), norm_of(config)

    def forward(self, x: Tensor, keep: Tensor | None, turns: Tensor, maps: bool) -> tuple[Tensor, Tensor | None]:
        """x [B, S, N], keep bool [B, 1, 1, S] -> [B, S, N], and attention weights [B, H, S, S] if `maps`."""
        normed = self.attention_norm(x)
        q, k, v = (layer(normed).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, turns), rotate(k, turns), v))  # [B, H, S, D]
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
        attended = self.wo(context.transpose(1, 2).flatten(2))
        x = x + F.dropout(attended, dropout)
        x = x + F.dropout(self.ffn(self.ffn_norm(x)), dropout)
        return x, attention_weights(q, k, keep) if maps else None


def attention_weights(q: Tensor, k: Tensor, keep: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) over the tokens to keep; [B, H, S, S]."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(-1)


class AMPLIFY(PreTrainedModel):
    """The whole model with its masked-language-model head, as published."""

    config_class = AMPLIFYConfig
    base_model_prefix = ""

    def __init__(self, config: AMPLIFYConfig):
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if config.layer_norm_after_embedding:
            self.layer_norm_1 = norm_of(config)
        self.transformer_encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        if config.layer_norm_before_last_layer:
            self.layer_norm_2 = norm_of(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.uniform_(-self.config.decoder_init_range, self.config.decoder_init_range)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.uniform_(-self.config.embedding_init_range, self.config.embedding_init_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MaskedLMOutput:
        """input_ids [B, S], attention_mask 1 for a token [B, S] -> logits [B, S, V].

        hidden_states: each block's output, before layer_norm_2. loss: mean cross-entropy of labels that are not -100.
        """
        x: Any = self.encoder(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] > self.config.max_length:
            raise ValueError(f"{x.shape[1]} tokens are more than max_length, {self.config.max_length}")
        keep = None if attention_mask is None else attention_mask.bool()[:, None, None]
        turns = rotations(x.shape[1], self.config.hidden_size // self.config.num_attention_heads, x.device)
        if self.config.layer_norm_after_embedding:
            x = self.layer_norm_1(x)
        states, attentions = [], []
        for block in self.transformer_encoder:
            x, weights = block(x, keep, turns, output_attentions)
            states.append(x)
            attentions.append(weights)
        logits = self.decoder(self.layer_norm_2(x) if self.config.layer_norm_before_last_layer else x)
        loss = None
        if labels is not None:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(wide.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
