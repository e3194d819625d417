"""Objects as the API server has stored them, and messages of pods. Another version may have written them, so they are
read leniently.

A field that this version does not know is ignored, and named if it is the user's. In a status or a message, an
unreadable field or item of a list is left out, and what stands beside it is kept. Manifests and run configs are read
strictly instead (`problems.parse`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from luthier_api.base import ApiModel

Model = TypeVar("Model", bound=ApiModel)
Location = tuple[int | str, ...]
STATUS = "status"


class NotUnderstood(ValueError):
    """A field outside the status has a value that this version does not know. The text has one line for each field."""


@dataclass(frozen=True)
class Stored(Generic[Model]):
    """A stored object as far as this version understands it."""

    value: Model
    unknown: tuple[str, ...]
    """Paths of the fields outside the status that this version does not know."""


def read_stored(model: type[Model], document: dict[str, Any]) -> Stored[Model]:
    """`document` as an object of `model`.

    Raises NotUnderstood for a known field outside the status with an unreadable value.
    """
    unknown: list[str] = []
    while True:
        try:
            return Stored(model.model_validate(document), tuple(unknown))
        except ValidationError as error:
            problems = error.errors()
        wrong = [p for p in problems if p["loc"][:1] != (STATUS,) and p["type"] != "extra_forbidden"]
        if wrong:
            raise NotUnderstood("\n".join(map(problem_line, wrong)))
        unknown += [path(p["loc"]) for p in problems if p["loc"][:1] != (STATUS,)]
        # What is removed may make its parent incomplete, which the next turn finds.
        document = _without(document, {_unreadable(p) for p in problems})


def read_known(model: type[Model], document: dict[str, Any]) -> Model:
    """`document` as an object of `model`, without the fields and items of lists that cannot be read.

    Raises NotUnderstood without a required field of the object itself.
    """
    while True:
        try:
            return model.model_validate(document)
        except ValidationError as error:
            problems = error.errors()
        if required := [p for p in problems if not _unreadable(p)]:
            raise NotUnderstood("\n".join(map(problem_line, required)))
        document = _without(document, {_unreadable(p) for p in problems})


def problem_line(problem: ErrorDetails) -> str:
    """`spec.task: field required`."""
    message = problem["msg"]
    return f"{path(problem['loc'])}: {message[:1].lower()}{message[1:]}"


def path(location: Iterable[int | str]) -> str:
    """`spec.volumes[0].colour`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _unreadable(problem: ErrorDetails) -> Location:
    """What has to be left out: the field itself, or the object that lacks a required one."""
    location = problem["loc"]
    return location[:-1] if problem["type"] == "missing" else location


def _without(document: dict[str, Any], locations: set[Location]) -> dict[str, Any]:
    """A copy of `document` without what is at `locations`."""
    document = copy.deepcopy(document)
    # Backwards, so that the indexes of the other items of a list stay right.
    for location in sorted(locations, key=_order, reverse=True):
        _remove(document, location)
    return document


def _order(location: Location) -> list[tuple[int, str]]:
    return [(part, "") if isinstance(part, int) else (-1, part) for part in location]


def _remove(document: dict[str, Any], location: Location) -> None:
    """Remove the deepest existing object on the way to `location`: pydantic adds marks of its own to some paths."""
    here: Any = document
    parent, last = here, location[0]
    for part in location:
        is_there = part < len(here) if isinstance(here, list) and isinstance(part, int) else part in here
        if not is_there:
            break
        parent, last, here = here, part, here[part]
        if not isinstance(here, dict | list):
            break
    del parent[last]
