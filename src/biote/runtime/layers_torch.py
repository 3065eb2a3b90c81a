"""The torch engine: plain PyTorch, on any device.

Shapes: T packed tokens, B sequences, S padded length, H heads, D head dim, L length of one sequence, N features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from .activations import ACTIVATIONS
from .layers import Layers
from .packing import Packing
from .rope import Rotary, rotate

PIECE = 2**20  # scores that are made at once, where attention maps are asked for, or one head's


class TorchLayers(Layers):
    """Every module is called, nothing is fused or overwritten."""

    def linear(self, in_features: int, out_features: int, bias: bool, quantised: bool) -> nn.Module:
        """As the contract says; `precision.py` has refused quantised layers before."""
        return nn.Linear(in_features, out_features, bias)

    def add_norm(
        self, norm: nn.Module, x: Tensor, delta: Tensor | None, post_norm: bool, into: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x if delta is None else x + delta
        normed = norm(x)
        return normed if post_norm else x, normed

    def activate(self, x: Tensor, activation: str, into: nn.Module) -> Tensor:
        return ACTIVATIONS[activation](x)

    def attend(
        self, qkv: Tensor, made_by: nn.Module, rotary: Rotary | None, packing: Packing, dropout: float
    ) -> Tensor:
        tokens = packing.positions.shape[0]
        surplus = qkv.shape[0] - tokens
        q, k, v = (x[:tokens] for x in queries_keys_values(qkv, rotary))
        context = _attend(q, k, v, packing, dropout)
        return F.pad(context, (0, 0, 0, 0, 0, surplus)) if surplus else context


def queries_keys_values(qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, H, 3, D] -> 3 x [T, H, D]; queries times D^-0.5, queries and keys turned to their positions."""
    q, k, v = qkv.unbind(2)
    scale = q.shape[-1] ** -0.5
    if rotary is None:
        return q * scale, k, v
    return rotate(q, rotary, scale), rotate(k, rotary), v


def attention_weights(qkv: Tensor, rotary: Rotary | None, packing: Packing) -> Tensor:
    """The softmax itself, [B, H, S, S] in the caller's rows, zero where there is no token. qkv: [T, H, 3, D]."""
    q, k, _ = queries_keys_values(qkv, rotary)
    rows, width = packing.shape
    weights = q.new_zeros(rows, q.shape[1], width, width)
    slots = torch.arange(rows * width, device=q.device) if packing.indices is None else packing.indices
    tokens = len(slots)  # without the surplus that quantised products want
    pieces = (tensor[:tokens].split(packing.lengths) for tensor in (slots, q, k))
    for one, qi, ki in zip(*pieces, strict=True):
        row, columns = int(one[0]) // width, one % width
        heads = max(1, PIECE // len(one) ** 2)
        for first, qh, kh in zip(range(0, q.shape[1], heads), qi.split(heads, 1), ki.split(heads, 1), strict=True):
            scores = torch.einsum("lhd,mhd->hlm", qh, kh)
            scores = scores.softmax(-1).to(weights.dtype)  # autocast makes them float32
            weights[row, first : first + heads, columns[:, None], columns] = scores
    return weights


def _attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    """q (scaled), k, v [T, H, D] -> [T, H, D]."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not dropout:
        bounds, longest = packing.cu_seqlens, packing.max_seqlen
        context = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=1.0)
        assert isinstance(context, Tensor)  # a tuple only if more were asked for
        return context
    if torch.compiler.is_compiling():  # which cannot know the lengths
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
        sequence = packing.sequence_of_token()
        together = sequence[:, None] == sequence  # [T, T]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=together, dropout_p=dropout, scale=1.0)
        return context[0].transpose(0, 1)
    lengths = packing.lengths
    if min(lengths) == max(lengths):
        batch = (len(lengths), lengths[0])
        q, k, v = (x.unflatten(0, batch).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=1.0)
        return context.transpose(1, 2).flatten(0, 1)
    pieces = []
    for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        qi, ki, vi = (x.transpose(0, 1)[None] for x in one)  # [1, H, L, D]
        context = F.scaled_dot_product_attention(qi, ki, vi, dropout_p=dropout, scale=1.0)
        pieces.append(context[0].transpose(0, 1))
    return torch.cat(pieces)


torch_layers = TorchLayers()
