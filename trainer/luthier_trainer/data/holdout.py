"""Chooses the rows that are held out to evaluate on (`dataset.evalFraction`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_trainer.data.columns import invalid

if TYPE_CHECKING:
    import numpy


def hold_out(
    rows: int,
    fraction: float,
    seed: int,
    field: str,
    classes: numpy.ndarray | None = None,
    groups: numpy.ndarray | None = None,
    named: str = "are equal to",
    remedy: str = "set dataset.deduplicate: exact",
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return (train, eval), the positions of the rows, int64, each in the order of the rows.

    `fraction` of the rows, chosen with `seed`, are held out. With `classes`, int64 of shape (rows,), the same share of
    each class is held out, as nearly as whole rows allow, and at least one row of each class is kept for training.

    `groups` has the same shape: rows with the same number, counted from 0, are on the same side. A group counts for the
    class of its first row. One with more rows than are still to be held out is learnt, so that fewer rows than asked
    for may be held out, and never more. `named`, `remedy`: for messages, as in `tasks.base.Alike`. Raises Failure if
    one of the two sets would be empty.
    """
    import numpy

    count = round(rows * fraction)
    if not 0 < count < rows:
        raise invalid(
            f"{field}: {fraction:g} of {rows} rows is {count}; both sides need one row at least. Choose another"
            " fraction"
        )
    classes = numpy.zeros(rows, dtype=numpy.int64) if classes is None else classes
    groups = numpy.arange(rows) if groups is None else groups
    sizes = numpy.bincount(classes)
    shares = shares_of(sizes, count)
    if not shares.any():
        raise invalid(
            f"{field}: every class has one row, which is needed to learn from. Name rows to evaluate on instead"
        )
    order = numpy.random.default_rng(seed).permutation(rows)
    held_out = _groups_to_hold_out(order, classes, groups, sizes, shares)
    if not held_out:
        raise invalid(
            f"{field}: {fraction:g} of {rows} rows is {count}, and each row has others that {named} it, which must be"
            f" on the same side. Choose a larger fraction, or {remedy}"
        )
    chosen = numpy.isin(groups, held_out)
    return numpy.flatnonzero(~chosen), numpy.flatnonzero(chosen)


def _groups_to_hold_out(
    order: numpy.ndarray, classes: numpy.ndarray, groups: numpy.ndarray, sizes: numpy.ndarray, shares: numpy.ndarray
) -> list[int]:
    """Return the groups that are held out, in the order in which `order`, a permutation of the rows, meets them.

    `sizes` and `shares`, of shape (classes,): rows of each class, and how many of them may be held out.
    """
    import numpy

    rows_of_group = numpy.bincount(groups).tolist()
    class_of_group = classes[numpy.unique(groups, return_index=True)[1]].tolist()
    kinds, counts = numpy.unique(numpy.stack([groups, classes]), axis=1, return_counts=True)
    several = numpy.flatnonzero(numpy.bincount(kinds[0]) > 1)  # groups whose rows have several classes
    of_several: dict[int, list[tuple[int, int]]] = {int(group): [] for group in several}
    for i in numpy.flatnonzero(numpy.isin(kinds[0], several)).tolist():
        of_several[int(kinds[0, i])].append((int(kinds[1, i]), int(counts[i])))

    met = groups[order]
    shuffled = met[numpy.sort(numpy.unique(met, return_index=True)[1])].tolist()
    kept, rest = sizes.tolist(), shares.tolist()
    to_hold_out, held_out = sum(rest), list[int]()
    for group in shuffled:
        if to_hold_out == 0:
            break
        rows, kind = rows_of_group[group], class_of_group[group]
        parts = of_several.get(group, [(kind, rows)])
        if rows > rest[kind] or any(kept[other] <= n for other, n in parts):
            continue
        for other, n in parts:
            kept[other] -= n
        rest[kind] -= rows
        to_hold_out -= rows
        held_out.append(group)
    return held_out


def shares_of(sizes: numpy.ndarray, count: int) -> numpy.ndarray:
    """Return how many rows of each class are held out, `count` in all, int64 of shape (classes,).

    `sizes` has the same shape. The shares are proportional, and the largest remainders are rounded up. One row of each
    class is never held out.
    """
    import numpy

    exact = sizes * (count / sizes.sum())
    most = numpy.maximum(sizes - 1, 0)
    shares = numpy.minimum(numpy.floor(exact).astype(numpy.int64), most)
    while shares.sum() < count and (shares < most).any():
        # One more row for the class with the largest remainder that has rows left.
        shares[numpy.argmax(numpy.where(shares < most, exact - shares, -numpy.inf))] += 1
    return shares
