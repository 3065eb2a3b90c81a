"""In silico perturbation: what deleting or over-expressing genes does to the embeddings of cells.

Source: Theodoris et al. 2023, Nature 618:616, methods; where the paper leaves it open, as the original's code has it.
Shapes: B cells, P perturbations, T tokens of a cell, N hidden size.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from .embeddings import TOKENS_A_BATCH, check_cells, hidden_states
from .special_tokens import MOST_GENES, special_tokens

KINDS = ("delete", "overexpress")
PAIRS = 16  # of a cell and a perturbation, whose states are in memory at a time
Ids = Sequence[int] | np.ndarray


def delete_genes(cell: Ids, genes: Ids, version: str = "V2") -> np.ndarray:
    """The token ids of a cell, int64, without those of the genes: what stands behind one moves up."""
    before, inner, after = _parts(cell, version)
    return np.concatenate((before, inner[~np.isin(inner, genes)], after))


def overexpress_genes(cell: Ids, genes: Ids, version: str = "V2", most: int | None = None) -> np.ndarray:
    """The token ids of a cell, int64, with those of the genes in front, in the order given.

    A gene that the cell has moves there, another is inserted. What then is more than `most` genes, by default as many
    as cells of the version have, drops off the end.
    """
    before, inner, after = _parts(cell, version)
    made = np.concatenate((np.asarray(genes, np.int64), inner[~np.isin(inner, genes)]))
    return np.concatenate((before, made[: MOST_GENES[version] if most is None else most], after))


def perturbation_similarities(
    model: Any,
    tokenizer: Any,
    cells: Sequence[Ids],
    perturbations: Sequence[Sequence[str]],
    kind: str = "delete",
    layer: int = -1,
    batch_tokens: int = TOKENS_A_BATCH,
) -> Tensor:
    """Cosine similarity of each cell's embedding after each perturbation to that before it, float64 [B, P].

    1 says that the cell did not move. Both embeddings are means over the genes that are not perturbed: the state of a
    perturbed gene, which comes or goes with it, does not count. Where over-expression inserts a gene into a full cell,
    the genes that drop off its end are taken from the cell before it too. Both as in the original.

    tokenizer: a GeneformerTokenizer. cells: token ids, as it gives them. perturbations: Ensembl ids that are perturbed
    together; [[gene] for gene in genes] takes each by itself. kind: "delete" or "overexpress", see the functions of
    these names. layer, batch_tokens: as of `cell_embeddings`.
    NaN where there is nothing to compare: a gene to delete that the cell does not have, or no other gene in it.
    ValueError for an unknown gene or kind, and for what `cell_embeddings` refuses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    version = tokenizer.version
    most = min(MOST_GENES[version], model.config.max_position_embeddings - sum(tokenizer.specials_around))
    groups = [_tokens(tokenizer, genes, most) for genes in perturbations]
    ids = [np.asarray(cell) for cell in cells]
    check_cells(ids, version, model.config.pad_token_id)
    found = torch.full((len(ids), len(groups)), torch.nan, dtype=torch.float64)
    pairs = product(range(len(ids)), range(len(groups)))
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("perturbing cells", total=found.numel())
        while some := list(islice(pairs, PAIRS)):
            jobs, originals = [], {}  # one original for all perturbations of a cell, unless genes drop off its end
            for cell, number in some:
                genes = groups[number]
                lists = _before_and_after(ids[cell], genes, kind, version, most)
                if lists is not None:
                    key = lists[0].tobytes()
                    originals[key] = lists[0]
                    jobs.append((cell, number, key, lists[1]))
            options = (model, layer, version, batch_tokens)
            states = dict(zip(originals, _by_cell(list(originals.values()), *options), strict=True))
            after = _by_cell([perturbed for *_, perturbed in jobs], *options)
            for (cell, number, key, _), state in zip(jobs, after, strict=True):
                genes = groups[number]
                means = [_mean(*one, genes, len(special_tokens(version))) for one in (states[key], state)]
                found[cell, number] = F.cosine_similarity(means[0], means[1], dim=0)
            progress.advance(task, len(some))
    return found


def _before_and_after(
    cell: np.ndarray, genes: np.ndarray, kind: str, version: str, most: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The lists to compare, int64, which hold the same genes beside those perturbed; None if they cannot be."""
    if kind == "delete":
        if not np.isin(genes, cell).all():
            return None
        perturbed = delete_genes(cell, genes, version)
    else:
        perturbed = overexpress_genes(cell, genes, version, most)
    if np.isin(_parts(perturbed, version)[1], genes).all():
        return None
    return cell[np.isin(cell, perturbed) | np.isin(cell, genes)].astype(np.int64), perturbed


def _by_cell(
    cells: list[np.ndarray], model: Any, layer: int, version: str, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each cell's token ids [T] and hidden states [T, N]."""
    for ids, cell_of, states in hidden_states(model, cells, layer, version, batch_tokens):
        lengths = torch.bincount(cell_of).tolist()
        yield from zip(ids.split(lengths), states.split(lengths), strict=True)


def _mean(ids: Tensor, states: Tensor, left_out: np.ndarray, first_gene: int) -> Tensor:
    counted = (ids >= first_gene) & ~torch.isin(ids, torch.from_numpy(left_out).to(ids.device))
    return states[counted].double().mean(0)


def _parts(cell: Ids, version: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The special tokens before the genes of a cell, its genes, and the special tokens after them."""
    ids, around = np.asarray(cell, np.int64), 0 if version == "V1" else 1
    return ids[:around], ids[around : len(ids) - around], ids[len(ids) - around :]


def _tokens(tokenizer: Any, genes: Sequence[str], most: int) -> np.ndarray:
    if isinstance(genes, str) or not len(genes):
        raise ValueError(f"{genes!r} is no list of genes that are perturbed together")
    names = [gene.upper() for gene in genes]
    unknown = [gene for gene in names if gene not in tokenizer.genes]
    if unknown:
        raise ValueError(f"the token dictionary has no {', '.join(unknown[:3])}: genes go by Ensembl id")
    if len(set(names)) < len(names) or len(names) >= most:
        raise ValueError(f"a perturbation has a gene twice, or {most} genes or more: {', '.join(names[:3])}, ...")
    return np.array([tokenizer.genes[name] for name in names], np.int64)
