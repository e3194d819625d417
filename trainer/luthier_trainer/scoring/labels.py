"""Labels and numbers that a classifier answers, against reference labels and numbers.

A row becomes numbers, and the figures of all rows follow from their sums (`sums`). Labels are those that are answered
or wanted somewhere, as in sklearn: a label that is neither does not count.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction

from luthier_trainer.scoring.sums import Numbers, Sums, below

FOUND, ANSWERED, WANTED = "found:", "answered:", "wanted:"


def numbers(answered: Collection[str], wanted: Collection[str]) -> Numbers:
    """Return the numbers of a row: whether its labels are exactly the wanted ones, and which they are."""
    given, right = set(answered), set(wanted)
    counts = ((FOUND, given & right), (ANSWERED, given), (WANTED, right))
    return {"right": float(given == right), **{f"{kind}{name}": 1.0 for kind, names in counts for name in names}}


def figures(sums: Sums, rows: int, one_each: bool) -> dict[str, float]:
    """Return accuracy and f1Macro, and majorityShare where each row has one label, or f1Micro where it may have any.

    A label that is answered and never right, or wanted and never found, has an F1 of 0.
    """
    found, answered, wanted = (below(sums, kind) for kind in (FOUND, ANSWERED, WANTED))
    names = answered.keys() | wanted.keys()
    by_label = [f1(found.get(name, 0), answered.get(name, 0), wanted.get(name, 0)) for name in names]
    all_labels = f1(sum(found.values()), sum(answered.values()), sum(wanted.values()))
    last = {"majorityShare": max(wanted.values(), default=0) / rows} if one_each else {"f1Micro": all_labels}
    macro = math.fsum(by_label) / len(names) if names else 0.0
    return {"accuracy": float(sums["right"]) / rows, "f1Macro": macro, **last}


def f1(found: float, answered: float, wanted: float) -> float:
    """Return the F1 of so many that are right, out of those that were answered, and of those that are wanted."""
    return 2 * found / (answered + wanted) if found else 0.0


def of_number(answered: float, wanted: float) -> Numbers:
    """Return the numbers of a row that has a number."""
    given, right = Fraction(answered), Fraction(wanted)
    return {
        "squares": (given - right) ** 2,
        "distances": abs(given - right),
        "x": given,
        "y": right,
        "xx": given**2,
        "yy": right**2,
        "xy": given * right,
    }


def figures_of_numbers(sums: Sums, rows: int) -> dict[str, float]:
    """Return mse, mae and pearson. Numbers that are all the same have no correlation, and it is left out."""
    found = {"mse": float(sums["squares"] / rows), "mae": float(sums["distances"] / rows)}
    of_x, of_y = (rows * sums[name * 2] - sums[name] ** 2 for name in "xy")
    if of_x and of_y:
        found["pearson"] = float(rows * sums["xy"] - sums["x"] * sums["y"]) / math.sqrt(of_x) / math.sqrt(of_y)
    return found
