"""What is wrong with a document that a user or a program wrote: the path of each field, and a sentence about it.

Manifests and run configs are both read with `parse`, which is as strict as the API server.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from luthier_api.base import ApiModel, model_in

Model = TypeVar("Model", bound=ApiModel)


@dataclass(frozen=True)
class Problem:
    """One field that is wrong."""

    path: str
    message: str
    value: str | None = None
    """`repr` of what was found, where it helps. It may hold a secret that was put into the wrong field."""

    def __str__(self) -> str:
        found = "" if self.value is None else f" (it is {self.value})"
        return f"{self.path}: {self.message}{found}"


class InvalidDocument(ValueError):
    """A document that is not of its type. `problems` has all of its wrong fields."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def parse(model: type[Model], document: Any, name: str) -> Model:
    """`document`, which is called `name`, as an object of `model`: fields by their outer names, values of their own
    type.

    Raises InvalidDocument with a problem for each wrong field.
    """
    try:
        return model.model_validate(as_stored(document, model), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidDocument([_problem(e, model, name) for e in error.errors()]) from None


def as_stored(value: Any, annotation: Any) -> Any:
    """`value` as the API server reads it: null is no value for a field that it knows, and JSON does not tell 64.0 from
    64.
    """
    model = model_in(annotation)
    if isinstance(value, list):
        return [as_stored(item, annotation) for item in value]
    if isinstance(value, dict) and model:
        known = {f.alias or n: f.annotation for n, f in model.model_fields.items()}
        return {
            k: as_stored(v, known[k]) if k in known else v for k, v in value.items() if v is not None or k not in known
        }
    if isinstance(value, dict) and get_origin(annotation) is dict:
        free = get_args(annotation)[1] is Any  # such as the arguments of an architecture, where null may mean something
        return value if free else {k: v for k, v in value.items() if v is not None}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _problem(error: ErrorDetails, model: type[ApiModel], name: str) -> Problem:
    location = [part for part in error["loc"] if part != "[key]"]  # pydantic's mark for a wrong key of a map
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or name
    match error["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), _fields_at(location[:-1], model), 1)
            return Problem(path, f"unknown field. Did you mean {near[0]!r}?" if near else "unknown field")
        case "missing":
            return Problem(path, "required")
        case "duplicate":  # its message holds the value
            return Problem(path, error["msg"])
        case "model_type":  # pydantic would name the class
            return Problem(path, "input should be an object", repr(error["input"]))
    message = error["msg"]
    return Problem(path, message[:1].lower() + message[1:], repr(error["input"]))


def _fields_at(location: list[str | int], top: type[ApiModel]) -> list[str]:
    """Names of the fields that exist at `location` in a document of the type `top`."""
    model: type[ApiModel] | None = top
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        annotations = {f.alias or n: f.annotation for n, f in model.model_fields.items()}
        model = model_in(annotations.get(part))
    return [f.alias or n for n, f in model.model_fields.items()] if model else []
