"""What of CUDA graphs needs no GPU: a copy of a model, or a model that moves, does not keep the graphs."""

import copy
import io

import pytest
import torch

from esm2 import Esm2TEConfig, Esm2TEModel


@pytest.fixture
def model():
    config = Esm2TEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, engine="torch")
    made = Esm2TEModel(config)
    made.graphed.graphs["recorded"] = None
    return made


def test_a_copy_records_graphs_of_its_own(model):
    assert not copy.deepcopy(model).graphed.graphs
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert not torch.load(buffer, weights_only=False).graphed.graphs
    assert model.graphed.graphs


@pytest.mark.parametrize("move", [lambda model: model.half(), lambda model: model.to("meta")])
def test_weights_that_move_leave_no_graph(model, move):
    assert not move(model).graphed.graphs
