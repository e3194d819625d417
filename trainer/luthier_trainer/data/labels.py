"""The classes of rows: their names, which names are nearly the same, and the id of each row's class.

A label is text, however a file stores it: "007" and "7" are two classes. Labels that differ only in blanks, in capitals
or in how a number is written are reported. They are one class only if the spec asks for it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from luthier_trainer.data import chats, columns
from luthier_trainer.data.columns import invalid, some
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import numpy
    import pyarrow

WHOLE_NUMBER = re.compile(r"-?[0-9]+")  # str.isdigit is also true of ² and ①, which int() refuses
NUMBER = re.compile(r"[-+]?[0-9]+([.][0-9]*)?")
UNLABELLED = -1  # the label of rows in hidden test sets on the Hub
GROUPS_SHOWN = 3
# A column of whole numbers in which values are missing is read as float.
LABEL_TYPES = re.compile(r"string|large_string|bool|u?int\d+|float\d+")
NUMBER_TYPES = re.compile(r"u?int\d+|float\d+")
IGNORED = -100  # of the losses of transformers
ONE_A_ROW = "a label is a name or a whole number, one a row"


def names_of(rows: Rows, column: str, field: str, merge: bool, taken: Collection[str] = ()) -> list[str]:
    """Return the names of the classes of the training rows, in the order of their ids.

    With `merge`, labels that are nearly the same are one class, whose name is the spelling of most of its rows. `taken`
    are columns with other roles. Raises Failure if a label is missing, or if there is only one class.
    """
    columns.require(rows, column, field, taken)
    _check_type(rows, column, field)
    counts: Counter[str] = Counter()
    for _, labels in _batches(rows, column, field):
        counts.update({pair["values"].as_py(): pair["counts"].as_py() for pair in labels.value_counts()})
    own = getattr(rows.data.features[column], "names", None)
    names = list(own) if own is not None else sorted(counts, key=_order)
    near = _near(names)
    if merge:
        names = [name for name in names if name == _kept(near[key(name)], counts)]
    if near_groups := [group for group in near.values() if len(group) > 1]:
        _tell_near(near_groups, counts, merge, field)
    if len({key(name) if merge else name for name in counts}) < 2:
        raise invalid(
            f'{field}: all {len(rows.data)} rows of {rows.origin} have the label "{next(iter(counts))}"; two classes at'
            " least are needed"
        )
    return names


def ids_of(rows: Rows, column: str, field: str, names: list[str], merge: bool) -> numpy.ndarray:
    """Return the id of each row's class, int64 of shape (rows,). Raises Failure for a class that is not in `names`."""
    import numpy

    columns.require(rows, column, field)
    _check_type(rows, column, field)
    ids = {key(name) if merge else name: i for i, name in enumerate(names)}
    found, unknown = [numpy.empty(0, numpy.int64)], dict[str, int]()
    for start, labels in _batches(rows, column, field):
        encoded = labels.combine_chunks().dictionary_encode()
        given = encoded.dictionary.to_pylist()
        indices = encoded.indices.to_numpy()
        classes = numpy.array([ids.get(key(name) if merge else name, UNLABELLED) for name in given], numpy.int64)
        for i in numpy.flatnonzero(classes == UNLABELLED):
            unknown.setdefault(given[i], start + int(numpy.argmax(indices == i)))
        found.append(classes[indices])
    if unknown:
        first = rows.place(min(unknown.values()))
        raise invalid(
            f"{field}: {rows.origin} has labels that the training rows do not have: {some(sorted(unknown))} (theirs:"
            f" {some(names)}). The first is {first}"
        )
    return numpy.concatenate(found)


def names_of_lists(rows: Rows, column: str, field: str) -> list[str]:
    """Return the names of the classes of training rows that have a list of them each.

    Gives notice of rows without a label. Raises Failure if a cell is no list of names, or if no row has a label.
    """
    found = list(_lists(rows, column, field))
    names = {name for row in found for name in row}
    if not names:
        raise invalid(f'{field}: column "{column}" of {rows.origin} has an empty list in all {len(found)} rows')
    if empty := sum(not row for row in found):
        notice(f"{field}: {empty} of {len(found)} rows of {rows.origin} have no label, and teach that none applies")
    return sorted(names, key=_order)


def several_of(rows: Rows, column: str, field: str, names: list[str]) -> numpy.ndarray:
    """Return 1 for each class that a row has and 0 for the others, fp32 [rows, classes].

    Raises Failure for a class that is not in `names`.
    """
    import numpy

    ids = {name: i for i, name in enumerate(names)}
    found = numpy.zeros((len(rows.data), len(names)), numpy.float32)
    for i, row in enumerate(_lists(rows, column, field)):
        for name in row:
            if name not in ids:
                raise invalid(
                    f'{field}: {rows.place(i)} of {rows.origin} has the label "{name}", which no training row has'
                    f" (theirs: {some(names)})"
                )
            found[i, ids[name]] = 1
    return found


def numbers_of(rows: Rows, column: str, field: str) -> numpy.ndarray:
    """Return a column of numbers, fp32 [rows]. Raises Failure if one is missing or not finite."""
    import numpy
    import pyarrow
    import pyarrow.compute

    columns.require(rows, column, field)
    kind = str(getattr(rows.data.features[column], "dtype", rows.data.features[column]))
    if column in rows.mixed or not NUMBER_TYPES.fullmatch(kind):
        first = f". The first of the fewest is {rows.place_of(rows.rarest[column])}" if column in rows.rarest else ""
        raise invalid(
            f'{field}: column "{column}" of {rows.origin} holds {rows.mixed.get(column, kind)}, and'
            f" classification.problem regression needs a number in each row{first}"
        )
    found = [numpy.empty(0, numpy.float32)]
    for start, values in columns.batches(rows, column):
        numbers = values.cast(pyarrow.float64()).to_numpy()
        bad = numpy.flatnonzero(~numpy.isfinite(numbers) | (numbers == IGNORED))
        if len(bad):
            what = (
                "-100, which libraries read as no label; scale the numbers"
                if numbers[bad[0]] == IGNORED
                else ("no finite number; remove the row")
            )
            raise invalid(f'{field}: column "{column}" of {rows.place(start + int(bad[0]))} of {rows.origin} is {what}')
        found.append(numbers.astype(numpy.float32))
    return numpy.concatenate(found)


def _lists(rows: Rows, column: str, field: str) -> Iterator[list[str]]:
    """Yield the names of the classes of each row. Raises Failure if a cell is no list of names."""
    feature = rows.data.features[column]
    own = getattr(getattr(feature, "feature", None), "names", None)
    start = 0
    for batch in rows.data.select_columns([column]).iter(columns.AT_ONCE):
        for i, cell in enumerate(batch[column], start):
            value = _parsed(cell)
            if own is not None and value is not None:
                value = [own[label] for label in value]
            if not isinstance(value, list) or not all(isinstance(name, str | int) for name in value):
                raise invalid(
                    f'{field}: column "{column}" of {rows.place(i)} of {rows.origin} is {chats.shown(cell)}, and'
                    " classification.problem multi-label needs a list of names, in CSV as JSON"
                )
            yield list(dict.fromkeys(str(name) for name in value))
        start += len(batch[column])


def _parsed(cell: Any) -> Any:
    """Return the list of which a cell is the JSON text, as in CSV; an empty cell is an empty list."""
    if cell is None or cell == "":
        return []
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return None


def key(name: str) -> tuple[str, Any]:
    """Return a key that is equal for labels that are nearly the same."""
    text = " ".join(unicodedata.normalize("NFC", name).casefold().split())
    return ("number", Decimal(text)) if NUMBER.fullmatch(text) and text.isascii() else ("text", text)


def _check_type(rows: Rows, column: str, field: str) -> None:
    """Check that a column has a type that labels can have. Raises Failure if not."""
    feature = rows.data.features[column]
    if column in rows.rarest:
        place = rows.place_of(rows.rarest[column])
        raise invalid(
            f'{field}: column "{column}" of {rows.origin} holds {rows.mixed[column]}. The first of the fewest is'
            f" {place}. Write all labels in the same way"
        )
    if column in rows.mixed:
        raise invalid(f'{field}: column "{column}" of {rows.origin} holds {rows.mixed[column]}; {ONE_A_ROW}')
    if getattr(feature, "names", None) is None and not LABEL_TYPES.fullmatch(str(getattr(feature, "dtype", ""))):
        raise invalid(f'{field}: column "{column}" of {rows.origin} holds {feature}; {ONE_A_ROW}')


def _batches(rows: Rows, column: str, field: str) -> Iterator[tuple[int, pyarrow.ChunkedArray]]:
    """Yield (number of rows before, names of classes) for batches of a column.

    Raises Failure, after the last batch, if rows have no label.
    """
    import pyarrow.compute

    own = getattr(rows.data.features[column], "names", None)
    missing: list[int] = []
    for start, values in columns.batches(rows, column):
        if own is not None:
            values = pyarrow.compute.if_else(pyarrow.compute.equal(values, UNLABELLED), None, values)
            names = pyarrow.chunked_array([pyarrow.array(own).take(chunk) for chunk in values.chunks], pyarrow.string())
        else:
            names = _as_text(rows, values, start, column, field)
        blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(names), "").fill_null(True)
        missing += [start + i for i in pyarrow.compute.indices_nonzero(blank).to_pylist()]
        # Once a label is missing, the rest is only searched for others, to give their number in the message.
        if not missing:
            yield start, names
    if missing:
        raise invalid(
            f'{field}: column "{column}" of {rows.origin} has no label in {len(missing)} rows. The first is'
            f" {rows.place(missing[0])}. Remove them"
        )


def _as_text(rows: Rows, values: pyarrow.ChunkedArray, start: int, column: str, field: str) -> pyarrow.ChunkedArray:
    """Return values as names of classes: true is "true", and 1, or 1.0 in a column of floats, is "1".

    Raises Failure for a number with a fraction. `start` is the number of rows before the batch.
    """
    import pyarrow.compute

    if pyarrow.types.is_floating(values.type):
        values = pyarrow.compute.if_else(pyarrow.compute.is_nan(values), None, values)
        fractions = pyarrow.compute.indices_nonzero(
            pyarrow.compute.not_equal(values, pyarrow.compute.floor(values)).fill_null(False)
        )
        if len(fractions):
            first = fractions[0].as_py()
            raise invalid(
                f'{field}: column "{column}" of {rows.origin} holds {values[first].as_py()}; a label is a name or a'
                f" whole number. The first is {rows.place(start + first)}"
            )
        values = values.cast(pyarrow.int64())
    return values.cast(pyarrow.string())


def _order(name: str) -> tuple[int, int, str]:
    """Return a key that sorts whole numbers by value, and before all other names."""
    return (0, int(name), name) if WHOLE_NUMBER.fullmatch(name) else (1, 0, name)


def _near(names: Collection[str]) -> dict[Any, list[str]]:
    """Return key → the names that have it."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def _kept(group: list[str], counts: Counter[str]) -> str:
    """Return the spelling that most rows have."""
    return max(group, key=lambda name: counts[name])


def _tell_near(groups: list[list[str]], counts: Counter[str], merge: bool, field: str) -> None:
    """Give notice of the names that are nearly the same."""
    shown = "; ".join(
        " and ".join(f'"{name}" ({counts[name]} rows)' for name in group) for group in groups[:GROUPS_SHOWN]
    )
    more = f"; and {len(groups) - GROUPS_SHOWN} more such groups" if len(groups) > GROUPS_SHOWN else ""
    dataset = field.partition(".columns.")[0]
    what = f"{shown}{more} differ only in blanks, in capitals or in how a number is written"
    if merge:
        kept = some(f'"{_kept(group, counts)}"' for group in groups)
        notice(f"{dataset}.mergeLabels: {what}, and are one class each: {kept}")
    else:
        notice(
            f"{field}: {what}, and are classes of their own. To make one class of them, set {dataset}.mergeLabels: true"
        )
