"""Reads words with tags: they become one column of JSON text, an object with `words` and `tags`, lists of texts.

Tags are names, or numbers of classes that the dataset names. If one tag of the rows begins with B- or I-, they are BIO
tags of entities; others, such as parts of speech, stand for their word alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier_trainer.data import chats, columns
from luthier_trainer.data.chats import Malformed, shown
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.notices import notice
from luthier_trainer.scoring import spans
from luthier_trainer.scoring.spans import OUTSIDE

if TYPE_CHECKING:
    from datasets import Dataset

TAGGED = "tagged"  # the column of JSON text
TITLE = "words with tags"
FIELD = "spec.dataset.columns.tags"
PREFIXES = ("B", "I")
OTHER_PREFIXES = ("E", "S", "L", "U")
"""Of BIOES and BILOU, where the last word of an entity, and one that stands alone, have tags of their own."""
ROWS_AT_ONCE = 1_000


def read(rows: Rows, words: str, tags: str) -> Rows:
    """Return rows with the one column `TAGGED`. `words`, `tags`: columns with a list in each row.

    Rows without words are dropped, with a notice. Raises Failure if a row is not words with a tag each.
    """
    for role, name in (("words", words), ("tags", tags)):
        columns.require(rows, name, f"spec.dataset.columns.{role}", (words, tags))
    item = getattr(rows.data.features[tags], "feature", None)
    names = getattr(item, "names", None)
    subject = f'spec.dataset.columns: columns "{words}" and "{tags}" of {rows.origin}'

    def row(cells: dict[str, Any]) -> dict[str, Any] | None:
        """Return a row; None if it has no words. Raises Malformed."""
        given, wanted = (_listed(cells[role], role) for role in ("words", "tags"))
        if len(given) != len(wanted):
            raise Malformed(f"it has {len(given)} words and {len(wanted)} tags; each word needs one")
        for i, word in enumerate(given):
            if not isinstance(word, str) or not word.strip():
                raise Malformed(f"word {i}, counted from 0, is {shown(word)}; write a text, or remove it with its tag")
        return {"words": given, "tags": [_tag(tag, i, names) for i, tag in enumerate(wanted)]} if given else None

    return chats.as_json(rows, {"words": words, "tags": tags}, TAGGED, row, subject, TITLE, parallel=True)


def labels_of(rows: Rows) -> list[str]:
    """Return the tags of the training rows: O first, then by type, B- before I-. Each B- tag has its I- tag beside it.

    Raises Failure if there is only one, or if they are neither BIO nor plain tags. Gives notice of I- tags that
    continue nothing.
    """
    counts = Counter(tag for row in each(rows.data) for tag in row["tags"])
    if len(counts) < 2:
        raise columns.invalid(
            f'{FIELD}: all words of {rows.origin} have the tag "{next(iter(counts))}"; two tags at least are needed'
        )
    if not is_bio(counts):
        return sorted(counts)
    _refuse_other_schemes(rows, counts)
    _tell_broken(rows)
    return [
        *([OUTSIDE] if OUTSIDE in counts else []),
        *(f"{p}-{n}" for n in spans.types_of([*counts]) for p in PREFIXES),
    ]


def check(rows: Rows, labels: Sequence[str]) -> None:
    """Raise Failure if a held-out row has a tag that the training rows do not have."""
    known = set(labels)
    for i, row in enumerate(each(rows.data)):
        if unknown := sorted({*row["tags"]} - known):
            raise columns.invalid(
                f"{FIELD}: {rows.origin} has tags that the training rows do not have: {columns.some(unknown)} (theirs:"
                f" {columns.some(labels)}). The first is {rows.place(i)}"
            )
    if is_bio(labels):
        _tell_broken(rows)


def is_bio(tags: Sequence[str] | Mapping[str, int]) -> bool:
    """Return whether tags describe entities of several words."""
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def each(data: Dataset) -> Iterator[dict[str, list[str]]]:
    """Yield the rows as objects."""
    for batch in data.select_columns([TAGGED]).iter(ROWS_AT_ONCE):
        yield from map(json.loads, batch[TAGGED])


def _listed(value: Any, role: str) -> list[Any]:
    """Return a list; in tables of CSV, that of which the cell is the JSON text. Raises Malformed."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Malformed(
                f"its {role} are the text {shown(value)}, and no list; write a list of texts, in CSV as JSON"
            ) from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(f"its {role} are {shown(value)}, and no list")
    return value


def _tag(value: Any, word: int, names: Sequence[str] | None) -> str:
    """Return a tag as text. `names`: of the classes, if tags are their numbers. Raises Malformed."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise Malformed(f"the tag of word {word}, counted from 0, is {shown(value)}; write a name")
    return value


def _refuse_other_schemes(rows: Rows, counts: Mapping[str, int]) -> None:
    """Raise Failure if a tag is neither O nor B- or I- with a type."""
    allowed = tuple(f"{prefix}-" for prefix in PREFIXES)
    others = sorted(tag for tag in counts if tag != OUTSIDE and not (tag.startswith(allowed) and tag[2:]))
    if not others:
        return
    scheme = ""
    if any(tag[:1] in OTHER_PREFIXES and tag[1:2] == "-" for tag in others):
        scheme = " E- and L- become I-, and S- and U- become B-."
    first = next(i for i, row in enumerate(each(rows.data)) if {*others} & {*row["tags"]})
    raise columns.invalid(
        f"{FIELD}: {rows.origin} has B- or I- tags, and beside them {columns.some(others)}, which are no BIO tags."
        f" Write O, B-TYPE for the first word of an entity and I-TYPE for the others.{scheme} The first is"
        f" {rows.place(first)}"
    )


def _tell_broken(rows: Rows) -> None:
    """Give notice of the rows with an I- tag that continues nothing."""
    found = [(i, word, row) for i, row in enumerate(each(rows.data)) if (word := spans.broken(row["tags"])) is not None]
    if found:
        i, word, row = found[0]
        notice(
            f"{FIELD}: {len(found)} of {len(rows.data)} rows of {rows.origin} have an I- tag that continues no entity"
            f" of its type. It is learnt as it is, and metrics count it as the beginning of an entity. The first is"
            f' {rows.place(i)}: word {word}, "{row["words"][word]}", has {row["tags"][word]}'
        )
