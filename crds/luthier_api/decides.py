"""What a field decides: one mark a field, from which everything that has to know it is drawn.

Each field of a spec has a mark. A field inside a block has that of the block, unless it carries its own. From the mark
are drawn the CEL rules of what never changes, what the run config leaves out, the fingerprint of `prepare`, the
identity of a checkpoint, and what may differ between two calls of `luthier run` in one folder.

In a status, the mark MAY_WAIT says which changes are not written at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from luthier_api.base import ApiModel, Rule, model_in

Spec = TypeVar("Spec", bound=ApiModel)


@dataclass(frozen=True)
class Consequence:
    changes: bool
    """Whether it may change while the job lives."""
    in_run: bool
    """Whether the pods read it: it is in the run config as the user has set it."""
    in_result: bool
    """Whether what was made with another value cannot be used: prepared data, checkpoints, outputs."""


class Decides(Enum):
    """What a field of a spec decides."""

    RESULT = Consequence(changes=False, in_run=True, in_result=True)
    """What is made, or how the work on it is laid out."""
    CIRCUMSTANCES = Consequence(changes=False, in_run=True, in_result=False)
    """Where, when and how carefully the work is done; the result is the same."""
    PUBLICATION = Consequence(changes=True, in_run=True, in_result=False)
    """Where the result is published. It may change, so that a failed upload can be repaired."""
    LIFE_CYCLE = Consequence(changes=True, in_run=False, in_result=False)
    """When the job starts, stops, is started again and is deleted. The operator alone reads it."""


RESULT, CIRCUMSTANCES = Decides.RESULT, Decides.CIRCUMSTANCES
PUBLICATION, LIFE_CYCLE = Decides.PUBLICATION, Decides.LIFE_CYCLE


class Urgency(Enum):
    """How soon a changed field of a status is written."""

    AT_ONCE = "at once"
    MAY_WAIT = "may wait"


MAY_WAIT = Urgency.MAY_WAIT
Mark = TypeVar("Mark", Decides, Urgency)


def marks(spec: type[ApiModel]) -> dict[str, Decides]:
    """Field of `spec`, by its outer name → what it decides. Raises TypeError for a field without a mark."""
    found = {}
    for name, field in spec.model_fields.items():
        mark = _mark(field, Decides)
        if mark is None:
            raise TypeError(f"{spec.__name__}.{name}: mark it with what it decides: {', '.join(Decides.__members__)}")
        found[field.alias or to_camel(name)] = mark
    return found


def immutable(spec: type[ApiModel]) -> tuple[Rule, ...]:
    """A job is what its manifest said when it was created: CEL for the fields of `spec` that never change."""
    return tuple(
        Rule(
            f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            f"spec.{name} cannot change once the job exists; create another job for another {name}",
        )
        for name, mark in marks(spec).items()
        if not mark.value.changes
    )


def result_part(spec: ApiModel) -> dict[str, Any]:
    """The part of a spec that decides the result, as JSON-ready data with outer names."""
    kept = {mark for mark in Decides if mark.value.in_result}
    marks(type(spec))  # every field has its own, so that none inherits the last argument
    return _part(spec.dump(), type(spec), kept, Decides.RESULT)


def run_part(spec: Spec) -> Spec:
    """A spec as the pods read it: what the operator alone reads has its default, so that a pod that starts after a
    suspension finds the run config that it knew.
    """
    left_out = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(spec).model_fields.items()
        if not marks(type(spec))[field.alias or to_camel(name)].value.in_run
    }
    return spec.model_copy(update=left_out)


def urgent_part(status: Mapping[str, Any], model: type[ApiModel]) -> dict[str, Any]:
    """The part of a status whose change has to be written at once."""
    return _part(status, model, {Urgency.AT_ONCE}, Urgency.AT_ONCE)


def _part(data: Mapping[str, Any], model: type[ApiModel], kept: set[Mark], inherited: Mark) -> dict[str, Any]:
    """Those fields of `data`, an object of the type `model`, whose mark is among `kept`, at any depth."""
    fields = {field.alias or to_camel(name): field for name, field in model.model_fields.items()}
    found: dict[str, Any] = {}
    for name, value in data.items():
        field = fields.get(name)
        mark = (_mark(field, type(inherited)) if field else None) or inherited
        below = model_in(field.annotation) if field else None
        if below and isinstance(value, Mapping):
            part = _part(value, below, kept, mark)
            if part or mark in kept:
                found[name] = part
        elif below and isinstance(value, list):
            parts = [_part(item, below, kept, mark) for item in value]
            if mark in kept or any(parts):
                found[name] = parts
        elif mark in kept:
            found[name] = value
    return found


def _mark(field: FieldInfo, kind: type[Mark]) -> Mark | None:
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)
