"""Templates and sweeps: the rows that are worked on, made of those that were read.

A template writes the prompt of a row from texts of the row. A sweep makes several rows of each one, with other texts,
seeds or settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from string import Formatter
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.inputs import Inputs, SweepLists
from luthier_trainer.runtime.failure import Failure

TEMPLATE, SWEEP = "spec.inputs.template", "spec.inputs.sweep"
MOST_POINTS = 100_000  # rows that a sweep makes of each one


@dataclass(frozen=True)
class Point:
    """The values of one time that a row is worked on; an empty one for a job without a sweep."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Texts for the template."""
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What is overridden of the task's block of settings."""


def points(inputs: Inputs, block: str) -> list[Point]:
    """Return the points of the sweep; one for a job without. `block`: name of the task's block of settings.

    Raises Failure if lists of `zip` have other lengths, or there are too many points.
    """
    if inputs.sweep is None:
        return [Point()]
    if inputs.sweep.zip is not None:
        axes = axes_of(inputs.sweep.zip, block)
        lengths = {len(values) for _, _, values in axes}
        if len(lengths) > 1:
            shown = ", ".join(f"{name} has {len(values)}" for _, name, values in axes)
            raise invalid(f"{SWEEP}.zip: the lists must have the same number of values: {shown}")
        combined: Iterator[tuple[Any, ...]] = zip(*(values for _, _, values in axes), strict=True)
    else:
        assert inputs.sweep.product is not None, "a sweep is one of the two"
        axes = axes_of(inputs.sweep.product, block)
        count = prod(len(values) for _, _, values in axes)
        if count > MOST_POINTS:
            raise invalid(
                f"{SWEEP}.product: {count} combinations for each row, more than {MOST_POINTS}; list less values"
            )
        combined = product(*(values for _, _, values in axes))
    if not axes:
        raise invalid(f"{SWEEP}: has no values; list some, or remove it")
    return [point_of(axes, values) for values in combined]


def axes_of(values: SweepLists, block: str) -> list[tuple[str, str, list[Any]]]:
    """Return kind, name and values of each list."""
    settings = getattr(values, block)
    found: list[tuple[str, str, list[Any]]] = [
        ("fields", name, list(texts)) for name, texts in (values.fields or {}).items()
    ]
    if values.seed is not None:
        found.append(("seed", "seed", list(values.seed)))
    return found + [("settings", name, listed) for name, listed in (settings.dump() if settings else {}).items()]


def point_of(axes: list[tuple[str, str, list[Any]]], values: tuple[Any, ...]) -> Point:
    """Return the point with these values of the axes."""
    of: dict[str, dict[str, Any]] = {"fields": {}, "seed": {}, "settings": {}}
    for (kind, name, _), value in zip(axes, values, strict=True):
        of[kind][name] = value
    return Point(of["fields"], of["seed"].get("seed"), of["settings"])


@dataclass(frozen=True)
class Template:
    """A template of prompts: texts, each with the name that follows it."""

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, text: str) -> Template:
        """Return the template. Raises Failure if braces do not match, or more than a name stands between them."""
        try:
            found = [(literal, name, spec, conversion) for literal, name, spec, conversion in Formatter().parse(text)]
        except ValueError as error:
            raise invalid(
                f"{TEMPLATE}: {error}. Write {{name}} for a text of the row, and {{{{ or }}}} for a brace"
            ) from None
        for _, name, spec, conversion in found:
            if name is not None and (spec or conversion or not name.strip()):
                raise invalid(f"{TEMPLATE}: {{{name}}} must be a name alone, such as {{thing}}")
        return cls(tuple((literal, name) for literal, name, _, _ in found))

    @property
    def names(self) -> list[str]:
        """The names in it, each once."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def write(self, texts: Mapping[str, str]) -> str:
        """Return the prompt. Raises KeyError if there is no text of a name."""
        return "".join(literal + ("" if name is None else texts[name]) for literal, name in self.parts)


def invalid(message: str) -> Failure:
    """Return the Failure for a field that does not make sense."""
    return Failure(ExitCode.INVALID_SPEC, message)
