"""In silico perturbation against transformers' BertModel in float64, one cell and one gene at a time, with lists."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel

pytest.importorskip("anndata", reason="the tokenizer reads AnnData; pip install -e models/geneformer brings it")
from biote.testing.contract import randomize
from biote_geneformer import (
    GeneformerTEModel,
    GeneformerTokenizer,
    convert_hf_to_te,
    delete_genes,
    overexpress_genes,
    perturbation_similarities,
)

SPECIAL = {"V1": ["<pad>", "<mask>"], "V2": ["<pad>", "<mask>", "<cls>", "<eos>"]}


def tokenizer_of(version):
    names = [*SPECIAL[version], *(f"ENSG{number:011}" for number in range(48 - len(SPECIAL[version])))]
    return GeneformerTokenizer({n: i for i, n in enumerate(names)}, dict.fromkeys(names, 1.0), version)


def cells_of(version, positions=32):
    """Four cells, the last one full: the tiny model has 32 positions."""
    first = len(SPECIAL[version])
    inner = [[17, 9, 40, 5, 23], [9, 17], [31, 30, 12], [*range(12, 12 + positions - (first - 2))]]
    return [cell if version == "V1" else [2, *cell, 3] for cell in inner]


def by_hand(original, tokenizer, cells, groups, kind, layer):
    """The rules with lists, a cell at a time, the original's states in float64."""
    around = 1 if tokenizer.version == "V2" else 0
    full = 32 - 2 * around

    def mean(cell, left_out):
        ids = [2, *cell, 3] if around else cell
        with torch.no_grad():
            states = original(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        kept = [state for token, state in zip(ids, states, strict=True) if token >= 2 + 2 * around]
        kept = [state for token, state in zip(cell, kept, strict=True) if token not in left_out]
        return sum(kept) / len(kept) if kept else None

    table = []
    for given in cells:
        cell, row = given[around : len(given) - around], []
        for names in groups:
            genes = [tokenizer.genes[name] for name in names]
            others = [token for token in cell if token not in genes]
            if kind == "delete":
                pair = (cell, others) if set(genes) <= set(cell) else None
            else:
                others = others[: full - len(genes)]
                pair = ([token for token in cell if token in genes or token in others], [*genes, *others])
            means = [mean(one, genes) for one in pair] if pair and others else [None, None]
            dots = [[float(a @ b) for b in means] for a in means] if means[0] is not None else None
            row.append(dots[0][1] / math.sqrt(dots[0][0] * dots[1][1]) if dots else math.nan)
        table.append(row)
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize(("version", "layer"), [("V2", -1), ("V2", -2), ("V1", -1)])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_similarities_are_those_of_the_original(golden_folder, kind, version, layer, tokens):
    tokenizer = tokenizer_of(version)
    names = {number: gene for gene, number in tokenizer.genes.items()}
    groups = [
        [names[token] for token in group] for group in ((17,), (9,), (17, 9), (9, 17), (31,), (5,), (14, 45, 40))
    ]
    config = BertConfig.from_pretrained(golden_folder)
    original = randomize(BertModel(config, add_pooling_layer=False), 0, 0.3).double().eval()
    model = convert_hf_to_te(original, engine="torch").eval()
    cells = cells_of(version)
    found = perturbation_similarities(model, tokenizer, cells, groups, kind, layer, batch_tokens=tokens)
    expected = by_hand(original, tokenizer, cells, groups, kind, layer)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7, equal_nan=True)
    moved = expected[~expected.isnan()]
    assert (1 - moved).quantile(0.2) > 1e-6, "or the comparison shows nothing"
    assert int(expected.isnan().sum()) == {"delete": 18, "overexpress": 2}[kind]
    one = perturbation_similarities(model, tokenizer, cells[3:], [groups[2]], kind, layer)
    torch.testing.assert_close(one, found[3:, 2:3], rtol=0, atol=1e-7, equal_nan=True)


def test_lists_of_genes():
    assert delete_genes([2, 9, 8, 7, 6, 3], [8, 6]).tolist() == [2, 9, 7, 3]
    assert delete_genes([3, 9, 2, 7], [2], "V1").tolist() == [3, 9, 7]
    assert delete_genes([2, 9, 3], [5]).tolist() == [2, 9, 3]
    assert overexpress_genes([2, 9, 8, 7, 6, 3], [6, 8]).tolist() == [2, 6, 8, 9, 7, 3]
    assert overexpress_genes([2, 9, 8, 3], [5]).tolist() == [2, 5, 9, 8, 3]
    assert overexpress_genes([3, 9, 2], [2], "V1").tolist() == [2, 3, 9]
    assert overexpress_genes([3, 9, 2], [7], "V1", most=3).tolist() == [7, 3, 9]
    full = [2, *range(4, 4098), 3]
    assert overexpress_genes(full, [5000]).tolist() == [2, 5000, *range(4, 4097), 3]
    assert overexpress_genes(full, [4097]).tolist() == [2, 4097, *range(4, 4097), 3]


def test_what_cannot_be_perturbed_is_refused(golden_folder):
    model = GeneformerTEModel.from_original(str(golden_folder), engine="torch").eval()
    tokenizer = tokenizer_of("V2")
    cells, gene = [[2, 9, 17, 3]], "ensg00000000005"
    assert perturbation_similarities(model, tokenizer, [], [[gene]]).shape == (0, 1)
    assert perturbation_similarities(model, tokenizer, cells, []).shape == (1, 0)
    assert perturbation_similarities(model, tokenizer, cells, [[gene]]).isfinite().all()
    for wrong, message in (
        ({"kind": "activate"}, "kind='activate' is unknown; choose one of delete, overexpress"),
        ({"perturbations": [["TP53"]]}, "the token dictionary has no TP53: genes go by Ensembl id"),
        ({"perturbations": ["TP53"]}, "'TP53' is no list of genes that are perturbed together"),
        ({"perturbations": [[]]}, r"\[\] is no list of genes"),
        ({"perturbations": [[gene, gene.upper()]]}, "a gene twice, or 30 genes or more: ENSG00000000005"),
        ({"cells": [[9, 17]]}, 'cell 0 is not between <cls> and <eos>: cells of V1 need version="V1"'),
        ({"layer": 9}, "layer=9 is not one of the model's 4 hidden states"),
    ):
        with pytest.raises(ValueError, match=message):
            perturbation_similarities(
                **{"model": model, "tokenizer": tokenizer, "cells": cells, "perturbations": [[gene]], **wrong}
            )
    with pytest.raises(ValueError, match="training mode"):
        perturbation_similarities(model.train(), tokenizer, cells, [[gene]])
