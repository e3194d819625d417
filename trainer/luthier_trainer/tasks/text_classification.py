"""text-classification: one label for a text."""

from __future__ import annotations

from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from luthier_trainer.tasks.classification import Classification
from luthier_trainer.tasks.padding import padding_right


class TextClassification(Classification):
    auto = AutoModelForSequenceClassification

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(padding_right(processor))

    def idle(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> set[str]:
        return set()
