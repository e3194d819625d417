"""Losses of classifiers whose rows do not all count alike, or have not one class each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from luthier_trainer.tasks.base import Loss


def weighted(weights: Sequence[float], epsilon: float) -> Loss:
    """Return the cross-entropy (nats) in which a row of each class counts by its weight.

    It is divided by the number of rows, and not by the sum of their weights, so that it does not depend on how rows are
    divided into micro-batches. `epsilon`: of label smoothing, which weights as torch does.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        counts = torch.tensor(weights, device=logits.device)
        total = cross_entropy(logits, labels, counts, reduction="sum", label_smoothing=epsilon)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def several_labels(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the mean binary cross-entropy (nats) over rows and classes, a scalar.

    `outputs.logits`, `labels`: [rows, classes]. `num_items_in_batch`: rows × classes of the whole optimiser step.
    """
    total = binary_cross_entropy_with_logits(outputs["logits"].float(), labels.float(), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def squared_error(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the mean squared error, a scalar. `outputs.logits`: [rows, 1], `labels`: [rows]."""
    total = mse_loss(outputs["logits"].float().squeeze(1), labels.float(), reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
