"""question-answering: find the answer to a question in a text (extractive, as in SQuAD).

A context that is longer than `training.maxLength` is read in windows that overlap. A window without the answer, and a
row without one, point to the classification token. An evaluation chooses one answer, or none, from all windows of a
row, and compares it by SQuAD's rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import full_lengths, questions, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.reading import Reader, rows_at_once
from luthier_trainer.models import inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Batch, Model, Shown, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, padded
from luthier_trainer.tasks.headed import HeadedTask
from luthier_trainer.tasks.texts import TEXTS_AT_ONCE, TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial

STRIDE = "spec.answering.stride"
OUTPUTS = ["LABEL_0", "LABEL_1"]  # the start and the end of an answer, by the names that transformers gives them
TYPES = "token_type_ids"
ROW, OFFSETS, CONTEXT, ANSWERS = "row", "offsets", "context", "answers"
BESIDE = (ROW, OFFSETS, CONTEXT, ANSWERS)
"""Of held-out windows: the number of the row; first and last character of each token, -1 outside of the context; the
context, and the texts of the answers.
"""
NO_ANSWER = -1  # of a character


class QuestionAnswering(LabelledBatches, HeadedTask, TextTask):
    """The task question-answering."""

    task = "question-answering"

    def outputs(self, labels: list[str] | None) -> list[str]:
        return OUTPUTS

    # ---- prepare

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return spec.dataset.columns.question, spec.dataset.columns.context

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (*self.inputs(spec), spec.dataset.columns.answers)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return questions.read(rows, dict(zip(questions.ROLES, self.columns(spec), strict=True)))

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check that the tokenizer tells places, and has a classification token. Raises Failure if it does not."""
        if not model.processor.is_fast or model.processor.cls_token_id is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: question-answering needs a tokenizer that says where its tokens stand"
                " (tokenizer.json), and that has a classification token (cls_token), to which rows without an answer"
                " point. Choose an encoder such as BERT or RoBERTa",
            )
        super().check_model(model, spec, rows, labels)

    def texts(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[str]:
        for batch in self.contents(rows, spec):
            yield from map(str, batch)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        for batch in rows.data.iter(rows_at_once(rows.data, TEXTS_AT_ONCE)):
            parsed = map(json.loads, batch[questions.ASKED])
            yield [f"{row['question']}\n{row['context']}" for row in parsed]

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the windows of all rows. `labels` has the first and the last token of the answer in the window.

        Both are that of the classification token where the window does not hold the whole answer. Held-out windows
        have the columns `BESIDE`, too.
        """
        from datasets import Features, List, Value

        longest, stride = spec.training.max_length, spec.answering.stride
        reader = Reader(processor, spec.dataset.parse_special_tokens)
        reader.check_spellings(rows.data, questions.ASKED, "spec.dataset.columns", f"{use} rows of {rows.origin}")
        self._check_questions(rows, reader, longest, stride)
        typed, measured = TYPES in processor.model_input_names, use != "training"
        ids = List(Value("int32"))
        features = {"input_ids": ids, "labels": ids, "length": Value("int32"), tokens.FULL_LENGTH: Value("int32")}
        features |= {TYPES: List(Value("uint8"))} if typed else {}
        if measured:
            features |= {ROW: Value("int32"), OFFSETS: ids, CONTEXT: Value("string"), ANSWERS: List(Value("string"))}

        def windows(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list[Any]]:
            parsed = [json.loads(row) for row in batch[questions.ASKED]]
            read = reader(
                [row["question"] for row in parsed],
                text_pair=[row["context"] for row in parsed],
                truncation="only_second",
                max_length=longest,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_token_type_ids=typed,
            )
            made: dict[str, list[Any]] = {name: [] for name in features}
            before = None
            for i, of in enumerate(read["overflow_to_sample_mapping"]):
                row, window = parsed[of], read["input_ids"][i]
                spans = [
                    span if part == 1 else (NO_ANSWER, NO_ANSWER)
                    for part, span in zip(read.sequence_ids(i), read["offset_mapping"][i], strict=True)
                ]
                nowhere = window.index(processor.cls_token_id)
                cells = {
                    "input_ids": window,
                    "labels": place(spans, row["answers"], nowhere),
                    "length": len(window),
                    tokens.FULL_LENGTH: None if of == before else len(window),
                    TYPES: read[TYPES][i] if typed else None,
                    ROW: numbers[of],
                    OFFSETS: [character for span in spans for character in span],
                    CONTEXT: row["context"],
                    ANSWERS: [text for text, _ in row["answers"]],
                }
                before = of
                for name in features:
                    made[name].append(cells[name])
            return made

        found = tokens.mapped(rows.data, windows, Features(features), with_indices=True, parallel=True)
        lengths = [length for length in found[tokens.FULL_LENGTH][:] if length is not None]
        full_lengths.keep(use, lengths)
        if len(found) > len(lengths):
            notice(
                f"{tokens.MAX_LENGTH}: {len(lengths)} {use} rows are read in {len(found)} windows of at most {longest}"
                f" tokens, which overlap by {stride} tokens ({STRIDE}). Steps and epochs count windows"
            )
        return found.remove_columns(tokens.FULL_LENGTH)

    def _check_questions(self, rows: Rows, reader: Reader, longest: int, stride: int) -> None:
        """Raise Failure if a question leaves no room for a part of its context beside what windows share."""
        added = reader.tokenizer.num_special_tokens_to_add(pair=True)
        start = 0
        for batch in rows.data.iter(rows_at_once(rows.data, TEXTS_AT_ONCE)):
            asked = [json.loads(row)["question"] for row in batch[questions.ASKED]]
            for i, ids in enumerate(reader(asked, add_special_tokens=False)["input_ids"], start):
                if longest - len(ids) - added <= stride:
                    raise Failure(
                        ExitCode.INVALID_DATASET,
                        f"{tokens.MAX_LENGTH}: the question of {rows.place(i)} of {rows.origin} has {len(ids)} tokens,"
                        f" which leaves no more than {STRIDE} ({stride}) of {longest} tokens for its context. Raise"
                        " maxLength, lower stride, or shorten the question",
                    )
            start += len(asked)

    def shown(self, row: Mapping[str, Any]) -> Mapping[str, Shown]:
        begin, end = row["labels"]
        return {"window": (row["input_ids"], [int(begin <= i <= end) for i in range(len(row["input_ids"]))])}

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import torch

        from luthier_trainer.models.heads import heads_of
        from luthier_trainer.models.memory import Trial
        from luthier_trainer.tasks.span_loss import span_loss

        made = inspect.skeleton(model.config, self.task, inspect.MODEL)
        lengths = [spec.training.max_length] if rows is None else rows["length"][:]

        def batch(size: int) -> Batch:
            with torch.device("meta"):
                ids = torch.empty((size, max(lengths)), dtype=torch.int64)
                places = torch.empty((size, 2), dtype=torch.int64)
                return {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": places}

        mixed = rows is None or min(lengths) < max(lengths)
        return Trial(made, batch, span_loss, heads_of(made, self.task), max(lengths), mixed)

    # ---- training

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.span_loss import AnswerScore, SpanTrainer

        settings = context.spec.answering
        options = {"score": AnswerScore(settings.max_answer_length, settings.no_answer_threshold)}
        return TrainerSetup(SpanTrainer, WindowCollator(context.processor.pad_token_id), options)


def place(spans: Sequence[tuple[int, int]], answers: Sequence[tuple[str, int]], nowhere: int) -> list[int]:
    """Return the first and the last token of the first answer; twice `nowhere` if the window does not hold all of it.

    `spans`: first and last character of each token, `NO_ANSWER` outside of the context.
    """
    if not answers:
        return [nowhere, nowhere]
    text, begin = answers[0]
    end = begin + len(text)
    inside = [i for i, (first, last) in enumerate(spans) if first < end and last > begin and first != last]
    if not inside or spans[inside[0]][0] > begin or spans[inside[-1]][1] < end:
        return [nowhere, nowhere]
    return [inside[0], inside[-1]]


class WindowCollator:
    """Makes batches of windows, padded on the right."""

    def __init__(self, padding: int) -> None:
        """`padding`: id of the token that fills up windows."""
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids and attention_mask, int64 [rows, length], and labels, int64 [rows, 2].

        For models that tell the question from the context by them, there are token_type_ids, too. Held-out windows have
        the columns `BESIDE`; `OFFSETS` is int64 [rows, length, 2].
        """
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch: Batch = {
            "input_ids": padded(ids, self.padding),
            "attention_mask": padded([torch.ones_like(tokens) for tokens in ids], 0),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
        if TYPES in rows[0]:
            batch[TYPES] = padded([torch.tensor(row[TYPES]).long() for row in rows], 0)
        if ROW in rows[0]:
            batch[ROW] = torch.tensor([row[ROW] for row in rows])
            batch[OFFSETS] = padded([torch.tensor(row[OFFSETS]).view(-1, 2) for row in rows], NO_ANSWER)
            batch |= {name: [row[name] for row in rows] for name in (CONTEXT, ANSWERS)}
        return batch
