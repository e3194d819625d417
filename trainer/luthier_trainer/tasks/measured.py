"""A Trainer whose evaluations turn each held-out row into a few numbers, in the process that evaluates it.

Only these numbers are gathered from all processes: no logits, and no texts. Metrics follow from the numbers of all
held-out rows, whatever the micro-batches and the number of processes are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, Trainer

from luthier_trainer.tasks.base import Batch, Drawn, Loss
from luthier_trainer.tasks.batches import IGNORED


class Score(Protocol):
    """What an evaluation measures."""

    beside: Sequence[str]
    """Keys of a batch that only `rows` reads. The model does not get them."""

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        """Return the numbers of the rows of a batch, double [rows, numbers]. `outputs`: of the model for the batch."""
        ...

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        """Return the metrics, and the loss as `loss`, from the numbers of all held-out rows, [rows, numbers]."""
        ...


class MeasuringTrainer(Trainer):
    """Trains with the loss of the task, and measures with its score."""

    drawn: Drawn
    """Of the mixin that comes before this class (`training.resilience`)."""

    def __init__(self, *, score: Score, loss: Loss | None, **kwargs: Any) -> None:
        """`loss`: None if the model computes it (`token_loss`), whose outputs have sums of rows in place of logits."""
        super().__init__(compute_metrics=Gathered(score.metrics), compute_loss_func=loss, **kwargs)
        self.score = score
        self.mask: Any
        """That of the present batch, int64 [rows, tokens]: a loss of transformers' Trainer gets outputs and labels.
        None if batches have none.
        """

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        self.mask = inputs.get("attention_mask")
        # transformers takes `labels` out of the batch that it is given, which others still count.
        return super().compute_loss(model, self._for_model(inputs), *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        """Return a mean loss, the numbers of the rows, and a placeholder for labels.

        transformers computes metrics only if there are labels.
        """
        inputs = self.drawn(self._prepare_inputs(inputs), None)
        given = self._for_model(inputs)
        if self.compute_loss_func is not None:
            given = {key: value for key, value in given.items() if key != "labels"}
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = self.score.rows(model(**given), inputs, self)
        return rows[:, 0].mean(), rows, torch.zeros(len(rows), device=rows.device)

    def _for_model(self, inputs: Batch) -> Batch:
        return {key: value for key, value in inputs.items() if key not in self.score.beside}


class Gathered:
    """Collects the numbers of held-out rows, as `compute_metrics` of transformers' Trainer."""

    def __init__(self, metrics: Callable[[torch.Tensor], dict[str, float]]) -> None:
        self.metrics = metrics
        self.rows: list[torch.Tensor] = []

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.rows.append(gathered.predictions.cpu())
        if not compute_result:
            return {}
        rows, self.rows = torch.cat(self.rows), []
        return self.metrics(rows)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return summed loss (nats) and number of the labels of each row, double [rows, 2].

    `logits`: [rows, tokens, classes]. `labels`: int64 [rows, tokens], in which `IGNORED` does not count.
    """
    # Classes stay the last dimension: torch would copy all logits to compute along another one.
    flat = logits.float().flatten(0, 1)
    losses = cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)
    return torch.stack([losses.double().sum(dim=1), labels.ne(IGNORED).double().sum(dim=1)], dim=1)


def label_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the mean cross-entropy of the labels (nats), a scalar.

    `outputs.logits`: [rows, ..., classes]. `labels`: int64 [rows, ...], in which `IGNORED` does not count.
    `num_items_in_batch`: the labels of the whole optimiser step; without it, the mean is over those of this batch.
    """
    flat, wanted = outputs["logits"].float().flatten(0, -2), labels.flatten()
    total = cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    items = wanted.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / items
