"""What the tasks share whose rows have one of several labels: model, loss and metrics.

The head is new when the model comes without one, or with one for other labels. A head for the same labels is kept, with
its rows in our order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, EvalPrediction, PreTrainedModel
from transformers.integrations import deepspeed as zero

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.heads import (
    HEADS,
    fit_head,
    head_weights,
    labels_in,
    row_loss,
    shown,
    unsharded,
    whole_modules,
)
from luthier_trainer.models.zero3 import left_out, weights_of_other_shape
from luthier_trainer.runtime.failure import Failure


class Classification:
    auto: Any
    """transformers' class that finds the model's."""

    def load_model(self, path: str, labels: list[str] | None, **options: Any) -> tuple[PreTrainedModel, list[str]]:
        names = labels or []
        options |= {
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
        if quantization and (quantized := set(whole) - set(HEADS)):
            # New weights are trained whole, which 4-bit ones cannot be. Which they are (a pooler, say) is known only
            # after loading.
            quantization.llm_int8_skip_modules += sorted(quantized)
            model, missing, mismatched = self._load(path, options)
        fit_head(model, missing, labels_in(path), names)
        return model, whole

    def _load(self, path: str, options: dict[str, Any]) -> tuple[PreTrainedModel, set[str], set[str]]:
        """The model, the names of weights that its folder lacks, and of those that it has in another shape.

        `ignore_mismatched_sizes` is meant for the head alone, and transformers applies it to every weight. Raises
        Failure for another one.
        """
        left: set[str] = set()
        if zero.is_deepspeed_zero3_enabled():
            left = weights_of_other_shape(Path(path), self._shapes(path, options["num_labels"]))
            options = options | ({"key_mapping": left_out(left)} if left else {})
        model, loaded = self.auto.from_pretrained(path, output_loading_info=True, **options)
        mismatched = left | {key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]}
        if mismatched and (others := sorted(mismatched - head_weights(model).keys())):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.model: {path} has {shown(others)} in another shape than its config.json says. Copy"
                " the files that belong together",
            )
        return model, set(loaded["missing_keys"]) - left, mismatched

    def _shapes(self, path: str, labels: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of the model in folder `path`, if it had so many labels."""
        with unsharded(), torch.device("meta"):
            model = self.auto.from_config(AutoConfig.from_pretrained(path, num_labels=labels))
        return {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    def loss(self, model: PreTrainedModel) -> Any:
        # no classifier of transformers 5.23 divides by the step's rows, and most take the keyword that asks for it
        return row_loss

    def figures(self) -> LabelFigures:
        return LabelFigures()


class LabelFigures:
    """evalLoss, accuracy, f1Macro, and majorityShare: the accuracy of always answering the commonest label.

    f1Macro is the mean over all labels of the training. A label that the held-out rows do not have counts as 0, so that
    the figure does not grow because a rare label is missing from them.
    """

    def __init__(self) -> None:
        self.loss, self.answers, self.truth, self.labels = 0.0, list[int](), list[int](), 0

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [rows, labels] → [rows, 2]: loss and answer of each row."""
        self.labels = logits.shape[1]
        losses = cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([losses.double(), logits.argmax(dim=1).double()], dim=1)

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.loss += gathered.predictions[:, 0].sum().item()
        self.answers += gathered.predictions[:, 1].long().tolist()
        self.truth += gathered.label_ids.tolist()
        if not compute_result:
            return {}
        from sklearn.metrics import accuracy_score, f1_score  # 0.4 s that every start of every task would pay

        rows = len(self.truth)
        figures = {
            "loss": self.loss / rows,
            "accuracy": float(accuracy_score(self.truth, self.answers)),
            "f1Macro": float(
                f1_score(self.truth, self.answers, labels=range(self.labels), average="macro", zero_division=0)
            ),
            "majorityShare": max(self.truth.count(label) for label in set(self.truth)) / rows,
        }
        self.__init__()  # type: ignore[misc]  # the next evaluation begins at nothing
        return figures
