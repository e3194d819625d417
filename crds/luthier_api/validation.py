"""The checks of the API server where there is none: shape by pydantic, rules by evaluating the CRD's own CEL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import cel

from luthier_api.base import ApiModel
from luthier_api.kinds import FineTuneJob, GenerateJob, kind_of
from luthier_api.marks import rules_of
from luthier_api.problems import InvalidDocument, parse

SIZE = re.compile(r"(?<![.\w])size\(")
"""common-expression-language 0.10 counts the bytes of a text, and CEL its characters."""


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
    try:
        job = parse(model, {k: v for k, v in document.items() if k != "status"}, "manifest")
    except InvalidDocument as error:
        raise InvalidJob([str(problem) for problem in error.problems]) from None
    if problems := list(broken_rules(job)):
        raise InvalidJob(problems)
    return job


def context_of(data: dict[str, Any]) -> cel.Context:
    """What the rules of an object know: itself. It costs five times what a rule does, so that all rules share it."""
    context = cel.Context({"self": data})
    context.add_function("sum", sum)  # of Kubernetes' own library for lists
    context.add_function("length", len)
    return context


@cache
def program(expression: str) -> cel.Program:
    """The expression, parsed: which takes twenty times as long as its evaluation."""
    return cel.compile(SIZE.sub("length(", expression))


def broken_rules(model: ApiModel, path: str = "") -> Iterator[str]:
    """The message of each rule that does not hold in `model`, which is at `path`, or below it. Rules on updates are not
    looked at.
    """
    data = stored(model, model.dump())
    rules = [rule for rule in rules_of(type(model)) if not rule.transition]
    context = context_of(data) if rules else None
    for rule in rules:
        if program(rule.cel).execute(context) is not True:
            yield rule.message_at(path)
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        below = f"{path}.{field.alias or name}".lstrip(".")
        if isinstance(value, ApiModel):
            yield from broken_rules(value, below)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, ApiModel):
                    yield from broken_rules(item, f"{below}[{i}]")


def stored(model: ApiModel, data: dict[str, Any]) -> dict[str, Any]:
    """Return `data`, the dump of `model`, as the API server stores it: a CRD has no default for an empty list or map.

    A rule that reads such a field has to ask for it with has().
    """
    for name, field in type(model).model_fields.items():
        key, value = field.alias or name, getattr(model, name)
        if key not in data:
            continue
        if isinstance(value, list | dict) and not value and name not in model.model_fields_set:
            del data[key]
        elif isinstance(value, ApiModel):
            stored(value, data[key])
        elif isinstance(value, list):
            for item, below in zip(value, data[key], strict=True):
                if isinstance(item, ApiModel):
                    stored(item, below)
    return data
