"""text-classification: predict one label for a text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import columns, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.tasks.base import Collator, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import padding_right
from luthier_trainer.tasks.classification import Classification
from luthier_trainer.tasks.texts import FIELD, TextTask, reader_of, token_trial

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from luthier_trainer.models.memory import Trial


class TextClassification(Classification, TextTask):
    """The task text-classification."""

    task = "text-classification"

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return columns.texts(rows, spec.dataset.columns.text, FIELD, drop_blank=False)

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        text, classes = spec.dataset.columns.text, self.label_ids(rows, spec, labels)
        reader = reader_of(rows, text, FIELD, processor, spec, use)
        longest, wanted = spec.training.max_length, spec.dataset.filter
        return tokens.classification_rows(rows.data, text, classes, reader, longest, use, wanted)

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        made = token_trial(model, self.task, spec, rows, labels_of_tokens=False, labels=len(labels or []))
        return replace(made, loss=self.loss(spec))

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        # Decoders classify by the last token that is not padding, so they need the id of the padding token.
        model.config.pad_token_id = context.processor.pad_token_id
        return super().trainer(context, model)

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(padding_right(processor))
