"""Objects as the API server has stored them, and messages of pods. Another version may have written them, so they are
read leniently.

A field that this version does not know is ignored, and named if it is the user's. In a status or a message, an
unreadable field or item of a list is left out, and what stands beside it is kept. Manifests and run configs are read
strictly instead (`problems.parse`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from luthier_api.base import ApiModel, model_in

Model = TypeVar("Model", bound=ApiModel)
Location = tuple[int | str, ...]
SPEC, STATUS = "spec", "status"
SPECS_KEPT = 1024
SPEC_BYTES = 8192
"""Of a spec that is kept. A usual one has 1 KiB; rows may be in it."""


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
    if spec := _known_spec(model, document):
        document = document | {SPEC: spec}
    value, left_out = _lenient(model, document, lambda p: _is_outside(p) and p["type"] != "extra_forbidden")
    return Stored(value, tuple(path(p["loc"]) for p in left_out if _is_outside(p)))


def _known_spec(model: type[ApiModel], document: dict[str, Any]) -> ApiModel | None:
    """The spec of `document`, if nothing in it is wrong or unknown. A job is read for each decision about it, and its
    spec hardly ever changes.
    """
    found, of_spec = document.get(SPEC), model_in(model.model_fields[SPEC].annotation)
    if of_spec is None or not isinstance(found, dict):
        return None
    text = to_json(found)
    return _read_spec(of_spec, text) if len(text) <= SPEC_BYTES else None


@lru_cache(maxsize=SPECS_KEPT)
def _read_spec(of_spec: type[ApiModel], text: bytes) -> ApiModel | None:
    try:
        return of_spec.model_validate(from_json(text))
    except ValidationError:
        return None


def read_known(model: type[Model], document: dict[str, Any]) -> Model:
    """`document` as an object of `model`, without the fields and items of lists that cannot be read.

    Raises NotUnderstood without a required field of the object itself.
    """
    return _lenient(model, document, lambda p: not _unreadable(p))[0]


def _lenient(
    model: type[Model], document: dict[str, Any], is_wrong: Callable[[ErrorDetails], bool]
) -> tuple[Model, list[ErrorDetails]]:
    """`document` without what cannot be read, and why each part of it was left out. Raises NotUnderstood if one of the
    problems `is_wrong`.
    """
    left_out: list[ErrorDetails] = []
    while True:
        try:
            return model.model_validate(document), left_out
        except ValidationError as error:
            problems = error.errors()
        if wrong := [p for p in problems if is_wrong(p)]:
            raise NotUnderstood("\n".join(map(problem_line, wrong)))
        left_out += problems
        # What is removed may make its parent incomplete, which the next turn finds.
        document = _without(document, {_unreadable(p) for p in problems})


def _is_outside(problem: ErrorDetails) -> bool:
    """Whether it is about a field outside the status."""
    return problem["loc"][:1] != (STATUS,)


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
