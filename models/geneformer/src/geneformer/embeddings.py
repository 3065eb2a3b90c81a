"""Embeddings of cells and of genes: means of hidden states over gene tokens, special tokens left out.

Shapes: B cells, T packed tokens of a batch, K genes that occur, N hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biote.data.batches import packed
from biote.runtime.encoder import EncoderModel

from .special_tokens import special_tokens

TOKENS_A_BATCH = 16_384


def cell_embeddings(
    model: Any,
    cells: Sequence[Sequence[int]],
    layer: int = -1,
    version: str = "V2",
    batch_tokens: int = TOKENS_A_BATCH,
) -> Tensor:
    """Each cell's mean over its genes, float32 [B, N] on the CPU.

    model: any of this port's classes, on any device, in eval mode. cells: token ids of each cell, as the
    tokenizer gives them. layer: -1 for the last hidden state, -2 for the one before it, as hidden_states count.
    version: the tokenizer's, which says what ids are genes. batch_tokens: about how many run at once.
    ValueError for a cell without a gene, one of V2 outside <cls> and <eos>, or a model in training mode.
    """
    first_gene = len(special_tokens(version))
    means = [torch.empty(0, model.config.hidden_size)]
    for ids, cell_of, states in hidden_states(model, cells, layer, version, batch_tokens):
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
    version: str = "V2",
    batch_tokens: int = TOKENS_A_BATCH,
) -> tuple[Tensor, Tensor]:
    """Each gene's mean over the cells it occurs in: token ids int64 [K], rising, and float32 [K, N], on the CPU.

    Arguments as of `cell_embeddings`.
    """
    first_gene = len(special_tokens(version))
    vocabulary, size = model.config.vocab_size, model.config.hidden_size
    sums = torch.zeros(vocabulary, size, device=model.device)
    counts = torch.zeros(vocabulary, dtype=torch.int64, device=model.device)
    for ids, _, states in hidden_states(model, cells, layer, version, batch_tokens):
        gene = ids >= first_gene
        sums.index_add_(0, ids[gene], states[gene])
        counts += torch.bincount(ids[gene], minlength=vocabulary)
    present = counts.nonzero().flatten()
    return present.cpu(), (sums[present] / counts[present, None]).cpu()


def hidden_states(
    model: Any, given: Sequence[Any], layer: int, version: str, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of whole cells, packed: token ids [T], each one's cell in the batch [T], float32 states [T, N]."""
    encoder = next((module for module in model.modules() if isinstance(module, EncoderModel)), None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} is no class of this port; GeneformerTEModel.from_original loads one")
    if model.training:
        raise ValueError("the model is in training mode, with dropout: call model.eval() first")
    states_made = model.config.num_hidden_layers + 1
    if not -states_made <= layer < states_made:
        raise ValueError(f"layer={layer} is not one of the model's {states_made} hidden states")
    cells = [np.asarray(cell) for cell in given]
    check_cells(cells, version, model.config.pad_token_id)
    start = 0
    while start < len(cells):
        end, size = start + 1, len(cells[start])
        while end < len(cells) and size + len(cells[end]) <= batch_tokens:
            size, end = size + len(cells[end]), end + 1
        lengths = torch.tensor([len(cell) for cell in cells[start:end]])
        batch = packed(cells[start:end], model.device)
        with torch.inference_mode():
            output = encoder(**batch, output_hidden_states=layer != -1, return_dict=True)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        yield (
            batch["input_ids"][0],
            torch.repeat_interleave(torch.arange(end - start), lengths).to(model.device),
            states[0].float(),
        )
        start = end


def check_cells(cells: list[np.ndarray], version: str, padding: int) -> None:
    """ValueError for what is no list of token ids as the tokenizer makes them for one cell."""
    special = special_tokens(version)
    for number, cell in enumerate(cells):
        if cell.ndim == 1 and len(cell) == 0:
            raise ValueError(f"cell {number} has no token")
        if cell.ndim != 1 or cell.dtype.kind not in "iu":
            raise ValueError(f"cell {number} is no list of token ids, but {cell.tolist()}: give a list of cells")
        if padding in cell:
            raise ValueError(f"cell {number} holds padding (id {padding}): give it without")
        if "<cls>" in special and (cell[0] != special["<cls>"] or cell[-1] != special["<eos>"]):
            raise ValueError(f'cell {number} is not between <cls> and <eos>: cells of V1 need version="V1"')
