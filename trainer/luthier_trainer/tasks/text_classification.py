"""text-classification: predict one label, any number of labels, or a number for a text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from luthier_api.classification import PROBLEMS
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import columns, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.tasks.base import Batch, Collator, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import measured_by, padding_right
from luthier_trainer.tasks.classification import LABEL, Classification, notice_unmeasured_labels, tell_absent
from luthier_trainer.tasks.problems import ANSWERS, Answers
from luthier_trainer.tasks.texts import FIELD, TextTask, reader_of, token_trial

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    from luthier_trainer.models.memory import Trial

NUMBER = "value"  # the name of the head's one number in the result's configuration


class TextClassification(Classification, TextTask):
    """The task text-classification."""

    task = "text-classification"

    def answers(self, spec: FineTuneJobSpec) -> Answers | None:
        """Return the kind of answers; None for one class of several, which the base class has."""
        return ANSWERS.get(spec.classification.problem)

    def problem_type(self, spec: FineTuneJobSpec) -> str | None:
        return PROBLEMS[spec.classification.problem].problem_type

    def outputs(self, labels: list[str] | None) -> list[str]:
        return [NUMBER] if labels is None else labels

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return columns.texts(rows, spec.dataset.columns.text, FIELD, drop_blank=False)

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str] | None:
        kind = self.answers(spec)
        if kind is None:
            return super().labels(rows, spec)
        columns.require(rows, spec.dataset.columns.label, LABEL, self.inputs(spec))
        return kind.labels(rows, spec)

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> numpy.ndarray | None:
        kind = self.answers(spec)
        if kind is None:
            return super().label_ids(rows, spec, labels)
        columns.require(rows, spec.dataset.columns.label, LABEL, self.inputs(spec))
        kind.targets(rows, spec, labels)
        return None

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        kind, text = self.answers(spec), spec.dataset.columns.text
        targets = kind.targets(rows, spec, labels) if kind else super().label_ids(rows, spec, labels)
        assert targets is not None
        reader = reader_of(rows, text, FIELD, processor, spec, use)
        longest, wanted = spec.training.max_length, spec.dataset.filter
        return tokens.classification_rows(rows.data, text, targets, reader, longest, use, wanted)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        TextTask.check_encoded(self, data, model, labels)
        if labels is None or "eval" not in data:
            return
        held_out = numpy.asarray(data["eval"]["labels"][:])
        if held_out.ndim == 1:
            notice_unmeasured_labels(data, labels)
        else:
            there = set(numpy.flatnonzero(held_out.any(axis=0)).tolist())
            tell_absent([name for i, name in enumerate(labels) if i not in there], labels)

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import torch

        kind, outputs = self.answers(spec), len(self.outputs(labels))
        made = token_trial(model, self.task, spec, rows, labels_of_tokens=False, labels=outputs)
        if kind is None:
            return replace(made, loss=self.loss(spec))

        def batch(size: int) -> Batch:
            return {**made.batch(size), "labels": torch.empty(kind.shape(size, outputs), device="meta")}

        return replace(made, batch=batch, loss=kind.loss())

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        # Decoders classify by the last token that is not padding, so they need the id of the padding token.
        model.config.pad_token_id = context.processor.pad_token_id
        setup, kind = super().trainer(context, model), self.answers(context.spec)
        if kind is None:
            return setup
        return replace(setup, options={"compute_loss_func": kind.loss(), **measured_by(kind.metrics())})

    def metric_names(self, spec: FineTuneJobSpec) -> list[str]:
        return [*PROBLEMS[spec.classification.problem].metrics]

    def collator(self, context: TrainingContext) -> Collator:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(padding_right(context.processor))
