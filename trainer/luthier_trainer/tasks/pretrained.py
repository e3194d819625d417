"""Shared code of tasks with models of transformers: the model in a folder, checked against task, method and spec."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.method import Method
from luthier_api.methods import DIVIDE_WEIGHTS, METHODS
from luthier_api.run import Attention, Compute, FineTuneRun, Weights
from luthier_api.status import Plan
from luthier_api.tasks import TRAINING_TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import row_lengths
from luthier_trainer.data.load import Rows
from luthier_trainer.methods import checks as method_checks
from luthier_trainer.methods import experts, frozen, ia3, loftq, targets, virtual_tokens, whole
from luthier_trainer.methods.trainable import compute_of, weights_of
from luthier_trainer.models import attention, checks, inspect, weight_check
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.models.sources import Located
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import Model, Task
from luthier_trainer.workspace.plan import CHECKPOINTING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


class PretrainedTask(Task):
    """A base class of tasks with models of transformers."""

    task: str
    """The name of the task in `luthier_api.tasks`."""

    @abstractmethod
    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        """Return the columns that are inputs of the model."""

    def read_model(self, located: Located, run: FineTuneRun, folder: WorkspaceFolder, rows: Rows) -> Model:
        """Return the model in a folder that `from_pretrained` loads. An adapter of another job is merged into its base.

        Raises Failure if the model does not suit the task, or is quantised in a way that cannot be trained.
        """
        path = whole_model(located, run, folder, run.spec.model.job, "model")
        config = inspect.read_config(path, located.field)
        checks.check_task(config, self.task, inspect.MODEL)
        # Adapters can be trained on top of quantised weights. Without adapters, a training that starts from quantised
        # weights would have to learn to correct their rounding errors.
        quantization = run.spec.model.quantization
        checks.check_quantisation(config, {"bitsandbytes"} if quantization else set(), inspect.MODEL)
        if quantization:
            checks.check_stored_type(config, quantization.type, inspect.MODEL)
        named_by_adapter = METHODS[run.spec.method.type].adapter and run.spec.model.id is not None
        path = weight_check.fitting(path, config, self.task, located.field, folder, named_by_adapter)
        processor = self.read_processor(located.folder or path, located.field)
        return Model(located.resolved, path, config, processor)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the model supports strategy, method and activation checkpointing. Raises Failure if not."""
        inspect.notice_whole_layers(model.config)
        if spec.strategy in DIVIDE_WEIGHTS:
            checks.check_sharding(model.config, self.task, spec.strategy, "spec.strategy")
        if spec.training.parameter_precision == "bf16":
            checks.check_weights_in_16_bits(model.config, self.task, "spec.training.parameterPrecision")
        trouble = self.cannot_recompute(model, spec) if spec.training.gradient_checkpointing else None
        if trouble:
            raise Failure(
                ExitCode.INVALID_SPEC, f"{CHECKPOINTING}: {trouble}; remove it, or use a smaller microBatchSize"
            )
        if METHODS[spec.method.type].adapter:
            spec = spec.model_copy(update={"method": with_names(spec.method, model.config, self.task)})
            method_checks.check_adapters(
                model.config, self.task, spec.method.target_modules or [], "spec.method.targetModules"
            )
            ia3.check(spec.method, method_checks.names_with_adapters(model.config, self.task, spec.method))
            virtual_tokens.check(model.config, self.task, spec.method, spec.training.max_length)
            whole.check(model.config, self.task, spec.method, spec.model.quantization is not None)
            method_checks.check_patterns(model.config, self.task, spec.method)
            method_checks.check_initial(model.config, self.task, spec.method)
            loftq.check(model.path, model.config, self.task, spec)
            method_checks.check_biases(model.config, self.task, spec.method)
            experts.check_adapters(model.config, spec)
            if model.new_tokens:
                method_checks.check_new_tokens(model.config, self.task, spec.method)
        else:
            frozen.check(model.config, self.task, spec.method)
        if spec.model.quantization:
            kind, field = spec.model.quantization.type, quantization_field(spec)
            experts.check_quantised_share(model.config, self.task, kind, field)
            if not spec.resources.gpus_per_node:
                method_checks.check_quantisable(model.config, kind, field)

    def attention(self, model: Model, spec: FineTuneJobSpec) -> Attention | None:
        asked = spec.training.attention
        if asked is None:
            return None
        packed = spec.training.packing == "isolated"
        trouble = attention.cannot_varlen(model.config, self.task) if packed else None
        attention.check(model.config, self.task, asked, trouble)
        return Attention(default=attention.of_transformers(model.config, self.task), cannot_varlen=trouble)

    def cannot_recompute(self, model: Model, spec: FineTuneJobSpec) -> str | None:
        if not METHODS[spec.method.type].recomputes:
            return METHODS[spec.method.type].why["recomputes"]
        return checks.cannot_recompute(model.config, self.task)

    def weights(self, model: Model, spec: FineTuneJobSpec, plan: Plan, labels: list[str] | None) -> Weights:
        held = len(model.new_tokens) if METHODS[spec.method.type].adapter else 0
        return weights_of(with_labels(model.config, labels), spec, plan, model.path, held)

    def references(self, spec: FineTuneJobSpec) -> int:
        """Return the forward passes of the same model without gradients, in a step, for a reference."""
        return 0

    def compute(
        self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None
    ) -> Compute | None:
        length = row_lengths.attended(rows) if rows is not None else None
        found = compute_of(with_labels(model.config, labels), spec, length or spec.training.max_length)
        return found.model_copy(
            update={"references": self.references(spec), "units_a_row": self.tokens_a_row(spec, rows)}
        )

    def tokens_a_row(self, spec: FineTuneJobSpec, rows: Dataset | None) -> float:
        """Return the tokens of a row, as `training.batchSize` counts rows: the mean, or without `rows` the most."""
        if rows:
            return (self.count_tokens(rows) or 0) / len(rows)
        return float(max(TRAINING_TASKS[spec.task].sequences, 1) * spec.training.max_length)


def with_names(method: Method, config: PreTrainedConfig, task: str) -> Method:
    """Return the method with names of modules instead of expressions, and of those that the job leaves out.

    Raises Failure if an expression means none, or if the architecture has none that are usual.
    """
    from luthier_trainer.models.heads import heads_of

    model = inspect.skeleton(config, task, inspect.MODEL)
    return targets.expanded(method, model, heads_of(model, task))


def quantization_field(spec: FineTuneJobSpec) -> str:
    """Return the field of the spec that asks for quantised weights. Some methods imply them."""
    return "spec.method.type" if METHODS[spec.method.type].quantization else "spec.model.quantization"


def with_labels(config: PreTrainedConfig, labels: list[str] | None) -> PreTrainedConfig:
    """Return a copy of a configuration with the number of labels set, if there are labels."""
    fitted = copy.deepcopy(config)
    if labels:
        fitted.num_labels = len(labels)
    return fitted
