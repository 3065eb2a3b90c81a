"""Attention maps: all layers' at once, or read one layer at a time where they are made."""

import pytest
import torch
from torch import Tensor

from biote.runtime import layers_torch


def weighted_sum(calls: list[int] | None = None):
    """A reader whose result depends on which layer a map is of."""

    def read(layer: int, maps: Tensor, before: Tensor | None) -> Tensor:
        if calls is not None:
            calls.append(layer)
        found = (layer + 1) * maps.sin()
        return found if before is None else before + found

    return read


def test_a_function_reads_each_layers_maps(tiny):
    model, batch = tiny.model(), tiny.batch()
    calls: list[int] = []
    with torch.no_grad():
        plain = model(**batch)
        kept = model(**batch, output_attentions=True)
        found = model(**batch, output_attentions=weighted_sum(calls))
        as_tuple = model(**batch, output_attentions=weighted_sum(), return_dict=False)
    expected = sum((layer + 1) * maps.sin() for layer, maps in enumerate(kept.attentions))
    assert calls == [0, 1]
    assert torch.equal(found.attentions, expected)
    assert torch.equal(as_tuple[-1], expected)
    assert torch.equal(found.logits, kept.logits)
    assert "attentions" not in plain


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_what_was_read_has_gradients(tiny, checkpointing):
    if tiny.engine == "te" and checkpointing:
        pytest.skip("the te engine recomputes in TE's own way")
    gradients = []
    for reads in (True, False):
        model, batch = tiny.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(), tiny.batch()
        if checkpointing is not None and reads:
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )  # 5.2x, 5.17
            enable({"use_reentrant": checkpointing})
        if reads:
            found = model(**batch, output_attentions=weighted_sum()).attentions
        else:
            maps = model(**batch, output_attentions=True).attentions
            found = sum((layer + 1) * one.sin() for layer, one in enumerate(maps))
        found.square().sum().backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        gradients.append(torch.cat([gradient.flatten().double() for gradient in found]))
    assert gradients[0].norm() > 0
    assert tiny.agree(*gradients)


@pytest.mark.parametrize("piece", [1, 500, 2000])
def test_maps_made_in_pieces_are_the_same(tiny, monkeypatch, piece):
    model, batch = tiny.model(), tiny.batch()
    with torch.no_grad():
        whole = model(**batch, output_attentions=True).attentions
        monkeypatch.setattr(layers_torch, "PIECE", piece)
        for maps, expected in zip(model(**batch, output_attentions=True).attentions, whole, strict=True):
            assert tiny.agree(maps.double(), expected.double())
