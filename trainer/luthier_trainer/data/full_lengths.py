"""Keeps the tokens of each row before it is truncated, for the data report. After it, nobody could tell them.

Like notices, they are collected by the process that encodes; 4 bytes a row.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

_left_out: dict[str, Counter[str]] = {}
_kept: dict[str, array[int]] = {}


def keep(use: str, lengths: Iterable[int]) -> None:
    """Keep the tokens of the next rows. `use`: training or held-out."""
    _kept.setdefault(use, array("i")).extend(lengths)


def leave_out(use: str, field: str, rows: int) -> None:
    """Count rows that are left out for their length. `field`: of `spec.dataset`, which asks for it."""
    _left_out.setdefault(use, Counter())[field] += rows


def take_left_out(use: str) -> Counter[str]:
    """Return field of `spec.dataset` → rows that were left out for their length, and forget them."""
    return _left_out.pop(use, Counter())


def take(use: str) -> numpy.ndarray:
    """Return the tokens of all rows that were kept, int32 of shape (rows,), and forget them."""
    import numpy

    return numpy.array(_kept.pop(use, array("i")), dtype=numpy.int32)
