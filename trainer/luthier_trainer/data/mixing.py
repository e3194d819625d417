"""Joins the rows of several sources, and draws the rows of an epoch from them by weights (`dataset.mix`).

An epoch is drawn once, in `prepare`, by `interleave_datasets` and the seed of the training. A run that resumes goes on
in the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.rows import Mix
from luthier_trainer.data.chats import CHAT
from luthier_trainer.data.columns import invalid
from luthier_trainer.data.filerows import Part
from luthier_trainer.data.forms import Form
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import numpy

SOURCES = "spec.dataset.mix.sources"


@dataclass(frozen=True)
class Joined:
    """The rows of several sources, one source after the other."""

    rows: Rows
    sources: numpy.ndarray
    """int64 of shape (rows,): the number of the source of each row."""

    def select(self, indices: numpy.ndarray) -> Joined:
        """Return the rows at these positions, an int64 array."""
        return Joined(self.rows.select(indices), self.sources[indices])


def renamed(rows: Rows, names: Mapping[str, str]) -> Rows:
    """Return the rows with other names of columns."""
    if not names:
        return rows
    there = {old: new for old, new in names.items() if old in rows.data.column_names}
    hidden = set(names.values()) - set(names)

    def new(columns: Sequence[str]) -> tuple[str, ...]:
        return tuple(names.get(column, column) for column in columns if column not in hidden)

    return replace(
        rows,
        data=rows.data.rename_columns(there),
        names=new(rows.names),
        texts=new(rows.texts),
        images=new(rows.images),
        lists=new(rows.lists),
        mixed={names.get(column, column): what for column, what in rows.mixed.items()},
        rarest={names.get(column, column): row for column, row in rows.rarest.items()},
    )


def join(parts: Mapping[int, Rows]) -> Joined:
    """Return the rows of several sources, by their number. Raises Failure if their columns do not fit each other."""
    import numpy
    from datasets import concatenate_datasets

    sources = numpy.repeat([*parts], [len(rows.data) for rows in parts.values()])
    if len(parts) == 1:
        return Joined(parts[next(iter(parts))], sources)
    first = next(iter(parts))
    for number, rows in parts.items():
        _check_fit(rows, parts[first], f"{SOURCES}[{number}]")
    begins, files = list[int](), list[Part]()
    for rows in parts.values():
        begins.append(sum(part.rows for part in files))
        files += rows.parts or [Part(Path(rows.origin), _size(rows))]
    numbers = [_numbers(rows) + begin for rows, begin in zip(parts.values(), begins, strict=True)]
    rows = replace(
        parts[first],
        data=concatenate_datasets([rows.data for rows in parts.values()]),
        origin=" and ".join(rows.origin for rows in parts.values()),
        revision=None,
        origins=tuple(origin for rows in parts.values() for origin in rows.origins),
        parts=tuple(files),
        numbers=numpy.concatenate(numbers),
        form=_common_form([rows.form for rows in parts.values() if rows.form is not None]),
    )
    return Joined(rows, sources)


def drawn(joined: Joined, mix: Mix, seed: int) -> Joined:
    """Return the rows of an epoch, and give notice of how many are from each source. Without weights, all are.

    Raises Failure if a source has no rows.
    """
    import numpy
    from datasets import Dataset, interleave_datasets

    weights = [source.weight for source in mix.sources]
    of_sources = [numpy.flatnonzero(joined.sources == number) for number in range(len(weights))]
    for number, positions in enumerate(of_sources):
        if not len(positions):
            raise invalid(f"{SOURCES}[{number}]: none of its rows is left to learn from. Remove it, or hold out fewer")
    chosen = joined
    if all(weight is not None for weight in weights):
        total = sum(weight or 0 for weight in weights)
        order = interleave_datasets(
            [Dataset.from_dict({"position": positions}) for positions in of_sources],
            probabilities=[(weight or 0) / total for weight in weights],
            seed=seed,
            stopping_strategy=mix.stopping_strategy,
        )
        chosen = joined.select(numpy.array(order["position"][:], dtype=numpy.int64))
    for number, positions in enumerate(of_sources):
        rows = int((chosen.sources == number).sum())
        distinct = len(numpy.unique(_numbers(chosen.rows)[chosen.sources == number]))
        share = f"{rows / len(chosen.sources):.1%}"
        lost, again = len(positions) - distinct, rows - distinct
        more = (f", {lost} of its rows are left out" if lost else "") + (f", {again} are repeats" if again else "")
        notice(f"{SOURCES}[{number}]: {rows} of {len(chosen.sources)} rows of an epoch are from it ({share}){more}")
    return chosen


def _check_fit(rows: Rows, first: Rows, field: str) -> None:
    """Raise Failure if rows cannot be joined with those of the first source."""
    there, expected = rows.data.features, first.data.features
    if (CHAT in there) != (CHAT in expected) or set(there) != set(expected):
        what, other = ((r.form.info.title if r.form else ", ".join(r.data.column_names)) for r in (rows, first))
        raise invalid(
            f"{field}: the rows of {rows.origin} are {what}, and those of {first.origin} are {other}, which cannot be"
            " mixed. Bring them to one form; for columns of other names, set rename"
        )
    for name, feature in there.items():
        if feature != expected[name]:
            raise invalid(
                f'{field}: column "{name}" of {rows.origin} is {feature}, and in {first.origin} {expected[name]}. Write'
                " it with the same type in all sources"
            )


def _common_form(forms: Sequence[Form]) -> Form | None:
    """Return the form that says what is learnt of mixed rows: that of all, or else conversations."""
    if not forms:
        return None
    order = ("messages", "sharegpt", "prompt-completion", "alpaca", "text")
    return min(forms, key=lambda form: order.index(form.name))


def _size(rows: Rows) -> int:
    """Return how many rows a source has had, as far as its numbers tell."""
    return len(rows.data) if rows.numbers is None else int(rows.numbers.max()) + 1


def _numbers(rows: Rows) -> numpy.ndarray:
    """Return the number of each row in its source."""
    import numpy

    return numpy.arange(len(rows.data)) if rows.numbers is None else rows.numbers
