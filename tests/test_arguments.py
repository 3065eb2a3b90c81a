"""Arguments that callers of the originals pass out of habit, taken where they mean nothing; no typo is swallowed."""

import inspect

import pytest
import torch
from transformers import BertModel, EsmModel

from biote.runtime.pretrained import UNUSED


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_arguments_without_a_meaning(tiny, auto):
    model, ids = tiny.model(auto), tiny.batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids)[0]
        for nothing in (None, False):
            assert torch.equal(model(ids, **dict.fromkeys(UNUSED, nothing))[0], expected)


SOMETHING = {
    "use_cache": True,
    "head_mask": torch.ones(2, 4),
    "cache_position": torch.arange(3),
    "past_key_values": [],
}


def test_arguments_with_a_meaning_are_refused(tiny):
    model, ids = tiny.model(), tiny.batch()["input_ids"]
    for name in UNUSED:
        with pytest.raises(ValueError, match=rf"^\w+ForMaskedLM has no use for {name}: leave it out, or None$"):
            model(ids, **{name: SOMETHING.get(name, 1)})


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForTokenClassification"])
def test_a_typo_is_named(tiny, auto):
    model, ids = tiny.model(auto), tiny.batch()["input_ids"]
    for typo in ("use_cashe", "headmask", "atention_mask", "cu_seqlens_q", "pad_between_seqs"):
        with pytest.raises(TypeError, match=rf"forward\(\) got an unexpected keyword argument '{typo}'"):
            model(ids, **{typo: None})


def test_nothing_that_the_originals_name_is_unknown(tiny):
    ours = {*inspect.signature(tiny.port.classes["AutoModelForMaskedLM"].forward).parameters, *UNUSED}
    for original in (EsmModel, BertModel):
        theirs = inspect.signature(original.forward).parameters
        assert {name for name, one in theirs.items() if one.kind != one.VAR_KEYWORD} <= ours
