"""Tokenizes pairs of answers: a prompt, and two answers that follow it.

They are divided as in TRL: the prompt and both sequences of prompt and answer are tokenized, and the common beginning
of all three is the prompt. A token that spans prompt and answer belongs to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import templates
from luthier_trainer.data.labelled import REMARK, WHY, noted, told
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import ChatReader, Unmasked, Unreadable, common
from luthier_trainer.data.pairs import ANSWERS, PAIR, Pair, are_messages
from luthier_trainer.data.reading import Reader
from luthier_trainer.data.tokens import FULL_LENGTH, mapped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ENCODED = ("prompt_ids", "chosen_ids", "rejected_ids")  # the names in TRL, which drops columns with other names


@dataclass(frozen=True)
class Parts:
    """The tokens of a prompt, and of each answer that follows it."""

    prompt: list[int]
    answers: list[list[int]]
    remarks: tuple[str, ...] = ()
    """What is to be reported of the row: keys of `labelled.REMARKS`."""
    failure: str = ""
    """Why the row has no tokens."""

    def cut(self, longest: int) -> Parts:
        """Return the row with answers that end after `longest` tokens, counted with the prompt."""
        room = max(longest - len(self.prompt), 0)
        return Parts(self.prompt, [answer[:room] for answer in self.answers])

    @property
    def length(self) -> int:
        """Return the tokens of the longest sequence."""
        return len(self.prompt) + max(map(len, self.answers), default=0)


Read = Callable[[Pair, Parts], tuple[dict[str, Any], tuple[str, ...]]]
"""(a row, its tokens) → its cells, and remarks: keys of `labelled.REMARKS`. A row without tokens has the length 0."""


def pair_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str) -> Dataset:
    """Return the token ids of each prompt and of its two answers, as in `ENCODED`, and the column `length`.

    Answers are cut at `spec.training.maxLength` tokens, counted with the prompt. Pairs that cannot be written, whose
    prompt alone is that long, or whose answers are the same up to there, are left out. All of that is said.
    `length`: tokens of the longer sequence. Raises Failure if no pair is left.
    """
    longest = spec.training.max_length

    def read(row: Pair, whole: Parts) -> tuple[dict[str, Any], tuple[str, ...]]:
        parts, remarks = kept(whole, longest)
        chosen, rejected = parts.answers or ([], [])
        return dict(zip(ENCODED, (parts.prompt, chosen, rejected), strict=True)) | {"length": parts.length}, remarks

    split = splitter(rows, PAIR, tokenizer, spec, use)
    return encoded(rows, PAIR, split, ANSWERS, read, token_lists(ENCODED), longest, use)


def token_lists(names: Iterable[str]) -> dict[str, Any]:
    """Return the types of columns of token ids, and of the column `length`."""
    from datasets import List, Value

    return {name: List(Value("int32")) for name in names} | {"length": Value("int64")}


def encoded(
    rows: Rows,
    column: str,
    split: Splitter,
    answers: tuple[str, ...],
    read: Read,
    features: Mapping[str, Any],
    longest: int,
    use: str,
) -> Dataset:
    """Return what `read` makes of each row of JSON text in `column`, without the rows that have no tokens.

    Several processes do it. `features`: types of the columns. What happens to rows is reported. Raises Failure if all
    rows were left out for one reason.
    """

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in (*features, FULL_LENGTH, REMARK, WHY)}
        found = [json.loads(text) for text in batch[column]]
        for row, parts in zip(found, split(found, answers), strict=True):
            cells, remarks = read(row, parts)
            full = None if parts.failure else parts.length
            notes = {FULL_LENGTH: full, REMARK: [*parts.remarks, *remarks], WHY: parts.failure or None}
            for name, cell in (cells | notes).items():
                made[name].append(cell)
        return made

    result = told(mapped(rows.data, tokenize, noted(features), parallel=True), rows, longest, use)
    return result.select(numpy.flatnonzero(numpy.asarray(result["length"][:]) > 0))


def kept(parts: Parts, longest: int) -> tuple[Parts, tuple[str, ...]]:
    """Return the tokens that are learnt from a row, cut at `longest` tokens, and remarks; none if it is left out."""
    if parts.failure:
        return Parts([], []), ()
    if len(parts.prompt) >= longest:
        return Parts([], []), ("crowded",)
    cut = parts.cut(longest)
    if len(cut.answers) > 1 and cut.answers[0] == cut.answers[1]:
        return Parts([], []), ("alike",)
    return cut, ("cut",) if parts.length > longest else ()


@dataclass
class Splitter:
    """Tokenizes prompts and their answers, texts or messages."""

    texts: Reader
    conversations: ChatReader | None
    """None: the rows are texts."""
    _options: dict[str, bool] = field(
        default_factory=lambda: {"return_attention_mask": False, "return_token_type_ids": False}
    )

    def __call__(self, rows: Iterable[Pair], answers: tuple[str, ...]) -> Iterator[Parts]:
        """Yield the tokens of each row. `answers`: the roles of what follows the prompt."""
        if self.conversations is not None:
            return (self._of_messages(row, answers, self.conversations) for row in rows)
        return self._of_texts(list(rows), answers)

    def _of_texts(self, rows: list[Pair], answers: tuple[str, ...]) -> Iterator[Parts]:
        prompts = self.texts([row["prompt"] for row in rows], **self._options)["input_ids"]
        wholes = [
            self.texts([row["prompt"] + row[role] for row in rows], **self._options)["input_ids"] for role in answers
        ]
        end = [self.texts.tokenizer.eos_token_id]
        for prompt, *found in zip(prompts, *wholes, strict=True):
            sequences = [self.texts.row(ids) for ids in found]
            begin = min(common(prompt, ids) for ids in sequences)
            closed = prompt[begin:] in ([], end)  # some tokenizers end each text
            yield Parts(sequences[0][:begin], [ids[begin:] for ids in sequences], () if closed else ("diverging",))

    def _of_messages(self, row: Pair, answers: tuple[str, ...], reader: ChatReader) -> Parts:
        prompt, others = row["prompt"], {"tools": row["tools"]} if "tools" in row else {}
        asked = {"prompt": len(prompt)} if prompt else {}
        try:
            found = [reader({"messages": prompt + row[role]} | others | asked) for role in answers]
        except Unreadable as error:
            return Parts([], [], ("unreadable",), str(error))
        except Unmasked as error:
            return Parts([], [], ("undivided",), str(error))
        begin = min(each.mask.index(1) if any(each.mask) else len(each.ids) for each in found)
        remarks = tuple(dict.fromkeys(remark for each in found for remark in each.remarks))
        return Parts(found[0].ids[:begin], [each.ids[begin:] for each in found], remarks)


def splitter(rows: Rows, column: str, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str) -> Splitter:
    """Return what tokenizes the rows. For messages, it sets the chat template of the tokenizer.

    It gives notice of texts that spell control tokens. Raises Failure if the tokenizer cannot treat them as plain text,
    or if there is no chat template.
    """
    texts = Reader(tokenizer, spec.dataset.parse_special_tokens)
    if are_messages(rows.data, column):
        templates.choose(tokenizer, spec.dataset.chat_template, "messages", "completions")
        return Splitter(texts, ChatReader(tokenizer, "completions", spec.dataset.parse_special_tokens))
    texts.check_spellings(rows.data, column, "spec.dataset.columns", f"{use} rows of {rows.origin}")
    return Splitter(texts, None)
