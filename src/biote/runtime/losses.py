"""Losses of the task heads, taken in float32 at least.

Shapes: B batch, S padded length, T packed tokens, V vocabulary or labels, C labels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .packing import Packing


def token_loss(logits: Tensor, labels: Tensor | None, packing: Packing) -> Tensor | None:
    """Mean cross-entropy of logits [T, V] over real tokens whose label (int64 [B, S]) is not -100; None without."""
    if labels is None:
        return None
    return F.cross_entropy(_wide(logits), packing.pack(labels.to(logits.device)))


def sequence_loss(logits: Tensor, labels: Tensor | None, config: PreTrainedConfig) -> Tensor | None:
    """Loss of logits [B, C] by `config.problem_type`, or by num_labels and the labels' dtype; None without labels.

    labels: int64 [B] (classes), float [B, C] (several labels at once) or float [B] / [B, C] (regression).
    """
    if labels is None:
        return None
    logits, labels = _wide(logits), labels.to(logits.device)
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    elif problem is None:
        problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    labels = labels.to(logits.dtype).view_as(logits)
    if problem == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
