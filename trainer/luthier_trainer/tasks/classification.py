"""Shared code of the tasks that classify rows: labels, loss and metrics of rows that have one of several labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier_api.classification import PROBLEMS
from luthier_api.classification import Classification as ClassificationSettings
from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import labels as classes
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Collator, Loss, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, measured_by
from luthier_trainer.tasks.headed import HeadedTask

if TYPE_CHECKING:
    import numpy
    import torch
    from datasets import DatasetDict
    from transformers import EvalPrediction

LABEL = "spec.dataset.columns.label"
BALANCED, WEIGHTS = "spec.classification.balanced", "spec.classification.classWeights"
UNEVEN = 10  # times as many rows of the commonest label as of the rarest, from which on weights are recommended
SHOWN = 5  # labels in a notice


class Classification(LabelledBatches, HeadedTask):
    """A base class of tasks that predict a label for a row."""

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (*self.inputs(spec), spec.dataset.columns.label)

    def problem_type(self, spec: FineTuneJobSpec) -> str | None:
        return PROBLEMS["single"].problem_type

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str] | None:
        data = spec.dataset
        return classes.names_of(rows, data.columns.label, LABEL, data.merge_labels, taken=self.inputs(spec))

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray | None:
        data = spec.dataset
        return classes.ids_of(rows, data.columns.label, LABEL, labels or [], data.merge_labels)

    def outputs(self, labels: list[str] | None) -> list[str]:
        return labels or []

    def class_weights(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> list[float] | None:
        ids = self.label_ids(rows, spec, labels)
        return None if ids is None else weights_of(ids, labels or [], spec.classification)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        super().check_encoded(data, model, labels)
        notice_unmeasured_labels(data, labels or [])

    @abstractmethod
    def collator(self, context: TrainingContext) -> Collator:
        """Return the collator of the task."""

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from transformers import Trainer

        loss = self.loss(context.spec, context.class_weights)
        options = {"compute_loss_func": loss, **measured_by(LabelMetrics())}
        return TrainerSetup(Trainer, self.collator(context), options)

    def loss(self, spec: FineTuneJobSpec, weights: Sequence[float] | None = None) -> Loss:
        """Return the loss for training. `weights`: how much a row of each class counts; None: all alike.

        No classifier of transformers 5.23 divides its loss by the rows of the step, although most of them accept the
        keyword that asks for it.
        """
        from luthier_trainer.models.heads import row_loss
        from luthier_trainer.tasks import class_loss, smoothing

        epsilon = spec.training.label_smoothing
        if weights:
            return class_loss.weighted(weights, epsilon or 0.0)
        return smoothing.row_loss(epsilon) if epsilon else row_loss


def weights_of(ids: numpy.ndarray, labels: list[str], asked: ClassificationSettings) -> list[float] | None:
    """Return how much a row of each class counts in the loss; None if all count alike. It is said, with the rows.

    `ids`: the class of each training row, int64 [rows]. Raises Failure if `classWeights` names a class that no row has.
    """
    import numpy

    counts = numpy.bincount(ids, minlength=len(labels))
    if asked.class_weights is None and not asked.balanced:
        there = counts[counts > 0]
        if there.max() >= UNEVEN * there.min():
            most, least = (
                labels[int(counts.argmax())],
                labels[int(numpy.where(counts > 0, counts, counts.max() + 1).argmin())],
            )
            notice(
                f"{LABEL}: {there.max()} training rows have the label {most} and {there.min()} have {least}. Set"
                f" {BALANCED}: true to let each label count alike in the loss"
            )
        return None
    if unknown := sorted(asked.class_weights or {}, key=str):
        unknown = [name for name in unknown if name not in labels]
        if unknown:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{WEIGHTS}: no training row has the label {', '.join(unknown[:SHOWN])}; the labels are:"
                f" {', '.join(labels[:SHOWN])}{', ...' * (len(labels) > SHOWN)}",
            )
    if asked.balanced:
        weights = [float(len(ids) / (len(labels) * count)) if count else 1.0 for count in counts.tolist()]
    else:
        weights = [(asked.class_weights or {}).get(name, 1.0) for name in labels]
    told = [f"{name} {weight:.4g} ({count} rows)" for name, weight, count in zip(labels, weights, counts, strict=True)]
    notice(
        f"{BALANCED if asked.balanced else WEIGHTS}: a row counts in the loss by its label:"
        f" {', '.join(told[:SHOWN])}{', ...' * (len(told) > SHOWN)}. evalLoss counts each row alike"
    )
    return weights


def notice_unmeasured_labels(data: DatasetDict, labels: list[str]) -> None:
    """Give notice of labels of the training that no held-out row has: f1Macro counts each of them as 0."""
    if "eval" not in data:
        return
    measured = set(data["eval"].unique("labels"))
    tell_absent([name for label, name in enumerate(labels) if label not in measured], labels)


def tell_absent(absent: list[str], labels: list[str]) -> None:
    """Give notice of the labels that no held-out row has."""
    if absent:
        shown = ", ".join(absent[:SHOWN]) + ", ..." * (len(absent) > SHOWN)
        notice(
            f"{LABEL}: {len(absent)} of {len(labels)} labels are in no held-out row ({shown}). f1Macro counts each as"
            " 0, and the other metrics say nothing about them. Hold out more rows, or rows of each label"
        )


class LabelMetrics:
    """Computes evalLoss, accuracy, f1Macro and majorityShare, the accuracy of always predicting the most common label.

    f1Macro is the mean over all labels of the training. A label without held-out rows counts as 0, so that the metric
    does not rise because a rare label is missing from the held-out rows.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.loss, self.answers, self.truth, self.labels = 0.0, list[int](), list[int](), 0

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return loss (nats) and predicted label of each row, double [rows, 2].

        `logits`: [rows, classes]. `labels`: int64 [rows].
        """
        import torch
        from torch.nn.functional import cross_entropy

        self.labels = logits.shape[1]
        losses = cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([losses.double(), logits.argmax(dim=1).double()], dim=1)

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.loss += gathered.predictions[:, 0].sum().item()
        self.answers += gathered.predictions[:, 1].long().tolist()
        self.truth += gathered.label_ids.tolist()
        if not compute_result:
            return {}
        metrics = self._result()
        self._begin()
        return metrics

    def _result(self) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score  # takes 0.4 s, which every start of any task would pay

        rows, classes = len(self.truth), range(self.labels)
        f1 = f1_score(self.truth, self.answers, labels=classes, average="macro", zero_division=0)
        return {
            "loss": self.loss / rows,
            "accuracy": float(accuracy_score(self.truth, self.answers)),
            "f1Macro": float(f1),
            "majorityShare": max(self.truth.count(label) for label in set(self.truth)) / rows,
        }
