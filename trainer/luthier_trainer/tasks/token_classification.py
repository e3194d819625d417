"""token-classification: predict a tag for each word of a text, such as the names in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import tagged, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.reading import Reader, rows_at_once
from luthier_trainer.models import inspect
from luthier_trainer.models.processors import for_words
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.scoring.spans import SpanScore, types_of
from luthier_trainer.tasks.base import Batch, Collator, Loss, Model, Shown, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import IGNORED, LabelledBatches, padded
from luthier_trainer.tasks.headed import HeadedTask
from luthier_trainer.tasks.texts import TEXTS_AT_ONCE, TextTask, token_trial

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from luthier_trainer.models.memory import Trial

FIRST = "first_pieces"  # 1 for the first token of each word: tags are measured there
ENTITY_METRICS = ("precision", "recall", "f1")


class TokenClassification(LabelledBatches, HeadedTask, TextTask):
    """The task token-classification."""

    task = "token-classification"

    # ---- prepare

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (spec.dataset.columns.words,)

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return spec.dataset.columns.words, spec.dataset.columns.tags

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return tagged.read(rows, *self.columns(spec))

    def labels(self, rows: Rows, spec: FineTuneJobSpec) -> list[str]:
        return tagged.labels_of(rows)

    def label_ids(self, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> None:
        """Check the tags of the rows. Their classes are not those of whole rows, and so none are returned."""
        tagged.check(rows, labels or [])

    def outputs(self, labels: list[str] | None) -> list[str]:
        return labels or []

    def read_processor(self, folder: Path, field: str) -> PreTrainedTokenizerBase:
        return for_words(super().read_processor(folder, field), folder)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the tokenizer tells words, and that the metric is one of these tags. Raises Failure if not."""
        if not model.processor.is_fast:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its tokenizer does not say which tokens belong to which word. Choose a model with a"
                " tokenizer.json",
            )
        if spec.training.metric in ENTITY_METRICS and not tagged.is_bio(labels or []):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.training.metric: {spec.training.metric} is of entities, and no tag of the rows begins with B- or"
                " I-. Use accuracy, f1Macro or evalLoss",
            )
        super().check_model(model, spec, rows, labels)

    def texts(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[str]:
        for batch in self.contents(rows, spec):
            yield from map(str, batch)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        for batch in rows.data.iter(rows_at_once(rows.data, TEXTS_AT_ONCE)):
            yield [" ".join(json.loads(row)["words"]) for row in batch[tagged.TAGGED]]

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the tokens of each row. `labels` has the tag of a word at its first token, or at all of them
        (`tagging.labelPieces`), and `IGNORED` elsewhere.

        At the further tokens of a word that begins an entity, the tag is that of its continuation.
        """
        from datasets import Features, List, Value

        ids = {name: i for i, name in enumerate(labels or [])}
        reader = Reader(processor, spec.dataset.parse_special_tokens)
        reader.check_spellings(rows.data, tagged.TAGGED, "spec.dataset.columns.words", f"{use} rows of {rows.origin}")
        longest, everywhere = spec.training.max_length, spec.tagging.label_pieces == "all"

        def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
            parsed = [json.loads(row) for row in batch[tagged.TAGGED]]
            encoded = reader([row["words"] for row in parsed], is_split_into_words=True, return_token_type_ids=False)
            made: dict[str, list[Any]] = {name: [] for name in (*features, tokens.FULL_LENGTH, "lost")}
            for i, row in enumerate(parsed):
                whole = encoded["input_ids"][i]
                begin, end = cut(encoded.word_ids(i), longest)
                words = encoded.word_ids(i)[:begin] + encoded.word_ids(i)[end:]
                first = [
                    word is not None and word != before for word, before in zip(words, [None, *words], strict=False)
                ]
                read = {"input_ids": whole[:begin] + whole[end:], FIRST: [int(one) for one in first]}
                read["labels"] = [
                    label_of(row["tags"][word], ids, begins, everywhere) if word is not None else IGNORED
                    for word, begins in zip(words, first, strict=True)
                ]
                cells = read | {
                    "length": len(words),
                    tokens.FULL_LENGTH: len(whole),
                    "lost": len(row["words"]) - sum(first),
                }
                for name, cell in cells.items():
                    made[name].append(cell)
            return made

        features = {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            FIRST: List(Value("uint8")),
            "length": Value("int32"),
        }
        types = tokens.with_notes(Features(features | {"lost": Value("int32")}))
        rows_of_tokens = tokens.mapped(rows.data, tokenize, types, parallel=True)
        lost = sum(rows_of_tokens["lost"][:])
        if lost:
            notice(
                f"{tokens.MAX_LENGTH}: {lost} words of {use} rows have no token within {longest} tokens, and are"
                " neither learnt nor measured"
            )
        return tokens.without_lengths(rows_of_tokens.remove_columns("lost"), longest, use, spec.dataset.filter)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        super().check_encoded(data, model, labels)
        if "eval" not in data:
            return
        names = labels or []
        measured = {label for row in data["eval"]["labels"] for label in row} - {IGNORED}
        kinds = types_of(names) if tagged.is_bio(names) else names
        there = [names[label] for label in measured]
        absent = sorted({*kinds} - {*(types_of(there) if tagged.is_bio(names) else there)})
        if absent:
            notice(
                f"{tagged.FIELD}: {len(absent)} of {len(kinds)} types are in no held-out row ({', '.join(absent[:5])})."
                " f1Macro counts each as 0, and the other metrics say nothing about them. Hold out more rows"
            )

    def shown(self, row: Mapping[str, Any]) -> Mapping[str, Shown]:
        return {"text": (row["input_ids"], [int(label != IGNORED) for label in row["labels"]])}

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        made = token_trial(model, self.task, spec, rows, labels_of_tokens=True, labels=len(labels or []))
        return replace(made, loss=self._loss(spec))

    # ---- training

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.measured import MeasuringTrainer

        options = {"score": TagScore(context.labels or []), "loss": self._loss(context.spec)}
        return TrainerSetup(MeasuringTrainer, collator(context.processor.pad_token_id), options)

    def _loss(self, spec: FineTuneJobSpec) -> Loss:
        from luthier_trainer.tasks import measured, smoothing

        epsilon = spec.training.label_smoothing
        return smoothing.row_loss(epsilon) if epsilon else measured.label_loss


def cut(words: Sequence[int | None], longest: int) -> tuple[int, int]:
    """Return (first, end) of the tokens to leave out, so that at most `longest` are left.

    `words`: the word of each token; None for control tokens, of which those at the end of the row stay.
    """
    closing = 0
    while closing < len(words) and words[-1 - closing] is None:
        closing += 1
    begin = min(max(longest - closing, 0), len(words) - closing)
    return begin, len(words) - closing


def label_of(tag: str, ids: Mapping[str, int], begins: bool, everywhere: bool) -> int:
    """Return the label of a token of a word with this tag. `begins`: whether it is the first one of the word."""
    if begins:
        return ids[tag]
    if not everywhere:
        return IGNORED
    return ids[f"I-{tag[2:]}" if tag.startswith("B-") and f"I-{tag[2:]}" in ids else tag]


def collator(padding: int) -> Collator:
    """Return a function that makes batches of tagged rows. `padding`: id of the token that fills up rows."""

    def collate(rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids, attention_mask, labels and `FIRST`, each int64 [rows, length]."""
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": padded(ids, padding),
            "attention_mask": padded([torch.ones_like(tokens) for tokens in ids], 0),
            "labels": padded([torch.tensor(row["labels"]) for row in rows], IGNORED),
            FIRST: padded([torch.tensor(row[FIRST]) for row in rows], 0),
        }

    return collate


class TagScore:
    """Computes the loss of labels (nats a label), the accuracy of words, and for BIO tags the figures of entities.

    Figures are those of words: of a word of several tokens the first one answers.
    """

    beside = (FIRST,)

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self.spans = SpanScore(types_of(labels)) if tagged.is_bio(labels) else None
        """None for tags that stand for their word alone. Then each tag counts as a type of one word."""

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        import torch

        from luthier_trainer.tasks.measured import token_losses

        losses, numbers = token_losses(outputs["logits"], batch["labels"]), []
        answers, at = outputs["logits"].argmax(dim=-1).cpu(), batch[FIRST].bool().cpu()
        for answered, wanted, chosen in zip(answers, batch["labels"].cpu(), at, strict=True):
            pair = [[self.labels[i] for i in ids[chosen].tolist()] for ids in (answered, wanted)]
            right = sum(one == other for one, other in zip(*pair, strict=True))
            numbers.append([float(right), float(len(pair[0])), *self._counted(*pair)])
        return torch.cat([losses, torch.tensor(numbers, dtype=torch.float64, device=losses.device)], dim=1)

    def _counted(self, answered: list[str], wanted: list[str]) -> list[float]:
        if self.spans:
            return self.spans.numbers(answered, wanted)
        pairs = list(zip(answered, wanted, strict=True))
        return [
            float(count)
            for name in self.labels
            for count in (pairs.count((name, name)), answered.count(name), wanted.count(name))
        ]

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        loss, labels, right, words, *counts = rows.sum(dim=0).tolist()
        figures = (self.spans or SpanScore(self.labels)).figures(counts)
        if not self.spans:
            figures = {"f1Macro": figures["f1Macro"]}  # over all tags, the others are the accuracy
        return {"loss": loss / labels, "accuracy": right / words, **figures}
