"""Chooses the rows that are used: by the values of columns, by length, and of equal rows one.

What is left out is counted by its reason, and is given notice of. If no row is left, the message says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.rows import ColumnFilter, RowFilter
from luthier_trainer.data import columns, repeats
from luthier_trainer.data.load import Rows
from luthier_trainer.data.mixing import Joined
from luthier_trainer.runtime.failure import Failure, NothingLeft
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import numpy
    import pyarrow

FILTER = "spec.dataset.filter"
DEDUPLICATE = "spec.dataset.deduplicate"
SHOWN = 3  # values in a message
SHOWN_CHARACTERS = 40  # of a cell
Contents = Callable[[Rows], Iterator[Sequence[str | bytes]]]
"""Yields what is compared of each row, in batches (`Task.contents`)."""


@dataclass
class Selection:
    """Leaves out rows of one split, and counts them."""

    use: str
    """training or held-out, for messages."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Field of `spec.dataset` → rows that it left out."""

    def by_columns(self, rows: Rows, filters: Sequence[ColumnFilter], needed: Sequence[str]) -> Rows:
        """Return the rows whose cells are what the filters ask for, without the columns that are not `needed`.

        Raises Failure if there is no such column, if a cell is no number where one is asked for, or if no row is left.
        """
        for i, wanted in enumerate(filters):
            path = f"{FILTER}.columns[{i}]"
            columns.require(rows, wanted.column, f"{path}.column")
            found = _cells_kept(rows, wanted, path)
            rows = self._kept(rows, found, path, f'column "{wanted.column}" {_asked(wanted)}')
        unused = {wanted.column for wanted in filters} - set(needed)
        return replace(rows, data=rows.data.remove_columns(sorted(unused))) if unused else rows

    def by_characters(self, rows: Rows, wanted: RowFilter, contents: Contents) -> Rows:
        """Return the rows whose texts have as many characters as are asked for. Raises Failure if no row is left."""
        import numpy

        least, most = wanted.min_characters, wanted.max_characters
        if least is None and most is None:
            return rows
        lengths = numpy.array([_characters(content) for batch in contents(rows) for content in batch])
        if least is not None:
            long_enough = lengths >= least
            rows = self._kept(rows, long_enough, f"{FILTER}.minCharacters", f"it has {least} characters or more")
            lengths = lengths[long_enough]
        if most is not None:
            rows = self._kept(rows, lengths <= most, f"{FILTER}.maxCharacters", f"it has {most} characters at most")
        return rows

    def without_repeats(self, joined: Joined, kept: numpy.ndarray, what: str) -> Joined:
        """Return the rows that are no repeats. `kept`: bool of shape (rows,)."""
        import numpy

        self._count(joined.rows, kept, DEDUPLICATE, what)
        return joined.select(numpy.flatnonzero(kept)) if not kept.all() else joined

    def _kept(self, rows: Rows, kept: numpy.ndarray, path: str, what: str) -> Rows:
        """Return the rows of which `kept`, bool of shape (rows,), is true, and count the others."""
        import numpy

        self._count(rows, kept, path, what)
        return rows if kept.all() else rows.select(numpy.flatnonzero(kept))

    def _count(self, rows: Rows, kept: numpy.ndarray, path: str, what: str) -> None:
        """Count the rows of which `kept` is false, and give notice of them. `what` is true of the others.

        Raises Failure if there are no others.
        """
        import numpy

        lost = numpy.flatnonzero(~kept)
        if not len(lost):
            return
        if len(lost) == len(kept):
            self._add(path, len(lost))
            raise NothingLeft(
                ExitCode.INVALID_DATASET,
                f"{path}: none of the {len(kept)} {self.use} rows of {rows.origin} that were left is kept. A row is"
                f" kept if {what}",
            )
        self._add(path, len(lost))
        notice(
            f"{path}: {len(lost)} of {len(kept)} {self.use} rows of {rows.origin} are left out. A row is kept if"
            f" {what}. The first that is left out is {rows.place(int(lost[0]))}"
        )

    def _add(self, path: str, rows: int) -> None:
        name = path.removeprefix("spec.dataset.")
        self.left_out[name] = self.left_out.get(name, 0) + rows


def deduplicated(
    train: Joined, held_out: Joined | None, selections: dict[str, Selection], contents: Contents
) -> tuple[Joined, Joined | None]:
    """Return the rows without those that are equal to an earlier row of their split, or to a held-out row."""
    import numpy

    parts = [train.rows] + ([held_out.rows] if held_out else [])
    groups = repeats.groups_of(*(contents(part) for part in parts))
    learnt, measured = groups[: len(train.rows.data)], groups[len(train.rows.data) :]
    if held_out:
        apart = ~numpy.isin(learnt, measured)
        train = selections["train"].without_repeats(train, apart, "no held-out row is equal to it")
        learnt = learnt[apart]
        held_out = selections["eval"].without_repeats(held_out, _firsts(measured), "no earlier row is equal to it")
    return selections["train"].without_repeats(train, _firsts(learnt), "no earlier row is equal to it"), held_out


def _firsts(groups: numpy.ndarray) -> numpy.ndarray:
    """Return which rows are the first of their group, bool of the same shape."""
    import numpy

    first = numpy.zeros(len(groups), dtype=bool)
    first[numpy.unique(groups, return_index=True)[1]] = True
    return first


def _characters(content: str | bytes) -> int:
    """Return the length of a row's texts. Raises Failure if it has none."""
    if isinstance(content, bytes):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FILTER}: rows of images or audio have no characters; remove minCharacters and maxCharacters",
        )
    return len(content)


def _cells_kept(rows: Rows, wanted: ColumnFilter, path: str) -> numpy.ndarray:
    """Return for each row whether its cell is what is asked for, bool of shape (rows,). Raises Failure."""
    import numpy
    import pyarrow.compute

    found = [numpy.empty(0, dtype=bool)]
    names = getattr(rows.data.features[wanted.column], "names", None)
    for start, cells in columns.batches(rows, wanted.column):
        texts = _as_texts(cells, names)
        kept = pyarrow.compute.is_valid(texts)
        if wanted.values is not None:
            values = pyarrow.array(wanted.values, type=pyarrow.string())
            kept = pyarrow.compute.and_(kept, pyarrow.compute.is_in(texts, value_set=values))
        if wanted.matches is not None:
            kept = pyarrow.compute.and_(kept, _matching(texts, wanted.matches, f"{path}.matches").fill_null(False))
        mask = kept.to_numpy(zero_copy_only=False)
        if wanted.min is not None or wanted.max is not None:
            mask &= _within(texts.to_pylist(), wanted, rows, start, path)
        found.append(mask)
    return numpy.concatenate(found)


def _matching(texts: pyarrow.Array, pattern: str, path: str) -> pyarrow.Array:
    """Return which texts match a regular expression somewhere. Raises Failure if it is none."""
    import pyarrow.compute

    try:
        return pyarrow.compute.match_substring_regex(texts, pattern)
    except pyarrow.ArrowInvalid as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{path}: {pattern!r} is no regular expression of RE2: {error}") from None


def _within(texts: list[str | None], wanted: ColumnFilter, rows: Rows, start: int, path: str) -> list[bool]:
    """Return which cells are numbers within the limits. `start`: the position of the first one.

    Raises Failure if a cell holds something else than a number.
    """
    found = []
    for i, text in enumerate(texts):
        try:
            number = float(text) if text and text.strip() else None
        except ValueError:
            shown = str(text)[:SHOWN_CHARACTERS]
            raise columns.invalid(
                f'{path}: column "{wanted.column}" of {rows.origin} holds {shown!r} in {rows.place(start + i)},'
                " which is no number. Remove min and max, or such rows, for example with matches in an earlier filter"
            ) from None
        found.append(
            number is not None
            and (wanted.min is None or number >= wanted.min)
            and (wanted.max is None or number <= wanted.max)
        )
    return found


def _as_texts(cells: pyarrow.ChunkedArray, names: Sequence[str] | None) -> pyarrow.Array:
    """Return cells as text: numbers and truth as JSON writes them, lists and objects as JSON.

    `names`: of the classes, if the cells are numbers of classes.
    """
    import pyarrow

    array = cells.combine_chunks()
    if pyarrow.types.is_string(array.type) or pyarrow.types.is_large_string(array.type):
        return array.cast(pyarrow.string())
    return pyarrow.array([_as_text(value, names) for value in array.to_pylist()], type=pyarrow.string())


def _as_text(value: Any, names: Sequence[str] | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if names is not None:
        number = int(value)
        return names[number] if number >= 0 else None  # -1: no class
    return json.dumps(value, ensure_ascii=False, default=str)


def _asked(wanted: ColumnFilter) -> str:
    """Return what a filter asks of a cell, for a message."""
    parts = []
    if wanted.values is not None:
        shown = ", ".join(map(repr, wanted.values[:SHOWN])) + (", ..." if len(wanted.values) > SHOWN else "")
        parts.append(f"is {shown}" if len(wanted.values) == 1 else f"is one of {shown}")
    if wanted.matches is not None:
        parts.append(f"matches {wanted.matches}")
    if wanted.min is not None:
        parts.append(f"is {wanted.min:g} or more")
    if wanted.max is not None:
        parts.append(f"is {wanted.max:g} or less")
    return " and ".join(parts)
