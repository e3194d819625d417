"""Shared code of the classification tasks, whose rows each have one of several labels: model, loss and metrics.

The head gets new weights if the model has no head, or a head for other labels. A head for the same labels is kept, with
its rows reordered to the label order of this job.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import labels as classes
from luthier_trainer.data.load import Rows
from luthier_trainer.models import inspect, weight_files
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Collator, LoadedModel, Model, Processor, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, measured_by
from luthier_trainer.tasks.pretrained import PretrainedTask
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    import numpy
    import torch
    from datasets import DatasetDict
    from transformers import EvalPrediction, PreTrainedModel

LABEL = "spec.dataset.columns.label"
SHOWN = 5  # labels in a notice


class Classification(LabelledBatches, PretrainedTask):
    """A base class of tasks that predict one label for a row."""

    @property
    @abstractmethod
    def auto_class(self) -> Any:
        """The class of transformers that loads the model."""

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (*self.inputs(spec), spec.dataset.columns.label)

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str]:
        data = spec.dataset
        return classes.names_of(rows, data.columns.label, LABEL, data.merge_labels, taken=self.inputs(spec))

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray:
        data = spec.dataset
        return classes.ids_of(rows, data.columns.label, LABEL, labels or [], data.merge_labels)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        super().check_model(model, spec, rows, labels)
        notice(f"{inspect.MODEL}: {what_becomes_of_the_head(model, self.task, labels or [])}")

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        super().check_encoded(data, model, labels)
        notice_unmeasured_labels(data, labels or [])

    @abstractmethod
    def collator(self, processor: Processor) -> Collator:
        """Return the collator of the task."""

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from transformers import Trainer

        from luthier_trainer.models.heads import row_loss
        from luthier_trainer.tasks import smoothing

        # No classifier of transformers 5.23 divides its loss by the rows of the step, although most of them accept the
        # keyword that asks for it.
        epsilon = context.spec.training.label_smoothing
        loss = smoothing.row_loss(epsilon) if epsilon else row_loss
        options = {"compute_loss_func": loss, **measured_by(LabelMetrics())}
        return TrainerSetup(Trainer, self.collator(context.processor), options)

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from luthier_trainer.models.heads import HEADS, fit_head, labels_in, whole_modules

        path, names = context.model_path, context.labels or []
        options: dict[str, Any] = {
            **context.weights,
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
        quantization = options.get("quantization_config")
        if quantization:
            quantization.llm_int8_skip_modules = list(HEADS)
        model, missing, mismatched = self._load(path, options)
        whole = whole_modules(model, missing | mismatched)
        quantized = set(whole) - set(HEADS)
        if quantization and quantized:
            # All new weights are trained, which 4-bit weights cannot be. Which modules have new weights (for example a
            # pooler) is known only after loading, so the model is loaded a second time without quantising them.
            quantization.llm_int8_skip_modules += sorted(quantized)
            model, missing, mismatched = self._load(path, options)
        fit_head(model, missing, labels_in(str(path)), names)
        return LoadedModel(model, whole)

    def _load(self, path: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, set[str], set[str]]:
        """Load the model; also return the names of weights that its folder lacks, or has in another shape.

        `ignore_mismatched_sizes` is meant only for the head, but transformers applies it to every weight. Raises
        Failure if a weight outside the head has a different shape.
        """
        from transformers.integrations import deepspeed

        from luthier_trainer.models.heads import head_weights, shown
        from luthier_trainer.models.zero3 import left_out, weights_of_other_shape

        left: set[str] = set()
        if deepspeed.is_deepspeed_zero3_enabled():
            left = weights_of_other_shape(path, self._shapes(path, options["num_labels"]))
        if left:
            options = options | {"key_mapping": left_out(left)}
        model, loaded = self.auto_class.from_pretrained(path, output_loading_info=True, **options)
        mismatched = left | {key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]}
        others = sorted(mismatched - head_weights(model).keys()) if mismatched else []
        if others:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.model: {path} has {shown(others)} in another shape than its config.json says. Copy"
                " the files that belong together",
            )
        return model, set(loaded["missing_keys"]) - left, mismatched

    def _shapes(self, path: Path, labels: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that the model in folder `path` has with this number of labels."""
        import torch
        from transformers import AutoConfig

        from luthier_trainer.models.heads import unsharded

        with unsharded(), torch.device("meta"):
            model = self.auto_class.from_config(AutoConfig.from_pretrained(path, num_labels=labels))
        return {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    def complete_result(self, folder: Path, model: Any, context: TrainingContext) -> None:
        """Save the base's configuration, with the classes and the padding token of the training, beside an adapter.

        The files of PEFT hold neither. Without them the base is loaded with two classes, LABEL_0 and LABEL_1, and a
        decoder cannot find the ends of the texts in a batch.
        """
        from transformers import AutoConfig

        if not (folder / ADAPTER_CONFIG).exists():
            return
        trained = model.get_base_model()
        # Read from the base's folder: the loaded model's configuration may hold settings of this run, for example its
        # quantisation.
        config = AutoConfig.from_pretrained(context.model_path)
        config.architectures = [type(trained).__name__]
        for name in ("id2label", "label2id", "problem_type", "pad_token_id"):
            setattr(config, name, getattr(trained.config, name, None))
        config.save_pretrained(folder)


def what_becomes_of_the_head(model: Model, task: str, labels: list[str]) -> str:
    """Return a text, for a notice, on whether the head of a classifier is kept or gets new weights."""
    from luthier_trainer.models.heads import describe_head, labels_in

    there = weight_files.shapes(weight_files.loaded(model.path, inspect.MODEL))
    return describe_head(inspect.skeleton(model.config, task, inspect.MODEL), there, labels_in(str(model.path)), labels)


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
