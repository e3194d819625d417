"""text-classification: one label for a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier_trainer.tasks.base import Collator, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import padding_right
from luthier_trainer.tasks.classification import Classification
from luthier_trainer.tasks.texts import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextClassification(TextTask, Classification):
    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        # Decoders look for the last token that is not padding.
        model.config.pad_token_id = context.processor.pad_token_id
        return super().trainer(context, model)

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(padding_right(processor))
