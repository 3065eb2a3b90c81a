"""Embeddings of cells and of genes: means of hidden states over gene tokens, special tokens left out.

Shapes: B cells, T packed tokens of a batch, K genes that occur, N hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from biote.runtime.modeling import EncoderModel

TOKENS_A_BATCH = 16_384


def cell_embeddings(
    model: Any,
    cells: Sequence[Sequence[int]],
    layer: int = -1,
    first_gene: int = 4,
    batch_tokens: int = TOKENS_A_BATCH,
) -> Tensor:
    """Each cell's mean over its genes, float32 [B, N] on the CPU.

    model: any of this port's classes, on any device, in eval mode. cells: token ids of each cell, as the
    tokenizer gives them. layer: -1 for the last hidden state, -2 for the one before it, as hidden_states count.
    first_gene: the smallest id of a gene, 4 in V2 and 2 in V1. batch_tokens: about how many run at once.
    ValueError for a cell without a gene, or a model in training mode.
    """
    means = [torch.empty(0, model.config.hidden_size)]
    for ids, cell_of, states in _hidden_states(model, cells, layer, batch_tokens):
        gene = ids >= first_gene
        count = int(cell_of[-1]) + 1
        sums = states.new_zeros(count, states.shape[1]).index_add_(0, cell_of[gene], states[gene])
        genes = torch.bincount(cell_of[gene], minlength=count)
        if int(genes.min()) == 0:
            number = sum(len(mean) for mean in means) + int(genes.argmin())
            raise ValueError(f"cell {number} has no gene: none of its token ids is {first_gene} or more")
        means.append((sums / genes[:, None]).cpu())
    return torch.cat(means)


def gene_embeddings(
    model: Any,
    cells: Sequence[Sequence[int]],
    layer: int = -1,
    first_gene: int = 4,
    batch_tokens: int = TOKENS_A_BATCH,
) -> tuple[Tensor, Tensor]:
    """Each gene's mean over the cells it occurs in: token ids int64 [K], rising, and float32 [K, N], on the CPU.

    Arguments as of `cell_embeddings`.
    """
    vocabulary, size = model.config.vocab_size, model.config.hidden_size
    sums = torch.zeros(vocabulary, size, device=model.device)
    counts = torch.zeros(vocabulary, dtype=torch.int64, device=model.device)
    for ids, _, states in _hidden_states(model, cells, layer, batch_tokens):
        gene = ids >= first_gene
        sums.index_add_(0, ids[gene], states[gene])
        counts += torch.bincount(ids[gene], minlength=vocabulary)
    present = counts.nonzero().flatten()
    return present.cpu(), (sums[present] / counts[present, None]).cpu()


def _hidden_states(
    model: Any, cells: Sequence[Sequence[int]], layer: int, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of whole cells, packed: token ids [T], each one's cell in the batch [T], float32 states [T, N]."""
    if model.training:
        raise ValueError("the model is in training mode, with dropout: call model.eval() first")
    empty = [number for number, cell in enumerate(cells) if len(cell) == 0]
    if empty:
        raise ValueError(f"cell {empty[0]} has no token")
    padded = [number for number, cell in enumerate(cells) if model.config.pad_token_id in cell]
    if padded:
        raise ValueError(f"cell {padded[0]} holds padding (id {model.config.pad_token_id}): give it without")
    encoder = next(module for module in model.modules() if isinstance(module, EncoderModel))
    start = 0
    while start < len(cells):
        end, size = start + 1, len(cells[start])
        while end < len(cells) and size + len(cells[end]) <= batch_tokens:
            size, end = size + len(cells[end]), end + 1
        lengths = torch.tensor([len(cell) for cell in cells[start:end]])
        ids = torch.cat([torch.as_tensor(cell, dtype=torch.int64) for cell in cells[start:end]]).to(model.device)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(model.device)
        with torch.inference_mode():
            output = encoder(ids[None], cu_seq_lens_q=bounds, output_hidden_states=layer != -1, return_dict=True)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        yield ids, torch.repeat_interleave(torch.arange(end - start), lengths).to(model.device), states[0].float()
        start = end
