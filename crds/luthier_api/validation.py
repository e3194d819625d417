"""The checks of the API server where there is none: shape by pydantic, rules by evaluating the CRD's own CEL."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

import cel
from pydantic import BaseModel, ValidationError

from luthier_api.base import ApiModel
from luthier_api.kinds import FineTuneJob, GenerateJob, parse_job


class InvalidJob(ValueError):
    """A manifest that would be refused. `problems` holds one line each: path of the field, what is wrong, what to do."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check_job(document: dict[str, Any]) -> FineTuneJob | GenerateJob:
    """The job that `document` describes, with its defaults. Raises InvalidJob with every problem found."""
    try:
        job = parse_job(document)
    except ValidationError as error:
        raise InvalidJob([_line(e, document) for e in error.errors()]) from None
    except ValueError as error:
        raise InvalidJob([str(error)]) from None
    problems = [message for _, message in broken_rules(job)]
    if problems:
        raise InvalidJob(problems)
    return job


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
    return f"{path}: {error['msg'][:1].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _fields_at(kind: str, location: list[Any]) -> list[str]:
    """Names of the fields that exist at `location`."""
    model: Any = {"FineTuneJob": FineTuneJob, "GenerateJob": GenerateJob}.get(kind)
    for part in (p for p in location if isinstance(p, str)):
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None) if model else None
        model = _model_in(field.annotation) if field else None
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)
