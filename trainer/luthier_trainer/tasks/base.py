"""The protocol of a task of a FineTuneJob: one object with the methods that both phases, prepare and run, call.

`prepare.training` and `training.main` call these methods in the order in which they are defined here. Neither of them
depends on the name of a task. A task is one file of this folder and a line of `table`. Neither this module nor the top
level of such a file imports torch, so that `prepare` can refuse a mistake without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Attention, Compute, FineTuneRun, Origin, Weights
from luthier_api.status import Plan, ResolvedSource
from luthier_api.tasks import TRAINING_TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.load import Rows
from luthier_trainer.models.sources import Located
from luthier_trainer.workspace.plan import micro_batch

if TYPE_CHECKING:
    import numpy
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, Trainer, TrainingArguments

    from luthier_trainer.models.memory import Trial

Batch = dict[str, Any]
"""Tensors by name, made by a collator from rows of the prepared dataset."""
Collator = Callable[[list[dict[str, Any]]], Batch]
Drawn = Callable[[Batch, int | None], Batch]
"""(a batch, the step of the training; None for held-out rows) → the batch with what is drawn at random for it.

It follows from seed, step and rows alone, so that a resumed run, or one with other processes, draws the same.
"""
Loss = Callable[..., "torch.Tensor"]
"""(outputs of the model, labels, num_items_in_batch=) → the loss, a scalar; the `compute_loss_func` of transformers.

The loss is the sum over the batch, divided by the number of items in the whole step, which counts all micro-batches of
all processes. transformers 5.23 leaves this division to every model whose `forward` takes keyword arguments, and then
averages neither over micro-batches nor over processes. Many of these models accept the keywords but ignore them.
"""
Shown = tuple[Sequence[int], Sequence[int]]
"""(token ids, mask): a part of an encoded row, and 1 for the tokens that are labels."""
Processor = Any
"""A tokenizer or an image processor, which converts inputs to tensors. They have no common type in transformers.

It is None if the task reads what it needs from the folder of the model.
"""


class Batches(Protocol):
    """The questions that the training loop asks about a batch."""

    def rows(self, batch: Batch) -> int:
        """Return the number of rows of the dataset in a batch."""
        ...

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        """Return the number of tokens in a batch as an integer tensor [] on its device; None if rows have no tokens."""
        ...

    def computed_tokens(self, batch: Batch) -> int | None:
        """Return the number of tokens that the model computes, padding included; None if rows have no tokens."""
        ...

    def without_weight(self, batch: Batch) -> Batch:
        """Return the batch without anything that counts in the loss, for example with all labels ignored."""
        ...


class Metrics(Protocol):
    """Computes the metrics of an evaluation, batch by batch."""

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what the metrics need of a batch, shape [rows, ...]. Only this is gathered from all processes.

        `logits`: the output of the model for the batch, `labels`: its labels.
        """
        ...

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add the reduced outputs of a batch, gathered from all processes.

        With `compute_result`, return the metrics by name and start a new evaluation; otherwise return an empty dict.
        """
        ...


@dataclass(frozen=True)
class Model:
    """The model that the training starts from, in a folder, during `prepare`."""

    resolved: ResolvedSource
    path: Path
    config: Any
    """The configuration, from transformers or diffusers, which have no common type."""
    processor: Processor
    missing_tokens: Mapping[str, int] = field(default_factory=dict)
    """Spelling → id of the tokens without a row in the embedding. A model is refused if any text can have one."""
    new_tokens: Sequence[int] = ()
    """Ids of the tokens whose rows in the embedding are new, or unused before, and learn."""
    piece_parts: Mapping[int, list[int]] = field(default_factory=dict)
    """Id of a learnt piece → ids of the tokens of whose rows an adapter begins that of the piece, as their mean."""


@dataclass(frozen=True)
class Alike:
    """What puts rows on the same side of a division into training and held-out rows."""

    contents: Iterator[Sequence[str | bytes]]
    """Of each row, in batches. Rows with the same one are on the same side."""
    named: str = "are equal to"
    """What rows with the same content do, in messages."""
    can_deduplicate: bool = True
    """Whether `dataset.deduplicate` leaves one row of each content."""

    @property
    def remedy(self) -> str:
        remedy = "name rows to evaluate on in dataset.evalFiles or evalSplit"
        return f"set dataset.deduplicate: exact, or {remedy}" if self.can_deduplicate else remedy


@dataclass(frozen=True)
class OtherModel:
    """A model that the task uses beside the one that it trains, in a folder, during `prepare`."""

    path: Path
    origins: list[Origin]
    """By which the run phase checks that it is unchanged."""


@dataclass(frozen=True)
class TrainingContext:
    """The inputs of a task in the run phase."""

    spec: FineTuneJobSpec
    model_path: Path
    processor: Processor
    labels: list[str] | None = None
    """Names of the classes; None for tasks without classes."""
    class_weights: Sequence[float] | None = None
    """How much a row of each class counts in the loss; None: all alike."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained` that decide how weights are stored in memory: their dtype, their quantisation."""
    other_models: Sequence[Path] = ()
    """Folders of the models that `Task.other_models` has provided, in its order."""
    whole_logits: bool = False
    """Whether the loss has to hold the logits of all tokens (`Task.whole_logits`)."""
    folder: Path = Path("unused")
    """A folder of the workspace for what the task keeps between attempts. It need not exist."""


@dataclass(frozen=True)
class LoadedModel:
    """A model before the method is applied to it."""

    model: Any
    """A torch module from transformers or diffusers. Their models have no common type that has a configuration."""
    new_modules: list[str] = field(default_factory=list)
    """Modules with new weights. All their weights are trained, and they get no adapter."""
    unused_parameters: set[str] = field(default_factory=set)
    """Names of parameters that the task does not use. They are not trained."""


@dataclass(frozen=True)
class TrainerSetup:
    """How to construct the trainer of a task. `training.resilience` puts its mixin before the class."""

    trainer: type[Trainer]
    collator: Collator
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the class, for example a loss, metrics or a reference model."""
    loss: str = ""
    """How the loss is computed, for the log, if there are several ways."""
    drawn: Drawn | None = None
    """What is drawn at random for batches; None: nothing, or the trainer does it."""
    begin_epoch: Callable[[int], None] | None = None
    """Called with the number of an epoch before its rows are read, by collators that draw at random; None: not."""


class Task(Batches, Protocol):
    """One task. Methods with a body are defaults for the tasks that inherit from this class."""

    reported: Mapping[str, str] = {}
    """Names in the trainer's log that are printed beside the loss → how they are called there."""

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        """Return the names of the columns that the task reads."""
        ...

    def check_new_model(self, spec: FineTuneJobSpec) -> None:
        """Check, before anything is read, that a new model made from `model.config` fits the spec.

        Only for tasks whose row in `luthier_api.tasks` has the option model.config; others raise TypeError. Raises
        Failure if it does not fit.
        """
        raise TypeError(f"{type(self).__name__} has no option model.config")

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """Return the rows that can be used. Raises Failure if a column is missing or holds another type of data."""
        ...

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str] | None:
        """Return the names of the classes of the training rows; None for tasks without classes.

        Raises Failure if the column of labels is missing or cannot be used.
        """
        return None

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray | None:
        """Return the index of each row's class, int64 [rows]; None for tasks without classes.

        Raises Failure if a class is not in `labels`.
        """
        return None

    def class_weights(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> list[float] | None:
        """Return how much a row counts in the loss by its class; None if all count alike. `rows`: the training rows.

        Raises Failure if the spec weights a class that no row has.
        """
        return None

    def new_model(self, rows: Rows, run: FineTuneRun, folder: WorkspaceFolder) -> Model:
        """Create a model with new weights from `model.config` and the training rows, and save it in the workspace.

        Raises TypeError for tasks without the option model.config.
        """
        raise TypeError(f"{type(self).__name__} has no option model.config")

    def read_model(self, located: Located, run: FineTuneRun, folder: WorkspaceFolder, rows: Rows) -> Model:
        """Fetch the located model, or merge an adapter into its base, into a folder that `load_model` can load.

        `rows`: the training rows, of which the tokenizer learns pieces if the spec asks for it. Raises Failure if the
        model does not suit the task.
        """
        ...

    def other_models(self, rows: Rows, run: FineTuneRun, folder: WorkspaceFolder) -> list[OtherModel]:
        """Provide the models that the task uses beside the one that it trains. `rows`: the training rows.

        Raises Failure if one does not exist or does not suit.
        """
        return []

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check the fields of the spec against the model and the number of training rows. Raises Failure."""
        ...

    def encode(
        self, rows: Rows, processor: Processor, spec: FineTuneJobSpec, labels: list[str] | None, use: str
    ) -> Dataset:
        """Return the rows in the encoded form that the training reads.

        `use`: "training" or "held-out", for notices. Raises Failure if the rows cannot be encoded.
        """
        ...

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        """Yield what the data report compares of each row, in batches: its texts as one, or the bytes of its image."""
        ...

    def alike(self, rows: Rows, spec: FineTuneJobSpec) -> Alike:
        """Return what rows share that are all learnt or all held out (`dataset.evalFraction`)."""
        return Alike(self.contents(rows, spec))

    def added_tokens(self, processor: Processor) -> int:
        """Return the number of tokens of an encoded row that are not its text."""
        return 0

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """Check the model against the encoded rows. Raises Failure."""
        return

    def shown(self, row: Mapping[str, Any]) -> Mapping[str, Shown]:
        """Return the parts of an encoded row by name, for people to read; nothing if the row has no tokens."""
        return {}

    def count_tokens(self, data: Dataset) -> int | None:
        """Return the number of tokens in the encoded rows; None if rows have no tokens."""
        return None

    def groups(self, data: Dataset) -> Sequence[int] | None:
        """Return the group of each encoded row; None if all rows can share a micro-batch."""
        return None

    def epoch_rows(self, spec: FineTuneJobSpec, rows: int, groups: Sequence[int] = ()) -> int:
        """Return the rows that the steps of an epoch have in the unit of `training.batchSize`.

        `groups`: the rows of each group, where only rows of one group share a micro-batch. The last micro-batch of a
        group counts as a whole one.
        """
        if not groups:
            return rows
        rows_at_once = micro_batch(spec, spec.training.batch_size // spec.resources.world_size)[0]
        return sum(-(-size // rows_at_once) * rows_at_once for size in groups)

    def kept_bytes(self, model: Model, spec: FineTuneJobSpec, data: DatasetDict) -> int:
        """Return the bytes of what the training computes of the rows, once, and keeps in the workspace."""
        return 0

    def attention(self, model: Model, spec: FineTuneJobSpec) -> Attention | None:
        """Return how the model's attention can be computed; None for models that are not of transformers.

        Raises Failure if the implementation that the spec asks for does not work with the model.
        """
        return None

    def cannot_recompute(self, model: Model, spec: FineTuneJobSpec) -> str | None:
        """Return why the model, or the method, does not support activation checkpointing; None if they do."""
        ...

    def whole_logits(self, model: Model) -> str | None:
        """Return why the loss of a language model has to hold the logits of all tokens; None if it does not."""
        return None

    def weights(self, model: Model, spec: FineTuneJobSpec, plan: Plan, labels: list[str] | None) -> Weights:
        """Return the numbers of all and of trainable weights, from which the size of checkpoints is planned."""
        ...

    def compute(
        self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None
    ) -> Compute | None:
        """Return what one token, or one image, is multiplied with; None if that is not known.

        `rows`: encoded; None before they are read, when all of them count as of training.maxLength.
        """
        return None

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        """Return a step of the training on the meta device, from which memory is planned; or why there is none.

        `rows`: encoded; None before they are read, when all of them count as of training.maxLength.
        """
        return f"a step of {spec.task} is not computed in prepare yet"

    # ---- training

    def read_processor(self, folder: Path, field: str) -> Processor:
        """Return the tokenizer or image processor in `folder`. `field`: the field of the spec that a message names.

        Raises Failure if there is none.
        """
        ...

    def loader_workers(self, cores: int) -> int:
        """Return the number of data loader processes for each process on a GPU, which has `cores` CPU cores."""
        ...

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        """Return the arguments of the trainer. `common`: the arguments that are the same for all tasks."""
        from transformers import TrainingArguments

        return TrainingArguments(**common)

    def load_model(self, context: TrainingContext) -> LoadedModel:
        """Load the model from its folder. Raises Failure if its files do not fit each other or the task."""
        ...

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        """Return the trainer class, its collator, loss and metrics. `model`: the loaded model, without adapters."""
        ...

    def metric_names(self, spec: FineTuneJobSpec) -> list[str]:
        """Return the metrics of an evaluation beside the loss."""
        return [metric.name for metric in TRAINING_TASKS[spec.task].metrics]

    def training_metrics(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return metrics of the course of a finished training, from the trainer's log."""
        return {}

    def training_notices(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what a user should know of the course of a finished training, from the trainer's log."""
        return []

    def complete_result(self, folder: Path, model: Any, context: TrainingContext) -> None:
        """Add files to the saved result in `folder` that the task needs beside weights. `model`: the trained model."""
        return
