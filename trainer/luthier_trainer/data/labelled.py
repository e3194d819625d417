"""Rows of which the model learns a part only: completions after prompts, and conversations.

What happens to rows on the way (left out, cut, changed) is counted, and said once for each kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier_trainer.data import full_lengths
from luthier_trainer.data.chats import CHAT, Chat, unlearnt
from luthier_trainer.data.columns import invalid
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import ChatReader, Unmasked, Unreadable, common
from luthier_trainer.data.reading import Reader
from luthier_trainer.data.tokens import MAX_LENGTH, keep_learnable, language, language_features, mapped
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset


def completion_rows(
    rows: Rows, prompt: str, completion: str, reader: Reader, max_length: int | None, use: str, masked: bool
) -> Dataset:
    """Return one row a pair of texts, with the end-of-text token at its end.

    `masked`: only the tokens of the completion are labels.

    They are divided as in TRL: the tokens that the prompt alone shares with both are the prompt.
    """
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    report = Report(rows, max_length, use)

    def tokenize(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [before + after for before, after in zip(batch[prompt], batch[completion], strict=True)]
        alone = reader(batch[prompt], **options)["input_ids"]
        found = []
        for index, asked, ids in zip(indices, alone, reader(texts, **options)["input_ids"], strict=True):
            row = reader.row(ids)
            begin = common(asked, row) if masked else 0
            if masked and begin < len(asked) and asked[begin:] != [reader.tokenizer.eos_token_id]:
                report.remark("diverging", index)
            found.append(report.cut(index, row, [0] * begin + [1] * (len(row) - begin)))
        return _labelled(found, masked)

    encoded = mapped(rows.data, tokenize, language_features(masked), with_indices=True)
    report.tell()
    return keep_learnable(encoded)


def chat_rows(rows: Rows, reader: ChatReader, max_length: int | None, use: str) -> Dataset:
    """Return one row a conversation. Rows that cannot be written, or have no label, are left out, with a notice.

    Raises Failure if that is true of all rows, or if the job learns all tokens and a message is not to be learnt.
    """
    masked = reader.loss_on != "all"
    report = Report(rows, max_length, use)

    def tokenize(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        found: list[tuple[list[int], list[int]]] = []
        for index, chat in zip(indices, batch[CHAT], strict=True):
            read = json.loads(chat)
            if not masked:
                refuse_weights(read, f"{rows.place(index)} of {rows.origin}")
            try:
                row = reader(read)
            except (Unreadable, Unmasked) as error:
                report.remark(type(error).__name__.lower(), index, str(error))
                found.append(([], []))
                continue
            for remark in row.remarks:
                report.remark(remark, index)
            if not any(row.mask):
                report.remark("silent", index)
            found.append(report.cut(index, row.ids, row.mask))
        return _labelled(found, masked)

    encoded = mapped(rows.data, tokenize, language_features(masked), with_indices=True)
    report.tell()
    return keep_learnable(encoded)


def refuse_weights(chat: Chat, place: str) -> None:
    """Raise Failure if a message of a conversation, which is at `place`, has the weight 0 and all tokens are learnt."""
    if numbers := unlearnt(chat):
        raise invalid(
            f"spec.training.lossOn: all learns each token, and message {numbers[0]} of {place} has the weight 0. Choose"
            " assistant, or remove the weights"
        )


REMARKS: Mapping[str, tuple[str, str]] = {
    "unreadable": (
        "spec.dataset.chatTemplate",
        "cannot be written by the chat template, and are left out",
    ),
    "unmasked": (
        "spec.dataset.chatTemplate",
        "are left out, because the template does not mark what the assistant writes, and it cannot be found by"
        " comparing. Put {% generation %} and {% endgeneration %} around it in the template, or set"
        " spec.training.lossOn: all",
    ),
    "silent": ("spec.dataset", "have no message of the assistant that could be learnt, and are left out"),
    "lost": (
        "spec.dataset.chatTemplate",
        "have messages, tools or calls of tools that the chat template leaves out; the model does not see them",
    ),
    "diverging": (
        "spec.dataset",
        "have a prompt whose last tokens change with what follows it. The model learns other tokens there than it will"
        " see when it is asked",
    ),
    "unmarked": (
        "spec.dataset.chatTemplate",
        "have turns whose last token the template leaves out of its generation marks. It is learnt, so that the model"
        " ends its turns",
    ),
    "unended": (
        "spec.dataset.chatTemplate",
        "do not end with a control token of the template; the end-of-text token is added, so that the model ends"
        " its turn",
    ),
    "spelled": (
        "spec.dataset",
        "spell control tokens of the tokenizer in messages, which are read as ordinary text. Set"
        " spec.dataset.parseSpecialTokens: true if they are meant as the tokens themselves",
    ),
    "undivided": (
        "spec.dataset.chatTemplate",
        "are left out, because the template writes the prompt differently where an answer follows it",
    ),
    "beheaded": (MAX_LENGTH, "have no label within {max_length} tokens, and are left out"),
    "crowded": (
        MAX_LENGTH,
        "have a prompt of {max_length} tokens or more, which leaves no room for an answer, and are left out",
    ),
    "alike": (MAX_LENGTH, "have answers that do not differ within {max_length} tokens, and are left out"),
    "cut": (MAX_LENGTH, "are longer than {max_length} tokens and are cut"),
}
"""Remark about a row → (field, what is said of all such rows)."""
LEFT_OUT = ("unreadable", "unmasked", "undivided", "silent", "beheaded", "crowded", "alike")


class Report:
    """Counts what happens to rows, for one notice of each kind."""

    def __init__(self, rows: Rows, max_length: int | None, use: str) -> None:
        self.rows, self.max_length, self.use = rows, max_length, use
        self.counts: Counter[str] = Counter()
        self.first: dict[str, tuple[int, str]] = {}

    def remark(self, kind: str, index: int, why: str = "") -> None:
        """Count a remark about the row at position `index`. `why` is shown for the first such row."""
        self.counts[kind] += 1
        self.first.setdefault(kind, (index, why))

    def cut(self, index: int, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Return a row truncated at `max_length` if that is given, or an empty one if it has no label left.

        The first token is no label, because nothing comes before it.
        """
        full_lengths.keep(self.use, [len(ids)])
        learnable = any(mask[1:])
        if self.max_length is not None and len(ids) > self.max_length:
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            if learnable and not any(mask[1:]):
                self.remark("beheaded", index)
                return [], []
            self.remark("cut", index)
        return (ids, mask) if learnable else ([], [])

    def tell(self) -> None:
        """Give notice of all remarks. Raises Failure if all rows were left out for one reason."""
        total = len(self.rows.data)
        for kind, count in self.counts.items():
            field, what = REMARKS[kind]
            index, why = self.first[kind]
            said = (
                f"{field}: {count} of {total} {self.use} rows of {self.rows.origin}"
                f" {what.format(max_length=self.max_length) if '{max' in what else what}. The first is"
                f" {self.rows.place(index)}{f': {why}' if why else ''}"
            )
            if kind in LEFT_OUT and count == total:
                raise invalid(said)
            notice(said)


def _labelled(rows: list[tuple[list[int], list[int]]], masked: bool) -> dict[str, list[Any]]:
    """Return the columns for causal-lm from (token ids, mask) of each row."""
    columns = language(ids for ids, _ in rows)
    return columns | {"loss_mask": [mask for _, mask in rows]} if masked else columns
