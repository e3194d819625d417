"""The checks of the API server where there is none: shape by pydantic, rules by evaluating the CRD's own CEL."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import cel
from pydantic import BaseModel, ValidationError

from luthier_api.base import ApiModel
from luthier_api.kinds import KINDS, FineTuneJob, GenerateJob, JobKind, kind_of


class InvalidJob(ValueError):
    """A manifest that would be refused. `problems` holds one line each: path of the field, what is wrong, what to
    do.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check_job(document: dict[str, Any]) -> FineTuneJob | GenerateJob:
    """The job that `document` describes, with its defaults and without its status, which is not the user's to write.

    As strict as the API server: fields by their outer names, values of their own type. Raises InvalidJob with every
    problem found.
    """
    try:
        model = kind_of(document).model
    except ValueError as error:
        raise InvalidJob([str(error)]) from None
    given = as_stored({k: v for k, v in document.items() if k != "status"}, model)
    try:
        job = model.model_validate(given, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidJob([_line(e, document) for e in error.errors()]) from None
    if problems := [_with_path(path, message) for path, message in broken_rules(job)]:
        raise InvalidJob(problems)
    return job


def as_stored(value: Any, annotation: Any) -> Any:
    """`value` as the API server reads it: null is no value for a field that it knows, and JSON does not tell 64.0 from
    64.
    """
    model = _model_in(annotation)
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


def _with_path(path: str, message: str) -> str:
    """A rule names its object at the beginning of its message; here that becomes the object's whole path, with
    indexes.
    """
    name = path.rpartition(".")[2].partition("[")[0]
    return path + message.removeprefix(name) if name and re.match(rf"{name}[.:]", message) else message


def broken_rules(model: ApiModel, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, message) of each rule that does not hold in `model` or below it. Rules on updates are not looked at."""
    data = model.dump()
    for rule in type(model).rules:
        if not rule.transition and cel.evaluate(rule.cel, {"self": data}) is not True:
            yield path, rule.message
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        below = f"{path}.{field.alias or name}".lstrip(".")
        if isinstance(value, ApiModel):
            yield from broken_rules(value, below)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, ApiModel):
                    yield from broken_rules(item, f"{below}[{i}]")


def _line(error: Any, document: dict[str, Any]) -> str:
    location = [part for part in error["loc"] if part not in ("FineTuneJob", "GenerateJob", "[key]")]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    match error["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(location[-1]), _fields_at(document.get("kind", ""), location[:-1]), 1)
            return f"{path}: unknown field" + (f". Did you mean {near[0]!r}?" if near else "")
        case "missing":
            return f"{path}: required"
        case "duplicate":
            return f"{path}: {error['msg']}"
    return f"{path}: {error['msg'][:1].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _fields_at(kind: str, location: list[Any]) -> list[str]:
    """Names of the fields that exist at `location`."""
    model: Any = KINDS[JobKind(kind)].model if kind in KINDS else None
    for part in (p for p in location if isinstance(p, str)):
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None) if model else None
        model = _model_in(field.annotation) if field else None
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)
