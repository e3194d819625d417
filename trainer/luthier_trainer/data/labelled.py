"""Rows of which the model learns a part only: completions after prompts, and conversations.

What happens to rows on the way (left out, cut, changed) is counted, and said once for each kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier_api.rows import RowFilter
from luthier_trainer.data import full_lengths
from luthier_trainer.data.chats import CHAT, Chat, unlearnt
from luthier_trainer.data.columns import invalid, nothing_left
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import ChatReader, Unmasked, Unreadable, common
from luthier_trainer.data.reading import Reader
from luthier_trainer.data.tokens import (
    FULL_LENGTH,
    MAX_LENGTH,
    keep_learnable,
    language_features,
    mapped,
    with_notes,
    within,
)
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset


def completion_rows(
    rows: Rows,
    prompt: str,
    completion: str,
    reader: Reader,
    max_length: int | None,
    use: str,
    masked: bool,
    wanted: RowFilter | None = None,
) -> Dataset:
    """Return one row a pair of texts, with the end-of-text token at its end.

    `masked`: only the tokens of the completion are labels.

    They are divided as in TRL: the tokens that the prompt alone shares with both are the prompt.
    """
    options = {"return_attention_mask": False, "return_token_type_ids": False}

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = [before + after for before, after in zip(batch[prompt], batch[completion], strict=True)]
        alone = reader(batch[prompt], **options)["input_ids"]
        made = Encoded(masked, max_length)
        for asked, ids in zip(alone, reader(texts, **options)["input_ids"], strict=True):
            row = reader.row(ids)
            begin = common(asked, row) if masked else 0
            diverges = masked and begin < len(asked) and asked[begin:] != [reader.tokenizer.eos_token_id]
            made.add(row, [0] * begin + [1] * (len(row) - begin), ("diverging",) if diverges else ())
        return made.columns

    encoded = mapped(rows.data, tokenize, noted(language_features(masked)), parallel=True)
    return keep_learnable(reported(encoded, rows, max_length, use, wanted))


def chat_rows(
    rows: Rows, reader: ChatReader, max_length: int | None, use: str, wanted: RowFilter | None = None
) -> Dataset:
    """Return one row a conversation. Rows that cannot be written, or have no label, are left out, with a notice.

    Raises Failure if that is true of all rows, or if the job learns all tokens and a message is not to be learnt.
    """
    masked = reader.loss_on != "all"

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        made = Encoded(masked, max_length)
        for chat in batch[CHAT]:
            read = json.loads(chat)
            if not masked and unlearnt(read):
                made.leave_out(WEIGHTED, "")
                continue
            try:
                row = reader(read)
            except (Unreadable, Unmasked) as error:
                made.leave_out(type(error).__name__.lower(), str(error))
                continue
            made.add(row.ids, row.mask, row.remarks if any(row.mask) else (*row.remarks, "silent"))
        return made.columns

    encoded = mapped(rows.data, tokenize, noted(language_features(masked)), parallel=True)
    for index, remarks in enumerate(encoded[REMARK] if not masked else ()):
        if WEIGHTED in remarks:
            refuse_weights(json.loads(rows.data[index][CHAT]), f"{rows.place(index)} of {rows.origin}")
    return keep_learnable(reported(encoded, rows, max_length, use, wanted))


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
    "long": (
        MAX_LENGTH,
        "have an answer of more than {max_length} tokens with its prompt, and are left out; the reward is read at the"
        " end of an answer",
    ),
    "alike": (MAX_LENGTH, "have answers that do not differ within {max_length} tokens, and are left out"),
    "cut": (MAX_LENGTH, "are longer than {max_length} tokens and are cut"),
}
"""Remark about a row → (field, what is said of all such rows)."""
LEFT_OUT = ("unreadable", "unmasked", "undivided", "silent", "beheaded", "crowded", "long", "alike")
WEIGHTED = "weighted"  # a remark that is refused
REMARK, WHY = "remarks", "why"  # columns while rows are encoded, by several processes
AT_ONCE = 10_000  # rows of which the remarks are read at once


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
                raise nothing_left(said)
            notice(said)


class Encoded:
    """Columns of encoded rows, with what is to be reported of each row beside them: several processes make them."""

    def __init__(self, masked: bool, max_length: int | None) -> None:
        self.max_length = max_length
        names = ("input_ids", *(("loss_mask",) if masked else ()), "length", FULL_LENGTH, REMARK, WHY)
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, ids: list[int], mask: list[int], remarks: tuple[str, ...]) -> None:
        """Append a row truncated at `max_length` if that is given, or an empty one if it has no label left.

        The first token is no label, because nothing comes before it.
        """
        length = len(ids)
        learnable = any(mask[1:])
        if self.max_length is not None and length > self.max_length:
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            beheaded = learnable and not any(mask[1:])
            learnable = learnable and not beheaded
            remarks = (*remarks, "beheaded" if beheaded else "cut")
        self._append(ids if learnable else [], mask, length, remarks, None)

    def leave_out(self, remark: str, why: str) -> None:
        """Append an empty row. `why` is shown for the first such row."""
        self._append([], [], None, (remark,), why)

    def _append(
        self, ids: list[int], mask: list[int], full_length: int | None, remarks: tuple[str, ...], why: str | None
    ) -> None:
        row = {"input_ids": ids, "loss_mask": mask[: len(ids)], "length": len(ids)}
        row |= {FULL_LENGTH: full_length, REMARK: list(remarks), WHY: why}
        for name, cells in self.columns.items():
            cells.append(row[name])


def reported(encoded: Dataset, rows: Rows, max_length: int | None, use: str, wanted: RowFilter | None) -> Dataset:
    """Return encoded rows without the columns that say what is to be reported of them, after it was reported.

    Rows that `wanted` does not keep are left out. Raises Failure if all rows were left out for one reason.
    """
    kept = within(encoded, wanted, use)
    if len(kept) < len(encoded):
        encoded, rows = encoded.select(kept), rows.select(kept)
    return told(encoded, rows, max_length, use)


def told(encoded: Dataset, rows: Rows, max_length: int | None, use: str) -> Dataset:
    """Return encoded rows without the columns of `noted`, after it was reported what they say.

    Raises Failure if all rows were left out for one reason.
    """
    report = Report(rows, max_length, use)
    notes = encoded.select_columns([FULL_LENGTH, REMARK, WHY])
    for start in range(0, len(notes), AT_ONCE):
        batch = notes[start : start + AT_ONCE]
        full_lengths.keep(use, [length for length in batch[FULL_LENGTH] if length is not None])
        for index, (remarks, why) in enumerate(zip(batch[REMARK], batch[WHY], strict=True), start):
            for kind in remarks:
                report.remark(kind, index, why or "")
    report.tell()
    return encoded.remove_columns([FULL_LENGTH, REMARK, WHY])


def noted(features: Any) -> Any:
    """Return the types of encoded rows, with the columns that say what is to be reported of each row."""
    from datasets import Features, List, Value

    return Features({**with_notes(features), REMARK: List(Value("string")), WHY: Value("string")})
