"""Exact sums of numbers of rows, so that a metric does not depend on how rows are divided into shards or attempts.

Sums of floats depend on their order. These are fractions, which JSON holds as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

Numbers = Mapping[str, float | Fraction]
"""Name → number of one row."""
Sums = Mapping[str, Fraction]
"""Name → sum over rows. A name that no row has is missing, and its sum is 0."""


def added(sums: Sums, numbers: Numbers) -> Sums:
    """Return the sums with the numbers of a further row, or with those of other rows."""
    return {**sums, **{name: sums.get(name, Fraction(0)) + Fraction(number) for name, number in numbers.items()}}


def written(sums: Sums) -> dict[str, str]:
    """Return the sums for JSON."""
    return {name: str(total) for name, total in sums.items()}


def read(texts: Mapping[str, str]) -> Sums:
    """Return the sums that `written` has made `texts` of."""
    return {name: Fraction(text) for name, text in texts.items()}


def below(sums: Sums, prefix: str) -> dict[str, float]:
    """Return the sums whose names begin with `prefix`, by the rest of their names, in alphabetical order."""
    found = {name.removeprefix(prefix): float(total) for name, total in sums.items() if name.startswith(prefix)}
    return dict(sorted(found.items()))
