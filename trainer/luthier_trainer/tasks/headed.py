"""Shared code of tasks whose model answers with a head: a number for each class, or one number for a whole text.

The head gets new weights if the model has no head, or a head for other outputs. A head for the same outputs is kept,
with its rows reordered to the order of this job.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute, Weights
from luthier_api.status import Plan
from luthier_trainer.models import inspect, weight_files
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import LoadedModel, Model, TrainingContext
from luthier_trainer.tasks.pretrained import PretrainedTask
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class HeadedTask(PretrainedTask):
    """A base class of tasks whose model answers with a head."""

    def problem_type(self, spec: FineTuneJobSpec) -> str | None:
        """Return transformers' name of the loss that belongs to the head, for the result's configuration."""
        return None

    @abstractmethod
    def outputs(self, labels: list[str] | None) -> list[str]:
        """Return the names of the numbers with which the head answers. `labels`: the classes of the rows."""

    @property
    def auto_class(self) -> Any:
        """Return the class of transformers that loads the model."""
        return inspect.auto_class(self.task)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        super().check_model(model, spec, rows, labels)
        notice(f"{inspect.MODEL}: {what_becomes_of_the_head(model, self.task, self.outputs(labels))}")

    def weights(self, model: Model, spec: FineTuneJobSpec, plan: Plan, labels: list[str] | None) -> Weights:
        return super().weights(model, spec, plan, self.outputs(labels))

    def compute(
        self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None
    ) -> Compute | None:
        return super().compute(model, spec, self.outputs(labels), rows)

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from luthier_trainer.models.heads import HEADS, fit_head, labels_in, whole_modules

        path, names = context.model_path, self.outputs(context.labels)
        options: dict[str, Any] = {
            **context.weights,
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": self.problem_type(context.spec),
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
        """Save the base's configuration, with the outputs and the padding token of the training, beside an adapter.

        The files of PEFT hold neither. Without them the base is loaded with two outputs, LABEL_0 and LABEL_1, and a
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


def what_becomes_of_the_head(model: Model, task: str, names: list[str]) -> str:
    """Return a text, for a notice, on whether the head for the outputs `names` is kept or gets new weights."""
    from luthier_trainer.models.heads import describe_head, labels_in

    there = weight_files.shapes(weight_files.loaded(model.path, inspect.MODEL))
    return describe_head(inspect.skeleton(model.config, task, inspect.MODEL), there, labels_in(str(model.path)), names)
