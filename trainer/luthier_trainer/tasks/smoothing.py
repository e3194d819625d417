"""Label smoothing of classifiers by transformers' own `LabelSmoother`, divided by the items of the step.

transformers' argument `label_smoothing_factor` is not used, because the Trainer would ignore it beside a loss of the
task. That of language models is a part of `token_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_pt_utils import LabelSmoother

from luthier_trainer.tasks.base import Loss


def row_loss(epsilon: float) -> Loss:
    """Return the loss of a classifier. Its outputs have logits [rows, classes], its labels the shape [rows]."""
    smoother = LabelSmoother(epsilon)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        # In fp32, as transformers computes its losses. A sum over classes in bf16 would be far off.
        logits = {"logits": outputs["logits"].float()}
        smoothed: torch.Tensor = smoother(logits, labels, num_items_in_batch=num_items_in_batch)
        return smoothed

    return loss
