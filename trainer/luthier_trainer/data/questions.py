"""Reads questions about texts: they become one column of JSON text, in SQuAD's form.

A row is then an object with `question`, `context`, and `answers`, a list of [text, first character]. An empty list says
that the context has no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from luthier_trainer.data import chats, columns
from luthier_trainer.data.chats import Malformed, shown
from luthier_trainer.data.load import Rows

if TYPE_CHECKING:
    from datasets import Dataset

ASKED = "asked"  # the column of JSON text
TITLE = "a question with its context and its answers"
ROLES = ("question", "context", "answers")
AROUND = 20  # characters of a context in a message
ROWS_AT_ONCE = 1_000


def read(rows: Rows, given: dict[str, str]) -> Rows:
    """Return rows with the one column `ASKED`. `given`: role → column.

    Rows without a question are dropped, with a notice. Raises Failure if an answer does not stand in its context where
    the row says.
    """
    for role in ROLES:
        columns.require(rows, given[role], f"spec.dataset.columns.{role}", tuple(given.values()))
    subject = f'spec.dataset.columns: column "{given["answers"]}" of {rows.origin}'
    return chats.as_json(rows, given, ASKED, _row, subject, TITLE, parallel=True)


def each(data: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows as objects."""
    for batch in data.select_columns([ASKED]).iter(ROWS_AT_ONCE):
        yield from map(json.loads, batch[ASKED])


def _row(cells: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row; None if it asks nothing. Raises Malformed."""
    question, context = cells["question"], cells["context"]
    if question is None or (isinstance(question, str) and not question.strip()):
        return None
    for role, text in (("question", question), ("context", context)):
        if not isinstance(text, str):
            raise Malformed(f"its {role} is {shown(text)}, and no text")
    if not context.strip():
        raise Malformed("its context is blank; remove it")
    answers = [_answer(text, begin, context) for text, begin in _answers(cells["answers"])]
    return {"question": question, "context": context, "answers": answers}


def _answers(value: Any) -> list[tuple[Any, Any]]:
    """Return (text, first character) of each answer. Raises Malformed.

    Accepted are SQuAD's object of two lists, as `datasets` writes it, and a list of objects, as in SQuAD's own file; in
    tables of CSV, the JSON text of either.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise Malformed(
                f'its answers are the text {shown(value)}. Write {{"text": [...], "answer_start": [...]}}, in CSV as'
                " JSON"
            ) from None
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {key: [item.get(key) for item in value] for key in ("text", "answer_start")}
    if not isinstance(value, dict) or not {"text", "answer_start"} <= value.keys():
        if value == {}:
            return []
        raise Malformed(f'its answers are {shown(value)}. Write {{"text": [...], "answer_start": [...]}}')
    texts, begins = value["text"], value["answer_start"]
    if not isinstance(texts, list) or not isinstance(begins, list) or len(texts) != len(begins):
        raise Malformed("text and answer_start of its answers are not two lists of the same length")
    return list(zip(texts, begins, strict=True))


def _answer(text: Any, begin: Any, context: str) -> list[Any]:
    """Return an answer that stands in its context. Raises Malformed."""
    if not isinstance(text, str) or not text.strip():
        raise Malformed(f"an answer is {shown(text)}; a question without an answer has empty lists")
    if not isinstance(begin, int) or isinstance(begin, bool):
        raise Malformed(f'answer_start of "{text}" is {shown(begin)}, and no number of a character')
    there = context[begin : begin + len(text)] if begin >= 0 else ""
    if there == text:
        return [text, begin]
    found = context.find(text)
    remedy = (
        f"it stands at {found}"
        if found >= 0
        else "it does not stand in the context, and this task finds answers only there"
    )
    raise Malformed(f'answer_start {begin} of "{text[:AROUND]}" is wrong: there stands "{there[:AROUND]}"; {remedy}')
