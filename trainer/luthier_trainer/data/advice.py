"""What to do about rows that lack a column: by the names of the columns that they have, and by their shape."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier_trainer.data.load import Rows

SIMILAR = 0.65  # of two names, by difflib: refused is like rejected (0.67), but messages is not like image (0.62)
QUESTIONS = ("question", "query", "instruction", "input", "user", "human", "prompt")
ANSWERS = ("answer", "response", "output", "assistant", "target", "reply", "completion", "solution")
"""Usual names of columns that hold prompts, and of those that hold completions."""
SHOWN = 5  # columns in a suggestion


@dataclass(frozen=True)
class Shape:
    """Rows that are known by the names of their columns."""

    columns: frozenset[str]
    title: str
    tasks: str
    alone: bool = False
    """Whether there is no other column."""

    @property
    def place(self) -> str:
        """Where such rows belong, as a sentence."""
        return f"Rows with {self.title} belong to task: {self.tasks}"


PAIRS = Shape(frozenset({"chosen", "rejected"}), "a chosen and a rejected answer", "preference, or reward")
SHAPES = (
    PAIRS,
    Shape(
        frozenset({"prompt", "completion", "label"}),
        "answers that are good or bad",
        "preference, with spec.preference.lossType: kto",
    ),
    Shape(frozenset({"messages"}), "conversations", "causal-lm"),
    Shape(frozenset({"conversations"}), "conversations", "causal-lm"),
    Shape(frozenset({"prompt", "completion"}), "prompts and completions", "causal-lm"),
    Shape(frozenset({"instruction", "output"}), "instructions and answers", "causal-lm"),
    Shape(frozenset({"text", "label"}), "texts and labels", "text-classification"),
    Shape(frozenset({"source", "target"}), "source and target texts", "seq2seq"),
    Shape(frozenset({"question", "context", "answers"}), "questions, contexts and answers", "question-answering"),
    Shape(frozenset({"words", "tags"}), "words and tags", "token-classification"),
    Shape(frozenset({"tokens", "ner_tags"}), "words and tags", "token-classification"),
    Shape(frozenset({"anchor", "positive"}), "texts that belong together", "embedding"),
    Shape(frozenset({"text"}), "nothing but texts", "causal-lm", alone=True),
)
OF_TASKS = frozenset({"chosen", "rejected", "label", "text", "image", "audio"})
"""Roles without which rows are of another task. Prompts, for example, can come from any column."""
USUAL = OF_TASKS | {"prompt", "completion", "messages"}
"""Columns that have their role by their name."""
OF_ONE_COLUMN = ("text", "prompt", "image")
"""Roles that the only column of a file can have. Others stand beside one."""


def missing(rows: Rows, column: str, role: str, taken: Collection[str]) -> str:
    """Return what to do about rows without `column`, which was to have `role`; `taken` are columns of other roles."""
    names = rows.names or tuple(rows.data.column_names)
    free = [name for name in names if name not in taken]
    if near := difflib.get_close_matches(column, free, 1, cutoff=SIMILAR):
        return f'Did you mean "{near[0]}"?'
    if rows.hint:
        return rows.hint
    if role in OF_TASKS and (shape := _shape(names, role)):
        return shape.place
    rest = [name for name in free if name == role or role not in OF_TASKS or name not in USUAL]
    holding = {"text": rows.texts, "prompt": rows.texts, "image": rows.images}.get(role, names)
    if len(rest) == 1 and rest[0] in holding and (len(names) > 1 or role in OF_ONE_COLUMN):
        return f'Did you mean "{rest[0]}"?'
    if role == "audio":
        return "Name the one that holds audio files, or their paths"
    if role == "image":
        return "Name the one that holds images; a folder of them is read with dataset.format: imagefolder"
    return f"Name the one that plays this role{header(rows)}"


def _shape(names: Collection[str], role: str) -> Shape | None:
    """Return what rows of these columns are; None if nothing is known, or if rows of that shape have `role`, too."""
    for shape in SHAPES:
        fits = shape.columns == set(names) if shape.alone else shape.columns <= set(names)
        if fits and role not in shape.columns:
            return shape
    return None


def header(rows: Rows) -> str:
    """Return how the columns got their names, as the end of a sentence; empty where the file itself names them."""
    tables = any(origin.path.lower().rstrip("/").endswith((".csv", ".tsv")) for origin in rows.origins)
    return ". The first line of a table is read as the names of its columns" if tables else ""


def unknown_form(rows: Rows, names: tuple[str, ...], columns: str) -> str | None:
    """Return what to do about rows of `names` that have no form; None if their names and types tell nothing.

    `columns` is the field that names columns.
    """
    texts = [name for name in rows.texts if name in names]
    lists = [name for name in rows.lists if name in names]
    asked, answered = (next((name for name in texts if name.lower() in usual), None) for usual in (QUESTIONS, ANSWERS))
    if PAIRS.columns <= set(names):
        return PAIRS.place
    if lists and len(rows.data) == 1 and len(rows.parts) == 1:
        return f"The file holds one object. If its rows are in {lists[0]}, write that list alone into the file"
    if lists:
        return f"If {lists[0]} holds conversations, set {columns}.messages: {lists[0]}"
    if "input_ids" in names:
        return "Rows of tokens are not read, because prepare makes them by the tokenizer of the model: give the texts"
    if asked and answered:
        return (
            f"If they are prompts and completions, set {columns}.prompt: {asked} and {columns}.completion: {answered}"
        )
    if len(texts) == 1:
        return f"To learn its texts, set {columns}.text: {texts[0]}"
    if texts:
        some = ", ".join(texts[:SHOWN])
        return (
            f"To learn the texts of one of them, set {columns}.text to it: {some}. To learn one as the answer to"
            f" another, set {columns}.prompt and {columns}.completion{header(rows)}"
        )
    return None


def of_objects(head: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with a JSON file whose first rows are `head`; empty if they may be rows."""
    names = set(head[0]) if head else set()
    for role, text in (("role", "content"), ("from", "value")):
        if {role, text} <= names and "text" not in names:
            return (
                f"Each row is a single message ({role}, {text}), and a row is to be a whole conversation: write one"
                ' {"messages": [...]} a line'
            )
    values = list(head[0].values()) if len(head) == 1 else []
    if values and all(isinstance(value, dict) for value in values):
        what = "object" if len(values) == 1 else "objects"
        return f"The file holds one object, with {len(values)} {what} in it. Write one object of texts for each row"
    if values and all(isinstance(value, list) and not _objects(value) for value in values):
        return (
            "The file holds one object, with a list for each column. Write one object for each row; pandas does so with"
            ' to_json(orient="records", lines=True)'
        )
    return ""


def lists_of_objects(head: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the columns of `head`, the first rows of a JSON file, that hold lists of objects, as conversations are."""
    names = dict.fromkeys(name for row in head for name in row)
    cells = {name: [row[name] for row in head if row.get(name) is not None] for name in names}
    return tuple(
        name
        for name, values in cells.items()
        if values and all(isinstance(value, list) for value in values) and any(_objects(value) for value in values)
    )


def _objects(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value)
