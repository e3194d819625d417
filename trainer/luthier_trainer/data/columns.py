"""Which columns play which role, and whether what is in them fits: text is text, and a label is there, known, and one of several."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.data.load import Rows
from luthier_trainer.ending import Failure

if TYPE_CHECKING:
    from datasets import Dataset

WHOLE_NUMBER = re.compile(r"-?[0-9]+")  # str.isdigit is also true of ² and ①, which int() refuses
UNLABELLED = -1  # how Hub datasets mark the rows of a hidden test set
SHOWN = 10
LABEL_TYPES = re.compile(r"string|large_string|bool|u?int\d+|float\d+")  # a column of whole numbers with a gap reads as float


def require(rows: Rows, column: str, field: str, taken: Collection[str] = ()) -> None:
    """Raises Failure when there is no `column`. Columns in `taken` play another role and are not suggested."""
    columns = list(rows.data.column_names)
    if column in columns:
        return
    free = [c for c in columns if c not in taken]
    near = difflib.get_close_matches(column, free, 1) or (free if len(free) == 1 else [])
    hint = f'Did you mean "{near[0]}"?' if near else "Name the one that plays this role"
    raise invalid(f'{field}: no column "{column}" in {rows.origin} (columns: {", ".join(columns)}). {hint}')


def require_text(rows: Rows, column: str, field: str) -> None:
    """Raises Failure when `column` is missing or does not hold text."""
    require(rows, column, field)
    feature = rows.data.features[column]
    if not is_text(feature):
        kind = getattr(feature, "dtype", None) if type(feature).__name__ in ("Value", "ClassLabel") else type(feature).__name__
        texts = [name for name, other in rows.data.features.items() if is_text(other)]
        hint = f"columns of text: {', '.join(texts)}" if texts else "no column holds text"
        raise invalid(f'{field}: column "{column}" of {rows.origin} holds {kind}, not text ({hint})')


def is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def blanks(data: Dataset, column: str) -> list[int]:
    """Numbers of the rows whose text is missing or blank."""
    found = []
    for start in range(0, len(data), 10_000):
        texts = data[start : start + 10_000][column]
        found += [start + i for i, text in enumerate(texts) if text is None or not str(text).strip()]
    return found


def texts(rows: Rows, column: str, field: str, drop_blank: bool) -> Dataset:
    """The rows that have a text in `column`. Blank ones are dropped, with a word in the log, or refused."""
    require_text(rows, column, field)
    empty = [] if rows.documents else blanks(rows.data, column)
    if len(empty) == len(rows.data):
        raise invalid(f'{field}: column "{column}" of {rows.origin} is blank in all {len(empty)} rows')
    if not empty:
        return rows.data
    if not drop_blank:
        raise invalid(f'{field}: column "{column}" of {rows.origin} is blank in {len(empty)} rows (the first: row {empty[0]}). Remove them')
    print(f"{field}: {len(empty)} rows of {rows.origin} are blank and left out (the first: row {empty[0]})", flush=True)
    gone = set(empty)
    return rows.data.select([i for i in range(len(rows.data)) if i not in gone])


def labels_of(rows: Rows, column: str, field: str, taken: Collection[str] = ()) -> list[str]:
    """Names of the classes of the training rows, in the order of their ids. Raises Failure when a label is missing, or there is only one."""
    require(rows, column, field, taken)
    feature = rows.data.features[column]
    names = getattr(feature, "names", None)
    if names is None and not LABEL_TYPES.fullmatch(str(getattr(feature, "dtype", ""))):
        raise invalid(f'{field}: column "{column}" of {rows.origin} holds {feature}; a label is a name or a whole number, one a row')
    values = rows.data[column]
    _refuse_missing(values, rows, column, field)
    if names is not None:
        seen = {names[v] for v in values}
    else:
        if fractions := [v for v in values if isinstance(v, float) and not v.is_integer()]:
            raise invalid(f'{field}: column "{column}" of {rows.origin} holds {fractions[0]}; a label is a name or a whole number')
        seen = {_name(v) for v in values}
        names = sorted(seen, key=lambda n: (0, int(n), n) if WHOLE_NUMBER.fullmatch(n) else (1, 0, n))
    if len(seen) < 2:
        raise invalid(f'{field}: all {len(rows.data)} rows of {rows.origin} have the label "{next(iter(seen))}"; two classes at least are needed')
    return list(names)


def label_ids(rows: Rows, column: str, field: str, labels: list[str]) -> list[int]:
    """The class of each row, by id. Raises Failure on a class that the training rows do not have."""
    require(rows, column, field)
    values = list(rows.data[column])
    _refuse_missing(values, rows, column, field)
    own = getattr(rows.data.features[column], "names", None)
    ids = {name: i for i, name in enumerate(labels)}
    given = [own[v] if own is not None else _name(v) for v in values]
    if unknown := sorted(set(given) - ids.keys()):
        raise invalid(
            f'{field}: {rows.origin} has labels that the training rows do not have: {_some(unknown)} (theirs: {_some(labels)})'
        )
    return [ids[name] for name in given]


def _refuse_missing(values: Iterable[Any], rows: Rows, column: str, field: str) -> None:
    numbered = getattr(rows.data.features[column], "names", None) is not None
    missing = [i for i, v in enumerate(values) if v is None or v == "" or (numbered and v == UNLABELLED)]
    if missing:
        raise invalid(f'{field}: column "{column}" of {rows.origin} has no label in {len(missing)} rows (the first: row {missing[0]}). Remove them')


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) else str(value)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def invalid(message: str) -> Failure:
    return Failure(ExitCode.INVALID_DATASET, message)
