"""Shared code of the classification tasks, whose rows each have one of several labels: labels, loss and metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import labels as classes
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Collator, Loss, Model, Processor, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, measured_by
from luthier_trainer.tasks.headed import HeadedTask

if TYPE_CHECKING:
    import numpy
    import torch
    from datasets import DatasetDict
    from transformers import EvalPrediction

LABEL = "spec.dataset.columns.label"
SHOWN = 5  # labels in a notice


class Classification(LabelledBatches, HeadedTask):
    """A base class of tasks that predict one label for a row."""

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (*self.inputs(spec), spec.dataset.columns.label)

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str]:
        data = spec.dataset
        return classes.names_of(rows, data.columns.label, LABEL, data.merge_labels, taken=self.inputs(spec))

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray:
        data = spec.dataset
        return classes.ids_of(rows, data.columns.label, LABEL, labels or [], data.merge_labels)

    def outputs(self, labels: list[str] | None) -> list[str]:
        return labels or []

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        super().check_encoded(data, model, labels)
        notice_unmeasured_labels(data, labels or [])

    @abstractmethod
    def collator(self, processor: Processor) -> Collator:
        """Return the collator of the task."""

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from transformers import Trainer

        options = {"compute_loss_func": self.loss(context.spec), **measured_by(LabelMetrics())}
        return TrainerSetup(Trainer, self.collator(context.processor), options)

    def loss(self, spec: FineTuneJobSpec) -> Loss:
        """Return the loss for training.

        No classifier of transformers 5.23 divides its loss by the rows of the step, although most of them accept the
        keyword that asks for it.
        """
        from luthier_trainer.models.heads import row_loss
        from luthier_trainer.tasks import smoothing

        epsilon = spec.training.label_smoothing
        return smoothing.row_loss(epsilon) if epsilon else row_loss


def notice_unmeasured_labels(data: DatasetDict, labels: list[str]) -> None:
    """Give notice of labels of the training that no held-out row has: f1Macro counts each of them as 0."""
    if "eval" not in data:
        return
    measured = set(data["eval"].unique("labels"))
    absent = [name for label, name in enumerate(labels) if label not in measured]
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
