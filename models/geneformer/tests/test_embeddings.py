"""Cell and gene embeddings against transformers' BertModel, one cell at a time."""

import pandas as pd
import pytest
import torch
from transformers import BertModel

from biote_geneformer import GeneformerTEForMaskedLM, cell_embeddings, gene_embeddings

CELLS = [[2, 17, 9, 40, 1, 23, 3], [2, 9, 3], [2, 31, 17, 5, 30, 8, 12, 3]]


def states_of(folder, layer):
    """Gene tokens and their hidden states, by cell, from the original in float64."""
    original = BertModel.from_pretrained(folder, dtype=torch.float64, add_pooling_layer=False).eval()
    for cell in CELLS:
        ids = torch.tensor(cell)
        with torch.no_grad():
            states = original(ids[None], output_hidden_states=True).hidden_states[layer][0]
        yield ids[ids >= 4], states[ids >= 4]


@pytest.mark.parametrize("layer", [-1, -2, -4])
@pytest.mark.parametrize("tokens", [1, 11, 1000])
def test_cell_embeddings(golden_folder, layer, tokens):
    model = GeneformerTEForMaskedLM.from_original(str(golden_folder), engine="torch").eval()
    expected = torch.stack([states.mean(0) for _, states in states_of(golden_folder, layer)])
    found = cell_embeddings(model, CELLS, layer=layer, batch_tokens=tokens)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_gene_embeddings(golden_folder):
    model = GeneformerTEForMaskedLM.from_original(str(golden_folder), engine="torch").eval()
    by_gene = {}
    for ids, states in states_of(golden_folder, -2):
        for gene, state in zip(ids.tolist(), states, strict=True):
            by_gene.setdefault(gene, []).append(state)
    ids, found = gene_embeddings(model, CELLS, layer=-2, batch_tokens=11)
    assert ids.tolist() == sorted(by_gene)
    expected = torch.stack([torch.stack(by_gene[gene]).mean(0) for gene in sorted(by_gene)])
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_cells_of_v1_have_genes_from_2_on(golden_folder):
    model = GeneformerTEForMaskedLM.from_original(str(golden_folder), engine="torch").eval()
    cell = [3, 17, 2]
    states = model(torch.tensor([cell]), output_hidden_states=True).hidden_states[-2][0].detach()
    torch.testing.assert_close(cell_embeddings(model, [cell], layer=-2, version="V1")[0], states.mean(0))
    ids, found = gene_embeddings(model, pd.Series([cell], index=["a cell"]), layer=-2, version="V1")
    assert ids.tolist() == [2, 3, 17]
    torch.testing.assert_close(found, states[[2, 0, 1]])


def test_what_is_no_cell_is_refused(golden_folder):
    model = GeneformerTEForMaskedLM.from_original(str(golden_folder), engine="torch").eval()
    assert cell_embeddings(model, []).shape == (0, 64)
    with pytest.raises(ValueError, match="cell 3 has no gene"):
        cell_embeddings(model, [*CELLS, [2, 3]], batch_tokens=11)
    with pytest.raises(ValueError, match="cell 1 has no token"):
        gene_embeddings(model, [[2, 9, 3], []])
    with pytest.raises(ValueError, match="cell 1 holds padding"):
        cell_embeddings(model, [[2, 9, 3], [2, 9, 3, 0]])
    with pytest.raises(ValueError, match=r"cell 1 is not between <cls> and <eos>: .*V1"):
        cell_embeddings(model, [[2, 9, 3], [9, 3]])
    with pytest.raises(ValueError, match="cell 0 is not between"):
        cell_embeddings(model, [[2, 9]])
    with pytest.raises(ValueError, match="cell 0 is no list of token ids, but 2"):
        cell_embeddings(model, [2, 9, 3])
    with pytest.raises(ValueError, match=r"cell 0 is no list of token ids, but \[2\.0, 9\.7, 3\.0\]"):
        cell_embeddings(model, [[2, 9.7, 3]])
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"layer={layer} is not one of the model's 4 hidden states"):
            cell_embeddings(model, CELLS, layer=layer)
    with pytest.raises(ValueError, match="version='V3' is unknown"):
        gene_embeddings(model, CELLS, version="V3")
    with pytest.raises(ValueError, match="BertModel is no class of this port"):
        gene_embeddings(BertModel.from_pretrained(golden_folder), CELLS)
    with pytest.raises(ValueError, match="training mode"):
        cell_embeddings(model.train(), CELLS)
