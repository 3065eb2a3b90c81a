"""Labels and losses of the task heads; losses are taken in float32 at least.

Labels are checked before the encoder runs, where the host waits for nothing that the GPU has yet to compute: out of
range, they would end in a device-side assert, after which a process can use no GPU any more.
Shapes: B sequences, S padded length, T packed tokens, V vocabulary or labels, C labels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .packing import Packing, require

IGNORED = -100


def token_labels(labels: Tensor, classes: int, packing: Packing) -> Tensor:
    """Labels int [B, S] -> int64 [T]; ValueError for another shape or type, or a token's that is no class or -100."""
    if tuple(labels.shape) != packing.shape:
        raise ValueError(f"labels must have the shape {list(packing.shape)} of the input, got {list(labels.shape)}")
    return _classes(packing.pack(labels.to(packing.positions.device)), classes)


def sequence_labels(labels: Tensor, config: PreTrainedConfig, packing: Packing) -> Tensor:
    """Labels of sequences as `sequence_loss` takes them.

    labels: int [B] (classes), float [B, C] (several labels at once) or float [B] / [B, C] (regression).
    ValueError for another shape or type, or a class that is neither below num_labels nor -100.
    """
    labels = labels.to(packing.positions.device)
    rows = packing.cu_seqlens.shape[0] - 1
    width: int = config.num_labels  # type: ignore[assignment]
    problem = _problem(labels, config)
    if problem == "single_label_classification":
        if labels.shape not in ((rows,), (rows, 1)):
            hint = "; several labels at once are float" if labels.shape == (rows, width) else ""
            raise ValueError(f"labels must be [{rows}], a class for each sequence, got {list(labels.shape)}{hint}")
        return _classes(labels.flatten(), width)
    one_each = problem == "regression" and width == 1 and labels.shape == (rows,)
    if labels.shape != (rows, width) and not one_each:
        raise ValueError(f"labels of {problem} must be [{rows}, {width}], got {list(labels.shape)}")
    return labels.view(rows, width)


def token_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean cross-entropy of logits [T, V] over tokens whose label (int64 [T]) is not -100; None without labels."""
    return None if labels is None else F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED)


def sequence_loss(logits: Tensor, labels: Tensor | None, config: PreTrainedConfig) -> Tensor | None:
    """Loss of logits [B, C] by `config.problem_type`, or by num_labels and the labels' dtype; None without labels.

    labels: int64 [B] (classes) or [B, C].
    """
    if labels is None:
        return None
    logits, problem = _wide(logits), _problem(labels, config)
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)
    if problem == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _problem(labels: Tensor, config: PreTrainedConfig) -> str:
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _classes(labels: Tensor, classes: int) -> Tensor:
    """int64, each -100 or in range; the host looks once."""
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(f"labels must be integers, the number of a class each, got {labels.dtype}")
    labels = labels.long()
    low, high = labels.masked_fill(labels == IGNORED, 0).aminmax()
    if torch.compiler.is_compiling():
        require((low >= 0) & (high < classes), f"a label is neither -100 nor within 0 to {classes - 1}")
        return labels
    lowest, highest = torch.stack((low, high)).tolist()
    if lowest < 0 or highest >= classes:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"label {bad} is outside the classes, 0 to {classes - 1} (-100: does not count)")
    return labels


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
