"""What of CUDA graphs needs no GPU: a copy of a model, or a model that moves, does not keep the graphs."""

import copy
import io
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from biote.runtime.cuda_graphs import GraphedEncoder
from biote.runtime.packing import plan_packing
from biote_esm2 import Esm2TEConfig, Esm2TEModel


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


class NoGraph:
    """Stands in for torch.cuda's graph, which this machine cannot record."""

    def pool(self):
        return "the first's"

    def replay(self):
        pass


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: MagicMock())
    pools = []
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _, pool: nullcontext(pools.append(pool)))
    return pools


def test_modes_mix(model, stand_ins):
    """What inference mode recorded, another mode may fill and replay."""
    encoder = GraphedEncoder()
    embed = model.embeddings.word_embeddings
    ids = torch.arange(5, 15)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found = encoder(lambda ids, _: embed(ids), ids.clone(), plan_packing(ids[None]))
            assert torch.equal(found, embed(ids))


def test_graphs_share_memory_which_ends_with_the_last(stand_ins):
    encoder = GraphedEncoder()

    def record(tokens):
        ids = torch.ones(1, tokens, dtype=torch.long)
        encoder(lambda ids, _: ids, ids[0], plan_packing(ids))

    record(64)
    record(700)
    encoder.graphs.clear()
    record(64)
    assert stand_ins == [None, "the first's", None]


BATCHES = [[[300], [290, 1]], [[64]], [[1] * 200, [65, *[1] * 140]], [[60] * 200, [7] * 1700]]


@pytest.mark.parametrize("batches", BATCHES)
def test_every_token_of_a_graph_is_in_a_sequence(batches, stand_ins):
    """Attention writes no row outside of the sequences, so the tokens that fill a graph up must be one."""
    encoder = GraphedEncoder()
    for lengths in batches:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.ones(1, int(bounds[-1]), dtype=torch.long)
        encoder(lambda ids, _: ids, ids[0], plan_packing(ids, cu_seq_lens_q=bounds))
        recorded = next(reversed(encoder.graphs.values())).packing
        within = recorded.lengths
        assert within[: len(lengths)] == lengths
        assert sum(within) == len(recorded.positions)
        assert max(within) <= recorded.max_seqlen
        assert set(within[len(lengths) + 1 :]) <= {0}
