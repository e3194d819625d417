"""text-classification: one label for a text. The head is new when the model comes without one, or with one for other labels."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# What transformers' architectures call the module that maps the encoded text to the labels.
HEADS = ("classifier", "score", "classification_head", "pre_classifier", "logits_proj")


class TextClassification:
    peft_type = "SEQ_CLS"

    def load_model(self, path: str, labels: list[str] | None, **options: Any) -> tuple[PreTrainedModel, list[str]]:
        names = labels or []
        options |= {
            "num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification", "ignore_mismatched_sizes": True,
        }  # fmt: skip
        quantization = options.get("quantization_config")
        if quantization:
            quantization.llm_int8_skip_modules = list(HEADS)
        model, whole = self._load(path, options)
        if quantization and (quantized := set(whole) - set(HEADS)):
            # New weights are trained whole, which 4-bit ones cannot be. Which they are (a pooler, say) is known only after loading.
            quantization.llm_int8_skip_modules += sorted(quantized)
            model, whole = self._load(path, options)
        return model, whole

    def _load(self, path: str, options: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **options)
        mismatched = {key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]}
        return model, whole_modules(model, set(loaded["missing_keys"]) | mismatched)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(tokenizer)

    def figures(self) -> LabelFigures:
        return LabelFigures()


def whole_modules(model: torch.nn.Module, new_weights: set[str]) -> list[str]:
    """Modules that adapters must not touch: the head, and what else has no pretrained weights. Only the outermost of nested ones."""
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS} | {w.rpartition(".")[0] for w in new_weights}
    return sorted(name for name in names if name and not any(name.startswith(f"{other}.") for other in names))


class LabelFigures:
    """evalLoss, accuracy, f1Macro, and majorityShare: the accuracy of always answering the commonest label."""

    def __init__(self) -> None:
        self.loss, self.answers, self.truth = 0.0, list[int](), list[int]()

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [rows, labels] → [rows, 2]: loss and answer of each row."""
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
            "f1Macro": float(f1_score(self.truth, self.answers, average="macro", zero_division=0)),
            "majorityShare": max(self.truth.count(label) for label in set(self.truth)) / rows,
        }
        self.__init__()  # type: ignore[misc]  # the next evaluation begins at nothing
        return figures
