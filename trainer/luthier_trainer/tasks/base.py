"""What a task of a FineTuneJob is: one object that answers for both halves, `prepare` and training.

`prepare.training` and `training.main` ask these methods in the order in which they stand here, and know no task by its
name.

A task is one file of this folder and a line of `table`. Nothing here, nor at the top of such a file, imports torch:
`prepare` refuses a mistake before it would be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun
from luthier_api.status import Plan, ResolvedSource
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.load import Rows
from luthier_trainer.models.sources import Located
from luthier_trainer.workspace.space import Weights

if TYPE_CHECKING:
    import numpy
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, Trainer, TrainingArguments

Batch = dict[str, Any]
"""Tensors by name, as a collator makes them of rows of the prepared dataset."""
Collator = Callable[[list[dict[str, Any]]], Batch]
Loss = Callable[..., "torch.Tensor"]
"""(the model's outputs, labels, num_items_in_batch=) → the loss, as transformers' Trainer calls its
`compute_loss_func`: the batch's sum, divided by the items of the whole step, over all micro-batches of all processes.

transformers 5.23 leaves that division to every model whose `forward` takes keywords, and then neither averages over
micro-batches nor over processes; but many of them take the keywords and never look.
"""
Processor = Any
"""What turns inputs into tensors: a tokenizer, or an image processor. transformers gives them no common type. None: the
task reads what it needs from the model's folder.
"""


class Batches(Protocol):
    """What the training loop has to know of a batch."""

    def rows(self, batch: Batch) -> int:
        """Rows of the dataset in a batch."""
        ...

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        """Tokens in a batch, as a tensor of one integer on its device; None where rows have none."""
        ...

    def without_weight(self, batch: Batch) -> Batch:
        """The batch with everything left out that the loss counts: its labels, say."""
        ...


class Metrics(Protocol):
    """Accumulates an evaluation, batch by batch."""

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What a model makes of a batch → [rows, ...], all that is gathered from the processes."""
        ...

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add what all processes made of a batch. With `compute_result`: the metrics by name, and begin anew."""
        ...


@dataclass(frozen=True)
class Model:
    """The model to start from, in a folder, as `prepare` sees it."""

    resolved: ResolvedSource
    path: Path
    config: Any
    """transformers' or diffusers' configuration, which have no common type."""
    processor: Processor
    missing_tokens: Mapping[str, int] = field(default_factory=dict)
    """Spelling → id of the tokens without a row in the embedding. None of them occurs in every text."""


@dataclass(frozen=True)
class TrainingContext:
    """What the training half of a task is given."""

    spec: FineTuneJobSpec
    model_path: Path
    processor: Processor
    labels: list[str] | None = None
    """Names of the classes, where rows have one."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained` that decide how the weights rest: their type, a quantisation."""


@dataclass(frozen=True)
class LoadedModel:
    """A model before the method is applied to it."""

    model: Any
    """A torch module: transformers' or diffusers' model, which have no common type with a configuration."""
    new_modules: list[str] = field(default_factory=list)
    """Modules with new weights: they are trained whole, and no adapter sits on them."""
    unused_parameters: set[str] = field(default_factory=set)
    """Parameters that have no part in the task: they do not learn."""


@dataclass(frozen=True)
class TrainerSetup:
    """How the trainer of a task is made. `training.resilience` puts its mixin before the class."""

    trainer: type[Trainer]
    collator: Collator
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the class: a loss, metrics, a reference model."""


class Task(Batches, Protocol):
    """One task. Methods with a body are defaults, which a task inherits that names this class as its base."""

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        """Names of the columns that are read."""
        ...

    def check_new_model(self, spec: FineTuneJobSpec) -> None:
        """Whether a model of `model.config` fits the spec, before anything is read. Raises Failure. For tasks whose row
        in `luthier_api.tasks` has the option model.config.
        """
        raise TypeError(f"{type(self).__name__} has no option model.config")

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """The rows that can be learnt from. Raises Failure where a column is missing or holds something else."""
        ...

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str] | None:
        """Names of the classes that the training rows have; None for tasks without classes. Raises Failure."""
        return None

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray | None:
        """int64 of shape (rows,): the class of each row. Raises Failure on one that is not in `labels`."""
        return None

    def new_model(self, rows: Rows, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
        """A model with new weights, made from `model.config` and the training rows, in the workspace."""
        raise TypeError(f"{type(self).__name__} has no option model.config")

    def read_model(self, located: Located, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
        """The model that was located, downloaded or merged, as a folder that `load_model` loads. Raises Failure where
        it does not suit the task.
        """
        ...

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """What of the spec depends on the model, and on the number of training rows. Raises Failure."""
        ...

    def encode(
        self, rows: Rows, processor: Processor, spec: FineTuneJobSpec, labels: list[str] | None, use: str
    ) -> Dataset:
        """The rows as `train` reads them. `use`: training or held-out, for notices. Raises Failure."""
        ...

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """What of the model depends on the encoded rows. Raises Failure."""
        return

    def count_tokens(self, data: Dataset) -> int | None:
        """Tokens of encoded rows; None where rows have none."""
        return None

    def cannot_recompute(self, model: Model) -> str | None:
        """Why the model cannot drop its activations and compute them again, if so."""
        ...

    def weights(self, model: Model, spec: FineTuneJobSpec, plan: Plan, labels: list[str] | None) -> Weights:
        """How many weights there are and learn, for the plan of the space that checkpoints take."""
        ...

    # ---- training

    def read_processor(self, folder: Path, field: str) -> Processor:
        """The tokenizer or image processor in `folder`. Raises Failure where there is none; `field` is named in it."""
        ...

    def loader_workers(self, cores: int) -> int:
        """Processes that make batches beside each process that trains on a GPU, which has so many cores."""
        ...

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        """The arguments of the trainer. `common`: those that all tasks share."""
        from transformers import TrainingArguments

        return TrainingArguments(**common)

    def load_model(self, context: TrainingContext) -> LoadedModel:
        """The model from its folder. Raises Failure where its files do not fit."""
        ...

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        """The class that trains, its loss and its metrics. `model`: as loaded, without adapters."""
        ...

    def complete_result(self, folder: Path, model: Any, context: TrainingContext) -> None:
        """Add to the saved result in `folder` what its weights do not say. `model`: the one that was trained."""
        return
