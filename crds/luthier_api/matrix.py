"""What works together: the choices of a FineTuneJob, and each pair of them that is refused, with the reason.

It is drawn from the tables, as the rules of the CRD are. docs/matrix.md shows it, and a generated test trains what it
allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from luthier_api.methods import METHODS, PACKINGS, QUANTIZATIONS, STRATEGIES
from luthier_api.tasks import TRAINING_TASKS

Cell = Mapping[str, str]
"""Name of an axis → a value of it."""


@dataclass(frozen=True)
class Axis:
    """A choice."""

    name: str
    path: str
    """The field of the spec that holds it."""
    values: tuple[str, ...]


UNQUANTISED = "none"
AXES: tuple[Axis, ...] = (
    Axis("task", "task", tuple(TRAINING_TASKS)),
    Axis("method", "method.type", tuple(METHODS)),
    Axis("quantization", "model.quantization.type", (UNQUANTISED, *QUANTIZATIONS)),
    Axis("strategy", "strategy", tuple(strategy for strategy in STRATEGIES if strategy != "auto")),
    Axis("packing", "training.packing", PACKINGS),
    Axis("recomputing", "training.gradientCheckpointing", ("false", "true")),
)


@dataclass(frozen=True)
class Refusal:
    """Two values that do not work together."""

    first: tuple[str, str]
    """(axis, value)"""
    second: tuple[str, str]
    reason: str


def refusals() -> Iterator[Refusal]:
    """Yield every pair that is refused, in the order of the axes."""

    def others(first: tuple[str, str], axis: str, allowed: Sequence[str], reason: str) -> Iterator[Refusal]:
        values = next(each.values for each in AXES if each.name == axis)
        yield from (Refusal(first, (axis, value), reason) for value in values if value not in allowed)

    for name, task in TRAINING_TASKS.items():
        first = ("task", name)
        yield from others(first, "method", task.methods, task.why.get("methods", ""))
        quantizations = (UNQUANTISED, *task.quantizations)
        yield from others(first, "quantization", quantizations, task.why.get("quantizations", ""))
        yield from others(first, "strategy", task.strategies, task.why.get("strategies", ""))
        if "training.packing" not in task.fields:
            yield from others(first, "packing", ("none",), "rows share what the model reads at once in causal-lm alone")
    for name, method in METHODS.items():
        first = ("method", name)
        quantizations = (UNQUANTISED, *method.quantizations)
        yield from others(first, "quantization", quantizations, method.why.get("quantizations", ""))
        yield from others(first, "strategy", method.strategies, method.why.get("strategies", ""))
        yield from others(first, "packing", method.packings, method.why.get("packings", ""))
        if not method.recomputes:
            yield from others(first, "recomputing", ("false",), method.why.get("recomputes", ""))
    for name, quantization in QUANTIZATIONS.items():
        yield from others(("quantization", name), "strategy", quantization.strategies, quantization.why)


REFUSALS: tuple[Refusal, ...] = tuple(refusals())
_REFUSED = {pair for each in REFUSALS for pair in ((each.first, each.second), (each.second, each.first))}


def allows(cell: Cell) -> bool:
    """Return whether no two values of the cell are refused. The cell may lack axes."""
    return not any(pair in _REFUSED for pair in combinations(cell.items(), 2))


def cells(axes: Sequence[Axis]) -> Iterator[Cell]:
    """Yield every combination of values of `axes` that is allowed."""
    for values in product(*(axis.values for axis in axes)):
        cell = {axis.name: value for axis, value in zip(axes, values, strict=True)}
        if allows(cell):
            yield cell


def pairwise(axes: Sequence[Axis]) -> list[Cell]:
    """Return few cells in which every allowed pair of values of two axes occurs: always the same ones."""
    return covering(axes, lambda cell: {*combinations(cell.items(), 2)})


def covering(axes: Sequence[Axis], found_in: Callable[[Cell], set[Any]]) -> list[Cell]:
    """Return few cells that have together all that `found_in` finds in the allowed ones: always the same cells.

    Each next cell is the one with the most that has not occurred yet.
    """
    every = [*cells(axes)]
    left = [found_in(cell) for cell in every]
    missing = set[Any]().union(*left)
    chosen = []
    while missing:
        best = max(range(len(every)), key=lambda i: len(left[i] & missing))
        chosen.append(every[best])
        missing -= left[best]
    return chosen


def spec_of(cell: Cell) -> dict[str, Any]:
    """Return the fields of a spec that a cell sets. What is no quantisation, and what the task lacks, is left out."""
    spec: dict[str, Any] = {}
    for axis in AXES:
        value: Any = cell.get(axis.name)
        if value is None or value == UNQUANTISED:  # also no packing, which few tasks have as a field
            continue
        if axis.name == "recomputing":
            value = value == "true"
        *above, last = axis.path.split(".")
        block = spec
        for name in above:
            block = block.setdefault(name, {})
        block[last] = value
    return spec
