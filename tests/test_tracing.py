"""torch.compile(fullgraph=True) and torch.export of packed input give what eager gives, at every length."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.export import Dim

from biote.port import port_named

LENGTHS = ([4, 7, 3], [9, 1, 1, 6], [12])
LONGEST = 64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(lengths: list[int], device: str, **others: Any) -> dict[str, Any]:
    ids = torch.randint(5, 24, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {"input_ids": ids.to(device), "cu_seq_lens_q": bounds.to(device), "max_length_q": max(lengths)}
    return {**given, **others}


@pytest.fixture
def on_torch(tiny):
    if tiny.engine != "torch":
        pytest.skip("the te engine cannot be traced")
    return tiny


def test_compiled_as_one_graph(on_torch):
    """With the first batch's lengths and others: by one recompilation of dynamic shapes."""
    model = on_torch.model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in LENGTHS:
        batch = packed(lengths, on_torch.device)
        with torch.no_grad():
            assert on_torch.agree(compiled(**batch).logits.double(), model(**batch).logits.double()), lengths


@pytest.mark.gpu
def test_compiled_by_inductor(on_torch):
    """On the GPU, by its kernels and the attention that takes packed input."""
    on_torch = replace(on_torch, tolerance=max(on_torch.tolerance, 1e-6))  # tables rounded elsewhere
    model = on_torch.model()
    compiled = torch.compile(model, fullgraph=True)
    for lengths in LENGTHS[:2]:
        batch = packed(lengths, on_torch.device)
        with torch.no_grad():
            assert on_torch.agree(compiled(**batch).logits.double(), model(**batch).logits.double()), lengths


def test_compiled_training(on_torch):
    """Loss, hidden states and gradients."""
    model = on_torch.model().train()
    batch = packed([4, 7, 3], on_torch.device, max_length_k=7, output_hidden_states=True)
    batch |= {"cu_seq_lens_k": batch["cu_seq_lens_q"].clone(), "labels": batch["input_ids"]}
    found = []
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        output = run(**batch)
        output.loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([output.loss[None].detach(), *gradients, output.hidden_states[-1].detach().flatten()]))
    assert on_torch.agree(*(one.double() for one in found))


def test_rows_of_one_length_can_be_compiled(on_torch):
    model = on_torch.model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows, width in ((2, 5), (3, 7)):
        ids = torch.arange(5, 5 + rows * width, device=on_torch.device).view(rows, width)
        with torch.no_grad():
            assert on_torch.agree(compiled(ids).logits.double(), model(ids).logits.double())


@pytest.mark.parametrize("strict", [False, True])
def test_exported(on_torch, strict):
    """Tokens and sequences may be as many as they like; the longest length is what the program was made for."""
    model = on_torch.model()
    shapes = {"input_ids": {1: Dim.DYNAMIC}, "cu_seq_lens_q": {0: Dim.DYNAMIC}, "max_length_q": None}
    example = packed([4, 7, 3], on_torch.device, max_length_q=LONGEST)
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=strict).module()
        for lengths in LENGTHS:
            batch = packed(lengths, on_torch.device, max_length_q=LONGEST)
            assert on_torch.agree(program(**batch).logits.double(), model(**batch).logits.double()), lengths
        if on_torch.device == "cpu":  # on a GPU a failed assertion is the end of the process's use of it
            batch = packed([5, 2], "cpu", max_length_q=LONGEST)
            for name, wrong, message in BAD:
                with pytest.raises(RuntimeError, match=message):
                    program(**batch | {name: wrong})


BAD = [
    ("input_ids", torch.full((1, 7), 40), "a token id is outside the vocabulary, 0 to 39"),
    ("input_ids", torch.full((1, 7), -1), "a token id is outside the vocabulary, 0 to 39"),
    ("cu_seq_lens_q", torch.tensor([0, 5, 8]).int(), "cu_seq_lens_q must rise from 0 to the number of tokens"),
    ("cu_seq_lens_q", torch.tensor([1, 5, 7]).int(), "cu_seq_lens_q must rise from 0 to the number of tokens"),
    ("cu_seq_lens_q", torch.tensor([0, 5, 5, 7]).int(), "cu_seq_lens_q must rise from 0 to the number of tokens"),
]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length_q": 5}, "max_length_q or max_length_k is shorter than the longest packed sequence"),
        ({"cu_seq_lens_k": torch.tensor([0, 5, 14])}, "cu_seq_lens_q and cu_seq_lens_k differ"),
        ({"cu_seq_lens_k": torch.tensor([0, 5, 11, 14])}, "cu_seq_lens_q and cu_seq_lens_k differ"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 11 + 2**32, 14])}, "cu_seq_lens_q must rise from 0"),
        ({"position_ids": torch.tensor([[0, 1, 1, 2, *range(10)]])}, "position_ids fall within a sequence"),
        ({"attention_mask": torch.tensor([[1] * 13 + [0]])}, "a traced model takes packed input without padding"),
        ({"labels": torch.tensor([[0] * 13 + [40]])}, "a label is neither -100 nor within 0 to 39"),
    ],
)
def test_compiled_checks(wrong, message):
    """What eager refuses by a look at values, a graph asserts."""
    model, batch = small("esm2"), packed([4, 7, 3], "cpu", **wrong)
    with pytest.raises(RuntimeError, match=message):
        torch.compile(model, fullgraph=True, backend="eager")(**batch)


def test_positions_past_the_table_are_asserted():
    model = small("geneformer", max_position_embeddings=8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for fitting in ([3, 8], [2, 1, 5]):
        batch = packed(fitting, "cpu")
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
    with pytest.raises(RuntimeError, match="a position is outside the 8 that this model has"):
        compiled(**packed([3, 9], "cpu"))


def small(name: str, **fields: Any) -> Any:
    port = port_named(name)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = port.config_class(**shape, vocab_size=40, engine="torch", **fields)
    return port.classes["AutoModelForMaskedLM"](config).eval()


UNTRACEABLE = {
    "mask": ({"attention_mask": torch.ones(2, 6)}, r"cannot trace an attention_mask.* pass packed input"),
    "attentions": ({"output_attentions": True}, r"cannot trace output_attentions"),
    "no_length": ({"cu_seq_lens_q": torch.tensor([0, 6])}, r"take packed input with max_length_q"),
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_what_cannot_be_traced_says_what_to_pass(case):
    """As one graph; with breaks between graphs it runs, and gives what eager gives."""
    arguments, message = UNTRACEABLE[case]
    model, ids = small("esm2"), torch.arange(5, 17).view(2, 6)
    ids = ids[:1] if "cu_seq_lens_q" in arguments else ids
    with torch.no_grad():
        with pytest.raises(Exception, match=message):
            torch.compile(model, fullgraph=True, backend="eager")(ids, **arguments)
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.export.export(model, (ids,), arguments)
        torch._dynamo.reset()
        found, expected = torch.compile(model, backend="eager")(ids, **arguments), model(ids, **arguments)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.attentions, expected.attentions)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_jit_would_keep_lengths():
    model = small("esm2")
    with pytest.raises(RuntimeError, match=r"torch.jit.trace would keep the example's lengths .* use torch.export"):
        torch.jit.trace(lambda ids: model(ids).logits, (torch.arange(5, 17).view(2, 6),))


@pytest.mark.gpu
def test_the_te_engine_says_why_it_cannot_be_traced(on_te):
    with pytest.raises(
        Exception, match=r'cannot trace the kernels of engine="te": load the model with engine="torch"'
    ):
        torch.compile(on_te.model(), fullgraph=True, backend="eager")(**packed([4, 7], "cuda"))
