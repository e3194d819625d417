"""Checks that the columns of a dataset exist and hold what their role requires: text, or labels.

Columns are read as Arrow arrays, in batches, because a list of Python objects for each row would take more memory than
the texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.data import advice
from luthier_trainer.data.filerows import TEXT_TYPES
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.failure import Failure, NothingLeft
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 10_000  # rows of a batch
SHOWN = 10  # names in a message
BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # how cells write them


def require(rows: Rows, column: str, field: str, taken: Collection[str] = ()) -> None:
    """Check that `rows` have the column. Raises Failure if not, with what to do about it.

    `field` is the path in the spec that names the column. Columns in `taken` have another role and are not suggested.
    """
    names = rows.names or tuple(rows.data.column_names)
    if column in names:
        return
    hint = advice.missing(rows, column, field.rpartition(".")[2], taken)
    raise invalid(f'{field}: no column "{column}" in {rows.origin} (columns: {", ".join(names)}). {hint}')


def require_text(rows: Rows, column: str, field: str) -> None:
    """Check that the column exists and holds text. Raises Failure if not."""
    require(rows, column, field)
    feature = rows.data.features[column]
    if column in rows.mixed:
        kind: Any = rows.mixed[column]
    elif is_text(feature):
        return
    else:
        kind = (
            getattr(feature, "dtype", None)
            if type(feature).__name__ in ("Value", "ClassLabel")
            else type(feature).__name__
        )
    texts = [name for name in rows.texts if name != column]
    hint = f"columns of text: {', '.join(texts)}" if texts else "no column holds text"
    if column in rows.rarest:
        hint = f"the first of the fewest is {rows.place_of(rows.rarest[column])}"
    raise invalid(
        f'{field}: column "{column}" of {rows.origin} holds {kind}, not text ({hint})'
        + (f". {rows.hint}" if rows.hint else "")
    )


def is_text(feature: Any) -> bool:
    """Return whether a feature of `datasets` is text."""
    return getattr(feature, "dtype", None) in TEXT_TYPES


def batches(rows: Rows, column: str) -> Iterator[tuple[int, pyarrow.ChunkedArray]]:
    """Yield (number of rows before, values) for batches of a column."""
    start = 0
    for table in rows.data.select_columns([column]).with_format("arrow").iter(AT_ONCE):
        yield start, table.column(0)
        start += len(table)


def blanks(rows: Rows, column: str) -> list[int]:
    """Return the positions of the rows whose text is missing or blank."""
    import pyarrow.compute

    found: list[int] = []
    for start, texts in batches(rows, column):
        blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(texts), "").fill_null(True)
        found += [start + i for i in pyarrow.compute.indices_nonzero(blank).to_pylist()]
    return found


def texts(rows: Rows, column: str, field: str, drop_blank: bool) -> Rows:
    """Return the rows that have a text in `column`.

    Rows without text are dropped, with a notice, or refused if `drop_blank` is false. Raises Failure if a row is
    refused, or if no row is left.
    """
    import numpy

    require_text(rows, column, field)
    empty = [] if rows.documents else blanks(rows, column)
    if len(empty) == len(rows.data):
        raise nothing_left(f'{field}: column "{column}" of {rows.origin} is blank in all {len(empty)} rows')
    if not empty:
        return rows
    found = f"blank in {len(empty)} of {len(rows.data)} rows"
    if not drop_blank:
        raise invalid(
            f'{field}: column "{column}" of {rows.origin} is {found}. The first is {rows.place(empty[0])}. Remove them'
        )
    notice(
        f'{field}: column "{column}" of {rows.origin} is {found}, which are left out. The first is'
        f" {rows.place(empty[0])}"
    )
    return rows.select(numpy.delete(numpy.arange(len(rows.data)), empty))


def some(names: Iterable[str]) -> str:
    """Return the first names, for a message."""
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def invalid(message: str) -> Failure:
    """Return a Failure of the kind INVALID_DATASET."""
    return Failure(ExitCode.INVALID_DATASET, message)


def nothing_left(message: str) -> NothingLeft:
    """Return the same for rows of which none is left."""
    return NothingLeft(ExitCode.INVALID_DATASET, message)
