"""What a text-classification predicts of a text (`classification.problem`): one object for each kind of answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from luthier_api.classification import Problem
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import labels as classes
from luthier_trainer.data.load import Rows
from luthier_trainer.tasks.base import Loss, Metrics
from luthier_trainer.tasks.classification import LABEL

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import EvalPrediction

CHOSEN = 0.5  # the probability from which on a label is predicted


class Answers(Protocol):
    """A kind of answer that is not one class of several, which `tasks.classification` has."""

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str] | None:
        """Return the names of the classes of the training rows; None for numbers. Raises Failure."""
        ...

    def targets(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray:
        """Return what the model should answer, fp32 [rows] or [rows, classes].

        Raises Failure if a row has no such answer, or a class that is not in `labels`.
        """
        ...

    def loss(self) -> Loss:
        """Return the loss for training."""
        ...

    def metrics(self) -> Metrics:
        """Return what computes the metrics of an evaluation."""
        ...

    def shape(self, rows: int, outputs: int) -> tuple[int, ...]:
        """Return the shape of the answers to `rows` texts. `outputs`: numbers of the head."""
        ...


class SeveralLabels:
    """Each row has any number of labels."""

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str]:
        return classes.names_of_lists(rows, spec.dataset.columns.label, LABEL)

    def targets(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray:
        return classes.several_of(rows, spec.dataset.columns.label, LABEL, labels or [])

    def loss(self) -> Loss:
        from luthier_trainer.tasks.class_loss import several_labels

        return several_labels

    def metrics(self) -> Metrics:
        return SeveralLabelMetrics()

    def shape(self, rows: int, outputs: int) -> tuple[int, ...]:
        return rows, outputs


class Numbers:
    """Each row has a number."""

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> None:
        self.targets(rows, spec, None)

    def targets(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray:
        return classes.numbers_of(rows, spec.dataset.columns.label, LABEL)

    def loss(self) -> Loss:
        from luthier_trainer.tasks.class_loss import squared_error

        return squared_error

    def metrics(self) -> Metrics:
        return NumberMetrics()

    def shape(self, rows: int, outputs: int) -> tuple[int, ...]:
        return (rows,)


ANSWERS: Mapping[Problem, Answers] = {"multi-label": SeveralLabels(), "regression": Numbers()}


class RowsOfAnswers(ABC):
    """Collects what was answered and what should have been, over all held-out rows."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.truth: list[Any] = []

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.answers.append(gathered.predictions.cpu())
        self.truth.append(gathered.label_ids.cpu())
        if not compute_result:
            return {}
        import torch

        answers, truth = torch.cat(self.answers).double().numpy(), torch.cat(self.truth).double().numpy()
        self.answers, self.truth = [], []
        return self.figures(answers, truth)

    @abstractmethod
    def figures(self, answers: numpy.ndarray, truth: numpy.ndarray) -> dict[str, float]:
        """Return the metrics, and the loss as `loss`."""


class SeveralLabelMetrics(RowsOfAnswers):
    """Computes evalLoss, accuracy (rows with exactly their labels), f1Micro and f1Macro.

    f1Macro is the mean over all labels of the training. A label without held-out rows counts as 0.
    """

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the logits of each row, fp32 [rows, classes]."""
        return logits.float()

    def figures(self, answers: numpy.ndarray, truth: numpy.ndarray) -> dict[str, float]:
        """`answers`: logits, [rows, classes]. `truth`: 0 or 1, [rows, classes]."""
        import numpy
        from sklearn.metrics import accuracy_score, f1_score

        chosen, wanted = 1 / (1 + numpy.exp(-answers)) > CHOSEN, truth > CHOSEN
        # -log of the probability of the truth, without an overflow.
        loss = numpy.logaddexp(0, numpy.where(wanted, -answers, answers)).mean()
        return {
            "loss": float(loss),
            "accuracy": float(accuracy_score(wanted, chosen)),
            **{
                f"f1{kind.title()}": float(f1_score(wanted, chosen, average=kind, zero_division=0))
                for kind in ("micro", "macro")
            },
        }


class NumberMetrics(RowsOfAnswers):
    """Computes evalLoss and mse, the mean squared error, mae, the mean absolute error, and the Pearson correlation.

    Answers that are all the same have no correlation, and it is left out.
    """

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the answer of each row, fp32 [rows]. `logits`: [rows, 1]."""
        return logits.float().squeeze(1)

    def figures(self, answers: numpy.ndarray, truth: numpy.ndarray) -> dict[str, float]:
        """`answers`, `truth`: [rows]."""
        import numpy

        errors = answers - truth
        squared = float((errors**2).mean())
        found = {"loss": squared, "mse": squared, "mae": float(numpy.abs(errors).mean())}
        if len(truth) > 1 and answers.std() > 0 and truth.std() > 0:
            found["pearson"] = float(numpy.corrcoef(answers, truth)[0, 1])
        return found
