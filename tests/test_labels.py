"""Labels that a loss cannot read are refused before anything runs: on a GPU they would end the process's use of it."""

import re
import warnings

import pytest
import torch
from torch import Tensor

from biote.runtime.heads import MaskedLMModel, SequenceClassificationModel
from biote.runtime.losses import sequence_labels, token_labels
from biote.runtime.packing import plan_packing
from biote_esm2 import Esm2TEConfig

MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
PACKING = plan_packing(MASK, MASK)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_labels_of_tokens(dtype):
    """Of real tokens only; -100 does not count; the ends of the range are in it."""
    labels = torch.tensor([[0, 3, -100], [99, 2, -100]], dtype=dtype)
    found = token_labels(labels, 4, PACKING)
    assert (found.dtype, found.tolist()) == (torch.int64, [0, 3, -100, 2, -100])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 4, 1], [0, 0, 0]], "label 4 is outside the classes, 0 to 3"),
        ([[0, 1, 1], [0, -1, 0]], "label -1 is outside the classes, 0 to 3"),
        ([[0, 1, 1], [0, -101, 0]], "label -101 is outside"),
        ([[0, 1, 1], [0, -99, 2**40]], "label -99 is outside"),
        ([[0, 1, 2**32], [0, 0, 0]], "label 4294967296 is outside"),
        ([[0.0, 1, 1], [0, 0, 0]], "labels must be integers, the number of a class each, got torch.float32"),
        ([[True, True, True], [True, True, True]], "labels must be integers, .*got torch.bool"),
        ([[0, 1], [0, 0]], r"labels must have the shape \[2, 3\] of the input, got \[2, 2\]"),
        ([0, 1], r"labels must have the shape \[2, 3\] of the input, got \[2\]"),
        ([[[0], [1], [1]], [[0], [1], [1]]], r"labels must have the shape \[2, 3\] of the input, got \[2, 3, 1\]"),
    ],
)
def test_labels_of_tokens_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        token_labels(torch.tensor(labels), 4, PACKING)


def read(labels: Tensor, num_labels: int, problem: str | None = None) -> Tensor:
    config = Esm2TEConfig(num_labels=num_labels, problem_type=problem, engine="torch")
    return sequence_labels(labels, config, PACKING)


SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem", "expected"),
    [
        ([0, 2], 3, None, [0, 2]),
        ([[0], [2]], 3, None, [0, 2]),
        ([-100, 1], 3, SINGLE, [-100, 1]),
        ([[0.0, 1, 0.5], [1, 1, 0]], 3, None, [[0, 1, 0.5], [1, 1, 0]]),
        ([[0, 1, 0], [1, 1, 0]], 3, SEVERAL, [[0, 1, 0], [1, 1, 0]]),
        ([0.5, -3], 1, None, [[0.5], [-3]]),
        ([[0.5], [-3]], 1, None, [[0.5], [-3]]),
        ([[0.5, 1], [-3, 2]], 2, "regression", [[0.5, 1], [-3, 2]]),
    ],
)
def test_labels_of_sequences(labels, num_labels, problem, expected):
    assert read(torch.tensor(labels), num_labels, problem).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem", "message"),
    [
        ([0, 3], 3, None, "label 3 is outside the classes, 0 to 2"),
        ([0, -1], 3, None, "label -1 is outside the classes, 0 to 2"),
        ([0, 2], 2, SINGLE, "label 2 is outside the classes, 0 to 1"),
        ([0.0, 1], 3, SINGLE, "labels must be integers"),
        ([0, 1, 2], 3, None, r"labels must be \[2\], a class for each sequence, got \[3\]"),
        ([[0, 1, 0], [1, 1, 0]], 3, None, r"for each sequence, got \[2, 3\]; several labels at once are float"),
        ([0.0, 1], 3, None, r"labels of multi_label_classification must be \[2, 3\], got \[2\]"),
        ([[0.0, 1], [1, 1], [0, 0]], 3, None, r"must be \[2, 3\], got \[3, 2\]"),  # as many numbers, in another order
        ([0.0, 1, 2, 3, 4, 5], 3, SEVERAL, r"must be \[2, 3\], got \[6\]"),
        ([0.5, 1], 2, "regression", r"labels of regression must be \[2, 2\], got \[2\]"),
        ([0.5], 1, None, r"labels of regression must be \[2, 1\], got \[1\]"),
        ([[0.5, 1]], 1, None, r"labels of regression must be \[2, 1\], got \[1, 2\]"),
    ],
)
def test_labels_of_sequences_are_refused(labels, num_labels, problem, message):
    with pytest.raises(ValueError, match=message):
        read(torch.tensor(labels), num_labels, problem)


@pytest.mark.parametrize("auto", ["MaskedLM", "TokenClassification", "SequenceClassification"])
def test_a_label_out_of_range_runs_nothing(tiny, auto):
    """And the model goes on working, which after a device-side assert no model could."""
    model = tiny.model(f"AutoModelFor{auto}", num_labels=3)
    batch = {**tiny.batch()}
    classes = 40 if isinstance(model, MaskedLMModel) else 3
    labels = (batch["labels"] % 3).where(batch["labels"] != -100, -100)
    labels = labels[:, 0] if isinstance(model, SequenceClassificationModel) else labels
    runs: list[None] = []
    model.base_model.layers[0].register_forward_pre_hook(lambda *_: runs.append(None))
    for bad in (classes, -1):
        wrong = labels.clone().flatten()
        wrong[0] = bad
        with pytest.raises(ValueError, match=re.escape(f"label {bad} is outside the classes, 0 to {classes - 1}")):
            model(**{**batch, "labels": wrong.view_as(labels)})
    assert not runs
    loss = model(**{**batch, "labels": labels}).loss
    assert torch.isfinite(loss)


@pytest.mark.gpu
@pytest.mark.parametrize("auto", ["MaskedLM", "TokenClassification", "SequenceClassification"])
def test_labels_cost_one_look_of_the_host(on_te, auto):
    """And without labels none."""
    model = on_te.model(f"AutoModelFor{auto}", num_labels=3)
    batch = {**on_te.batch()}
    labels = batch.pop("labels") % 3
    labels = labels[:, 0] if auto == "SequenceClassification" else labels

    def looks(**others):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(**batch, **others)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in seen)

    looks(labels=labels)
    bare = looks()
    assert bare > 0, "the host looks at the token ids"
    assert looks(labels=labels) == bare + 1
