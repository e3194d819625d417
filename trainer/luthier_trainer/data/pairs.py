"""Reads pairs of answers: each form of rows with a chosen and a rejected answer becomes one column of JSON text.

A row is then an object with `prompt`, `chosen` and `rejected`, and with `tools` if there are some. All three are texts,
or all three are lists of messages as in `chats`. The prompt stands in a column of its own, or it is what both answers
begin with alike, as TRL takes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import chats, columns, templates
from luthier_trainer.data.chats import Malformed, Message, listed, messages_of, says_something, shown, tools_of
from luthier_trainer.data.forms import COLUMNS, DATASET
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import common
from luthier_trainer.data.reading import rows_at_once
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset

PAIR = "pair"  # the column of JSON text
ANSWERS = ("chosen", "rejected")
LISTED = '{"prompt": ['  # how the JSON text of a row of messages begins
OPTIONAL = {"prompt": "prompt", "tools": "tools"}
"""Roles that rows need not have → the column that is used if the job names none and the rows have it."""
TITLE = "pairs of answers"

Answer = str | list[Message]
Pair = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """Where the prompt of a row comes from."""

    prompt: Answer
    chosen: Answer
    rejected: Answer
    remark: str | None = None
    """What is to be reported of the row: a key of `REMARKS`."""


REMARKS = {
    "repeated": "begin with their prompt in both answers; it is read once",
    "whole": "have whole conversations as answers; what both begin with alike is the prompt, and the column of the"
    " prompt is not used",
    "apart": "have answers without a common beginning, and so no prompt; the whole of both is compared",
}


def wanted(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Return the columns to read."""
    return tuple(dict.fromkeys(roles(spec).values()))


def roles(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return role → column, of the roles that rows can have."""
    given = spec.dataset.columns
    asked = {role: getattr(given, role) or column for role, column in OPTIONAL.items()}
    return {"prompt": asked["prompt"], "chosen": given.chosen, "rejected": given.rejected, "tools": asked["tools"]}


def present(rows: Rows, spec: FineTuneJobSpec, named: dict[str, str], needed: tuple[str, ...]) -> dict[str, str]:
    """Return role → column, of the columns that there are.

    Raises Failure if a column is missing that rows must have, or that the job names.
    """
    there = rows.names or tuple(rows.data.column_names)
    for role, column in named.items():
        if role in needed or getattr(spec.dataset.columns, role) is not None:
            columns.require(rows, column, f"{COLUMNS}.{role}", [other for other in named.values() if other != column])
    return {role: column for role, column in named.items() if column in there}


def read(rows: Rows, spec: FineTuneJobSpec) -> Rows:
    """Return rows with the one column `PAIR`.

    Rows with a blank prompt or answer, and rows whose answers are the same, are dropped, with a notice. Raises Failure
    if a row is no pair, if no row is left, or if the job names a chat template for rows without messages.
    """
    named = roles(spec)
    found = present(rows, spec, named, ANSWERS)
    names = f'"{named["chosen"]}" and "{named["rejected"]}"'
    if "prompt" not in found:
        notice(
            f'{DATASET}: the rows of {rows.origin} have no column "{named["prompt"]}"; what {names} begin with alike is'
            " the prompt"
        )
    subject = f"{COLUMNS}: {' or '.join(_quoted(found[role]) for role in found if role != 'tools')} of {rows.origin}"
    pairs = chats.as_json(rows, found, PAIR, _pair, subject, TITLE, parallel=True)
    refuse_kinds(pairs, PAIR, subject, TITLE)
    refuse_template(pairs, PAIR, "chosen", spec)
    _tell(pairs)
    return _differing(pairs, names)


def refuse_kinds(rows: Rows, column: str, subject: str, title: str) -> None:
    """Raise Failure at a row of texts among rows of messages, or the other way. `subject` begins the message."""
    kinds = [text.startswith(LISTED) for batch in rows.data.iter(10_000) for text in batch[column]]
    others = [i for i, kind in enumerate(kinds) if kind != kinds[0]]
    if others:
        names = {True: "messages", False: "texts"}
        raise columns.invalid(
            f"{subject} cannot be read as {title} in {len(others)} of {len(kinds)} rows. The first is"
            f" {rows.place(others[0])}: it holds {names[not kinds[0]]}, and the rows before it {names[kinds[0]]}"
        )


def are_messages(data: Dataset, column: str) -> bool:
    """Return whether the rows of a column of JSON text hold messages. All rows are of one kind."""
    return isinstance(json.loads(data[0][column])["prompt"], list)


def refuse_template(rows: Rows, column: str, role: str, spec: FineTuneJobSpec) -> None:
    """Raise Failure if the job names a chat template for rows without messages."""
    if spec.dataset.chat_template is not None and not are_messages(rows.data, column):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{templates.FIELD}: the rows of {rows.origin} are texts, which have no messages; remove it, or write each"
            f" {role} as a list of messages",
        )


def joined(data: Dataset, column: str = PAIR) -> Iterator[list[str]]:
    """Yield the contents of rows, in batches: prompt and answers of one row as one text."""
    for batch in data.iter(rows_at_once(data, 1_000)):
        yield ["\n".join(_contents(json.loads(row))) for row in batch[column]]


def _contents(row: Pair) -> Iterator[str]:
    for role, part in row.items():
        if role in ("prompt", "completion", *ANSWERS):
            yield from [part] if isinstance(part, str) else [message["content"] for message in part]


def _pair(cells: dict[str, Any]) -> Pair | None:
    """Return a row as a pair; None if its prompt or an answer is blank. Raises Malformed."""
    prompt, chosen, rejected = (listed(cells.get(role)) for role in ("prompt", *ANSWERS))
    if any(blank(part) for part in (chosen, rejected)) or ("prompt" in cells and blank(prompt)):
        return None
    if any(isinstance(part, list) for part in (prompt, chosen, rejected)):
        taken = _of_messages(prompt, messages_of(chosen, "assistant"), messages_of(rejected, "assistant"))
    else:
        for part in (chosen, rejected, *([prompt] if "prompt" in cells else [])):
            if not isinstance(part, str):
                raise Malformed(f"{shown(part)} is neither a text nor a list of messages")
        taken = _of_texts(prompt if "prompt" in cells else None, chosen, rejected)
    found: Pair = {"prompt": without_weights(taken.prompt), "chosen": taken.chosen, "rejected": taken.rejected}
    refuse_weights([taken.chosen, taken.rejected])
    if tools := tools_of(cells.get("tools")):
        found["tools"] = tools
    return found | ({"remark": taken.remark} if taken.remark else {})


def without_weights(prompt: Answer) -> Answer:
    """Return a prompt without the weights of its messages, of which none is learnt."""
    if isinstance(prompt, str):
        return prompt
    return [{key: value for key, value in message.items() if key != "weight"} for message in prompt]


def refuse_weights(answers: Iterable[Answer]) -> None:
    """Raise Malformed if a message of an answer is not to be learnt: answers are compared as a whole."""
    if any("weight" in message for answer in answers if isinstance(answer, list) for message in answer):
        raise Malformed("a message of an answer has the weight 0, but answers are compared as a whole. Remove the key")


def blank(part: Any) -> bool:
    """Return whether a cell has no text, or no message that says something."""
    if isinstance(part, list):
        return not any(says_something(message) for message in messages_of(part))
    return part is None or (isinstance(part, str) and not part.strip())


def _of_texts(prompt: str | None, chosen: str, rejected: str) -> Taken:
    if prompt is not None:
        if chosen.startswith(prompt) and rejected.startswith(prompt) and len(prompt) < min(len(chosen), len(rejected)):
            return Taken(prompt, chosen[len(prompt) :], rejected[len(prompt) :], "repeated")
        return Taken(prompt, chosen, rejected)
    # As `extract_prompt` of TRL 1.16, which however fails for answers without a common beginning.
    same, shorter = common(chosen, rejected), min(len(chosen), len(rejected))
    if same == shorter:
        same -= 1  # one answer is the beginning of the other
    elif same and chosen[same - 1] == " ":
        same -= 1  # a word begins with its blank
    return Taken(chosen[:same], chosen[same:], rejected[same:], None if same else "apart")


def _of_messages(prompt: Any, chosen: list[Message], rejected: list[Message]) -> Taken:
    if prompt is not None:
        asked = messages_of(prompt, "user")
        if all(answer[: len(asked)] == asked and len(answer) > len(asked) for answer in (chosen, rejected)):
            return Taken(asked, chosen[len(asked) :], rejected[len(asked) :], "repeated")
        if all(answer[0]["role"] == "assistant" for answer in (chosen, rejected)) or isinstance(prompt, list):
            return Taken(asked, chosen, rejected)
    same = min(common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    remark = "whole" if prompt is not None else None
    return Taken(chosen[:same], chosen[same:], rejected[same:], remark if same else "apart")


def _tell(rows: Rows) -> None:
    """Give notice of where the prompts of some rows come from."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows.data[PAIR]):
        if (remark := json.loads(row).get("remark")) is not None:
            found.setdefault(remark, []).append(i)
    for remark, places in found.items():
        notice(
            f"{DATASET}: {len(places)} of {len(rows.data)} rows of {rows.origin} {REMARKS[remark]}. The first is"
            f" {rows.place(places[0])}"
        )


def _differing(rows: Rows, names: str) -> Rows:
    """Return the pairs whose answers differ, with a notice of the others. Raises Failure if there is none."""
    import numpy

    differs = numpy.array([_differs(json.loads(row)) for row in rows.data[PAIR]], dtype=bool)
    same = numpy.flatnonzero(~differs)
    if not len(same):
        return rows
    found = f"{COLUMNS}.rejected: {names} are the same in {len(same)} of {len(rows.data)} rows of {rows.origin}"
    if len(same) == len(rows.data):
        raise columns.invalid(f"{found}. Name two other columns")
    notice(f"{found}, which are left out. The first is {rows.place(int(same[0]))}")
    return rows.select(numpy.flatnonzero(differs))


def _differs(row: Pair) -> bool:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        return bool(chosen.strip() != rejected.strip())
    return bool(chosen != rejected)


def _quoted(column: str) -> str:
    return f'column "{column}"'
