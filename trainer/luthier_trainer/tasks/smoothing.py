"""Label smoothing by transformers' own `LabelSmoother`, divided by the items of the step as all losses are.

transformers' argument `label_smoothing_factor` is not used: the Trainer would ignore it beside a loss of the task, and
would leave out the terms that a model adds to its own loss, for example for the load balance of experts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_pt_utils import LabelSmoother

from luthier_trainer.tasks.base import Loss


def row_loss(epsilon: float) -> Loss:
    """Return the loss of a classifier. Its outputs have logits [rows, classes], its labels the shape [rows]."""
    return _loss(epsilon, shift=False)


def next_token_loss(epsilon: float) -> Loss:
    """Return the loss of a language model. Its outputs have logits [rows, length, vocabulary]; labels: [rows, length].

    Labels of -100 count neither in the sum nor among the items.
    """
    return _loss(epsilon, shift=True)


def loss_function(epsilon: float) -> Any:
    """Return the same as `next_token_loss`, in the form of a model's `loss_function`."""
    loss = next_token_loss(epsilon)

    def smoothed(
        logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        return loss({"logits": logits}, labels, num_items_in_batch=num_items_in_batch)

    return smoothed


def _loss(epsilon: float, shift: bool) -> Loss:
    smoother = LabelSmoother(epsilon)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        # In fp32, as transformers computes its losses. A sum over a vocabulary in bf16 would be far off.
        logits = {"logits": outputs["logits"].float()}
        smoothed: torch.Tensor = smoother(logits, labels, shift_labels=shift, num_items_in_batch=num_items_in_batch)
        return smoothed

    return loss
