"""Reads the references of rows, in the forms in which datasets have them, and compares their labels with the model's.

References are stored in one form for each task: a text; a label, or a list of labels; a list of answers, empty for a
question without one; or a list of entities with the positions of their characters. A number is stored as text.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from luthier_api.generate import GenerateJobSpec
from luthier_api.tasks import REFERENCE, GenerateTask
from luthier_trainer.data import chats, columns
from luthier_trainer.data.columns import some
from luthier_trainer.generation.rows import Line
from luthier_trainer.prepare.bad_rows import BadRow
from luthier_trainer.runtime.notices import notice
from luthier_trainer.scoring import spans

FIELD = "spec.inputs.columns.reference"
WORD = re.compile(r"\S+")


def reference(task: GenerateTask, value: Any, line: Line) -> Any:
    """Return the reference in a cell; None if the cell is empty. `line`: the other roles of its row.

    Raises BadRow if the task has no such references.
    """
    if value is None or value == "":
        return None
    return READERS[task](value, line)


def text(value: Any, line: Line) -> str:
    """Return a reference that is a text; a whole number is one, too. Raises BadRow for anything else."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"{chats.shown(value)} is no text")


def unpacked(value: Any) -> Any:
    """Return the list or object of which a cell is the JSON text, as in tables of CSV; else the cell."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with suppress(ValueError):
            return json.loads(value)
    return value


def label(value: Any, line: Line) -> str | list[str]:
    """Return a label or a list of labels. A label is text, however a file stores it."""
    value = unpacked(value)
    return [name_of(one) for one in value] if isinstance(value, list) else name_of(value)


def name_of(value: Any) -> str:
    """Return a label as text: true is "true", and 1, or 1.0 in a column of floats, is "1".

    Raises BadRow if it is none.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and math.isfinite(value):
        return f"{value:.0f}" if value == int(value) else repr(value)
    if isinstance(value, str) and value.strip():
        return value
    raise BadRow(f"{chats.shown(value)} is no label; write a name, or a list of names")


def answers(value: Any, line: Line) -> list[str]:
    """Return the texts of answers: one, a list of them, or SQuAD's object, in CSV as JSON.

    Raises BadRow if it is none of these.
    """
    value = unpacked(value)
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = [one.get("text") for one in value]
    if isinstance(value, dict):
        value = value.get("text")
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
        raise BadRow(f'{chats.shown(value)} are no answers; write a text, a list of texts, or {{"text": [...]}}')
    return found


def entities(value: Any, line: Line) -> list[dict[str, Any]]:
    """Return entities with their positions: those of a list of objects, or those that the tags of the words describe.

    Words are what stands between blanks. Raises BadRow if it is neither.
    """
    given, value = line["text"], unpacked(value)
    if isinstance(value, str):
        value = value.split()
    if isinstance(value, dict) and {"label", "start", "end"} <= value.keys():  # as `datasets` writes a list of objects
        keys = ("label", "start", "end")
        value = [dict(zip(keys, one, strict=True)) for one in zip(*(value[key] for key in keys), strict=True)]
    if not isinstance(value, list):
        raise BadRow(
            f"{chats.shown(value)} are no entities; write a list of objects with label, start and end, or tags"
        )
    if value and all(isinstance(one, str) for one in value):
        return tagged(value, given)
    return [entity(one, given) for one in value]


def tagged(tags: list[str], given: str) -> list[dict[str, Any]]:
    """Return the entities that tags of the words of a text describe. Raises BadRow if the tags do not fit the words."""
    words = list(WORD.finditer(given))
    if len(words) != len(tags):
        raise BadRow(f"{len(tags)} tags, and the text has {len(words)} words between blanks; each needs one")
    for tag in tags:
        if tag != spans.OUTSIDE and not tag.startswith(("B-", "I-")):
            raise BadRow(f"{tag} is no tag of an entity; write O, or B- or I- and a type")
    return [
        {"label": kind, "start": words[first].start(), "end": words[last].end()}
        for kind, first, last in spans.spans(tags)
    ]


def entity(value: Any, given: str) -> dict[str, Any]:
    """Return an entity. Raises BadRow if it does not lie in the text."""
    found = value if isinstance(value, dict) else {}
    name, start, end = (found.get(key) for key in ("label", "start", "end"))
    if isinstance(name, str) and name and type(start) is int and type(end) is int and 0 <= start < end <= len(given):
        return {"label": name, "start": start, "end": end}
    raise BadRow(f"{chats.shown(value)} is no entity; write label, start and end, the characters of a part of the text")


READERS: Mapping[GenerateTask, Callable[[Any, Line], Any]] = {
    "text-generation": text,
    "automatic-speech-recognition": text,
    "summarization": text,
    "translation": text,
    "text2text-generation": text,
    "text-classification": label,
    "zero-shot-classification": label,
    "question-answering": answers,
    "token-classification": entities,
}
"""Task → what reads its references, of the tasks that have metrics."""


def check_labels(rows: Iterable[Line], names: Collection[str], problem: str | None) -> None:
    """Check references that are labels against those of the model. `problem`: transformers' name of the kind of answer.

    Labels that the model does not have count as mistakes of it, which a notice says. Raises Failure if it has none of
    them, or if a reference is not of its kind.
    """
    unknown: Counter[str] = Counter()
    known = 0
    for line in rows:
        value = line.get(REFERENCE)
        if value is None or "error" in line:
            continue
        check_kind(value, problem, f"row {line['row']}")
        found = [
            one["label"] if isinstance(one, dict) else one for one in ([value] if isinstance(value, str) else value)
        ]
        unknown.update(name for name in found if name not in names)
        known += sum(name in names for name in found)
    if problem == "regression" or not unknown:
        return
    theirs = f"{some(sorted(unknown))} (the model has {some(names)})"
    if not known:
        raise columns.invalid(f"{FIELD}: no reference is a label of the model: {theirs}. Name the labels as it does")
    notice(
        f"{FIELD}: {unknown.total()} labels are none of the model, which therefore answers them wrongly in the metrics:"
        f" {theirs}"
    )


def check_kind(value: Any, problem: str | None, row: str) -> None:
    """Raise Failure if a reference is not of the kind that a classifier answers."""
    if problem == "regression":
        try:
            finite = math.isfinite(float(value))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise columns.invalid(f"{FIELD}: {row}: the model answers numbers, and {value!r} is none")
    elif problem == "single_label_classification" and not isinstance(value, str):
        raise columns.invalid(f"{FIELD}: {row}: the model gives a text one label, and this is a list: {value!r}")


def types_of(labels: Collection[str]) -> list[str]:
    """Return the types of entities that labels of tokens stand for."""
    return sorted({name.removeprefix("B-").removeprefix("I-") for name in labels} - {spans.OUTSIDE})


def problem_of(spec: GenerateJobSpec) -> str:
    """Return transformers' name of the kind of answer of a zero-shot classification."""
    return "multi_label_classification" if spec.zero_shot.multi_label else "single_label_classification"
