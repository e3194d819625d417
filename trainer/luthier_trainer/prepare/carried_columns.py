"""Columns of the inputs that generation does not use, copied to the lines of the outputs.

With them a user can match outputs and inputs. Lines are JSON, so only what JSON can represent is copied: text, numbers,
booleans, and lists and objects of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from luthier_trainer.data import columns as roles
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.notices import notice

LARGE = 10_000  # average characters per row above which a notice is given


def columns(rows: Rows, wanted: Sequence[str] | None, taken: Sequence[str], field: str) -> dict[str, Any]:
    """Return column → its feature, for the columns to copy: those in `wanted`, or if that is None all not in `taken`.

    `taken`: columns that have a role. Raises Failure if a wanted column is missing or JSON cannot represent it. If
    `wanted` is None, such columns are left out with a notice.
    """
    for name in wanted or ():
        roles.require(rows, name, field, taken)
    chosen = [name for name in rows.data.column_names if name not in taken] if wanted is None else list(wanted)
    features = {name: rows.data.features[name] for name in chosen}
    unfit = [name for name, feature in features.items() if not fits(feature)]
    if unfit and wanted is not None:
        raise roles.invalid(
            f'{field}: column "{unfit[0]}" of {rows.origin} holds {features[unfit[0]]}, which a line of JSON cannot'
            " hold. Remove it"
        )
    if unfit:
        notice(
            f"{field}: the columns {', '.join(unfit)} of {rows.origin} are not carried into the outputs: a line of JSON"
            " cannot hold them"
        )
    carried = {name: feature for name, feature in features.items() if name not in unfit}
    if wanted is None and carried:
        first = rows.data.select_columns(list(carried))[:1000]
        size = sum(len(str(cell)) for cells in first.values() for cell in cells) / min(1000, len(rows.data))
        if size > LARGE:
            notice(
                f"{field}: the columns {', '.join(carried)} of {rows.origin} hold about {size:,.0f} characters a row,"
                " and every output repeats them. Name those that you need; [] carries none"
            )
    return carried


def reader(rows: Rows, column: str, field: str) -> Callable[[Any], Any]:
    """Return the function that makes a cell of a column a value of JSON. Raises Failure if JSON cannot represent it."""
    feature = rows.data.features[column]
    if not fits(feature):
        raise roles.invalid(
            f'{field}: column "{column}" of {rows.origin} holds {feature}, which a line of JSON cannot hold'
        )
    if column in rows.mixed:  # values of several kinds, lists and objects are JSON text
        return lambda value: None if value is None else json.loads(value)
    return lambda value: plain(value, feature)


def lines(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield, for each row of text files, its line number from 1 and, if there are several files, the name of its file.

    Row and line number can differ, because blank lines are left out. For other data nothing is yielded.
    """
    if not rows.parts or any(part.lines is None for part in rows.parts):
        return
    several = len(rows.parts) > 1
    places = [
        {"line": line, **({"file": part.path.name} if several else {})}
        for part in rows.parts
        if part.lines is not None
        for line in part.lines()
    ]
    numbers: Any = range(len(rows.data)) if rows.numbers is None else rows.numbers
    yield from (places[int(number)] for number in numbers)


def fits(feature: Any) -> bool:
    """Return whether JSON can represent the values of a feature of `datasets`."""
    if isinstance(feature, dict):
        return all(fits(inner) for inner in feature.values())
    if isinstance(feature, list):
        return all(fits(inner) for inner in feature)
    kind = type(feature).__name__
    if kind in ("List", "LargeList", "Sequence"):
        return fits(feature.feature)
    return kind == "ClassLabel" or (kind == "Value" and "binary" not in feature.dtype)


def plain(value: Any, feature: Any) -> Any:
    """Return a cell as a value of JSON.

    Classes become their names; dates, decimals and all values of uint64 columns become text; NaN and infinity become
    null.
    """
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: plain(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [plain(item, feature[0]) for item in value]
    kind = type(feature).__name__
    if kind in ("List", "LargeList", "Sequence"):
        if isinstance(value, dict):  # `datasets` converts a list of objects to an object of lists
            return {name: [plain(item, feature.feature[name]) for item in items] for name, items in value.items()}
        return [plain(item, feature.feature) for item in value]
    if kind == "ClassLabel":
        return feature.int2str(value) if value >= 0 else None
    # Readers infer the type of a column from its first lines. A later value of more than 63 bits would not fit it.
    if feature.dtype == "uint64":
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
