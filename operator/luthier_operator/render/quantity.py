"""Quantities as the API server would write them: "1024Mi" is "1Gi", "0.5" is "500m".

Other forms mean the same, but after Kueue has admitted a JobSet it owns the canonical text, and ours would be a
conflict.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
DECIMAL = ("", "k", "M", "G", "T", "P", "E")
PARTS = {"m": 10**3, "u": 10**6, "n": 10**9}
WRITTEN = re.compile(r"([0-9.]+(?:[eE][0-9]+)?)([a-zA-Z]*)")


def split(quantity: str) -> tuple[Fraction, str]:
    """Value in base units, and the suffix it was written with. Raises ValueError for what is no quantity."""
    written = WRITTEN.fullmatch(quantity)
    if not written:
        raise ValueError(f"{quantity!r} is not a quantity")
    number, suffix = Fraction(written[1]), written[2]
    if suffix in PARTS:
        return number / PARTS[suffix], suffix
    if suffix.endswith("i"):
        return number * 1024 ** BINARY.index(suffix), suffix
    return number * 1000 ** DECIMAL.index(suffix), suffix


def canonical(quantity: str) -> str:
    """The same amount with the largest suffix that needs no fraction, rounded up to whole bytes or thousandths."""
    value, suffix = split(quantity)
    if suffix.endswith("i"):
        return _largest(math.ceil(value), 1024, BINARY)
    if value.denominator != 1:
        return f"{math.ceil(value * 1000)}m" if math.ceil(value * 1000) % 1000 else str(math.ceil(value))
    return _largest(int(value), 1000, DECIMAL)


def amount(quantity: str) -> Fraction:
    """Value in base units."""
    return split(quantity)[0]


def cores(quantity: str) -> int:
    """Whole cores in a CPU quantity, at least one."""
    return max(1, int(split(quantity)[0]))


def _largest(value: int, base: int, suffixes: tuple[str, ...]) -> str:
    power = 0
    while value and value % base == 0 and power + 1 < len(suffixes):
        value, power = value // base, power + 1
    return f"{value}{suffixes[power]}"
