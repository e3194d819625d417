"""audio-classification: predict one label for a clip of audio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.load import Rows
from luthier_trainer.tasks.audio import AUDIO, SAMPLES, AudioTask, Hearing, encoded, tell_cut
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, Processor, TrainingContext
from luthier_trainer.tasks.classification import Classification

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from luthier_trainer.models.memory import Trial


class AudioClassification(Classification, AudioTask):
    """The task audio-classification."""

    task = "audio-classification"

    def encode(
        self, rows: Rows, processor: Processor, spec: FineTuneJobSpec, labels: list[str] | None, use: str
    ) -> Dataset:
        """Return the columns `AUDIO`, still encoded files, `SAMPLES` and `labels`, int64."""
        hearing = Hearing.of(processor, spec)
        data = encoded(rows, spec.dataset.columns.audio, hearing, use)
        tell_cut(data[SAMPLES][:], hearing, use)
        return data.add_column("labels", self.label_ids(rows, spec, labels))

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import torch

        from luthier_trainer.models.heads import heads_of
        from luthier_trainer.models.memory import Trial

        made = self.quiet(model, labels)

        def batch(size: int) -> Batch:
            inputs = self.example(model, spec, rows, size)
            return inputs | {"labels": torch.empty(size, dtype=torch.int64, device="meta")}

        return Trial(made, batch, self.loss(spec), heads_of(made, self.task))

    def load_model(self, context: TrainingContext) -> LoadedModel:
        loaded = super().load_model(context)
        hearing = Hearing.of(context.processor, context.spec)
        return replace(loaded, unused_parameters=unused_in(loaded.model, hearing))

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # The trainer would remove the files, which no model reads, before they reach the collator.
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def collator(self, context: TrainingContext) -> AudioCollator:
        return AudioCollator(Hearing.of(context.processor, context.spec))


class AudioCollator:
    """Makes a batch of rows, whose files it decodes."""

    def __init__(self, hearing: Hearing) -> None:
        self.hearing = hearing

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return what the model gets of the clips, tensors [rows, ...], and `labels`, int64 [rows]."""
        import torch

        inputs = self.hearing.batch([self.hearing.heard(row[AUDIO]) for row in rows])
        return inputs | {"labels": torch.tensor([row["labels"] for row in rows])}


def unused_in(model: PreTrainedModel, hearing: Hearing) -> set[str]:
    """Return the names of the parameters that do not affect the logits; an empty set if that cannot be determined."""
    from luthier_trainer.models.heads import unused_parameters

    try:
        return unused_parameters(model, hearing.example(hearing.most))
    except Exception:  # the model reads values, which meta tensors lack
        return set()
