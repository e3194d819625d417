"""What a field decides: one mark a field, from which everything that has to know it is drawn.

Each field of a spec has a mark. A field inside a block has that of the block, unless it carries its own. From the mark
are drawn the CEL rules of what may change and when, what makes a job that has failed go on, what the run config leaves
out, the fingerprint of `prepare`, the identity of a checkpoint, and what may differ between two calls of `luthier run`
in one folder.

In a status, the mark MAY_WAIT says which changes are not written at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, unique
from functools import cache
from typing import Any, TypeVar

from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from luthier_api.base import ApiModel, Rule, model_in, once_for_each

Spec = TypeVar("Spec", bound=ApiModel)


class Changes(Enum):
    """When a field may change once the job exists."""

    NEVER = "never"
    WHILE_STOPPED = "while stopped"
    """While no pods work with it: the job is suspended, has failed, or rests after its plan."""
    ALWAYS = "always"


@dataclass(frozen=True)
class Consequence:
    changes: Changes
    in_run: bool
    """Whether the pods read it: it is in the run config as the user has set it."""
    in_result: bool
    """Whether what was made with another value cannot be used: prepared data, checkpoints, outputs."""
    resumes: bool
    """Whether a job that has failed goes on when it changes."""
    planned: bool
    """Whether `prepare` has to run again when it changes."""


@unique
class Decides(Enum):
    """What a field of a spec decides."""

    RESULT = Consequence(changes=Changes.NEVER, in_run=True, in_result=True, resumes=False, planned=False)
    """What is made."""
    PLACE = Consequence(changes=Changes.NEVER, in_run=True, in_result=False, resumes=False, planned=False)
    """Where the work is kept. In another place, there would be no checkpoint to resume from."""
    LAYOUT = Consequence(changes=Changes.WHILE_STOPPED, in_run=True, in_result=False, resumes=True, planned=True)
    """How the work is divided and how memory is spent; the result is the same. `prepare` plans it."""
    CIRCUMSTANCES = Consequence(
        changes=Changes.WHILE_STOPPED, in_run=True, in_result=False, resumes=True, planned=False
    )
    """Where, when and how carefully the work is done; the result is the same."""
    PUBLICATION = Consequence(changes=Changes.ALWAYS, in_run=True, in_result=False, resumes=True, planned=False)
    """Where the result is published. It may change, so that a failed upload can be repaired."""
    BUDGET = Consequence(changes=Changes.ALWAYS, in_run=False, in_result=False, resumes=True, planned=False)
    """How much at once and how often the work is tried. The operator alone reads it."""
    LIFE_CYCLE = Consequence(changes=Changes.ALWAYS, in_run=False, in_result=False, resumes=False, planned=False)
    """When the job starts, stops and is deleted. The operator alone reads it."""


RESULT, PLACE, LAYOUT, CIRCUMSTANCES = Decides.RESULT, Decides.PLACE, Decides.LAYOUT, Decides.CIRCUMSTANCES
PUBLICATION, BUDGET, LIFE_CYCLE = Decides.PUBLICATION, Decides.BUDGET, Decides.LIFE_CYCLE


class Urgency(Enum):
    """How soon a changed field of a status is written."""

    AT_ONCE = "at once"
    MAY_WAIT = "may wait"


MAY_WAIT = Urgency.MAY_WAIT
Mark = TypeVar("Mark", Decides, Urgency)


@cache
def marks(spec: type[ApiModel]) -> Mapping[str, Decides]:
    """Field of `spec`, by its outer name → what it decides. Raises TypeError for a field without a mark."""
    found = {}
    for name, field in spec.model_fields.items():
        mark = _mark(field, Decides)
        if mark is None:
            raise TypeError(f"{spec.__name__}.{name}: mark it with what it decides: {', '.join(Decides.__members__)}")
        found[field.alias or to_camel(name)] = mark
    return found


@cache
def marked_paths(spec: type[ApiModel]) -> Mapping[str, Decides]:
    """Path in `spec` → mark, of each field that carries one: `training`, `training.logSteps`, ..."""
    found: dict[str, Decides] = {}
    for name, mark in marks(spec).items():
        found |= {name: mark, **dict(_own_marks(_block(spec, name), f"{name}."))}
    return found


def _own_marks(model: type[ApiModel] | None, path: str) -> Iterator[tuple[str, Decides]]:
    for name, field in model.model_fields.items() if model else ():
        here = f"{path}{field.alias or to_camel(name)}"
        if mark := _mark(field, Decides):
            yield here, mark
        yield from _own_marks(model_in(field.annotation), f"{here}.")


def _block(model: type[ApiModel], name: str) -> type[ApiModel] | None:
    """The type of the object in the field that is called `name` in a manifest."""
    return next(
        model_in(field.annotation)
        for python_name, field in model.model_fields.items()
        if (field.alias or to_camel(python_name)) == name
    )


def immutable(spec: type[ApiModel]) -> tuple[Rule, ...]:
    """A job is what its manifest said when it was created: CEL for the fields of `spec` that never change."""
    found, paths = [], marked_paths(spec)
    for name, mark in marks(spec).items():
        if mark.value.changes is not Changes.NEVER:
            continue
        others = [path for path in paths if path.startswith(f"{name}.")]
        unchanged, excepted = _unchanged("self", "oldSelf", spec, name), ""
        block = _block(spec, name)
        if others and block:
            fixed = [outer for field in block.model_fields if f"{name}.{(outer := to_camel(field))}" not in others]
            inner = " && ".join(_unchanged(f"self.{name}", f"oldSelf.{name}", block, field) for field in fixed)
            if is_always_there(spec, name):
                unchanged = inner
            else:
                unchanged = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || ({inner}))"
            excepted = f", except {', '.join(path.removeprefix(f'{name}.') for path in others)}"
        message = f"spec.{name} cannot change once the job exists{excepted}; create another job for another {name}"
        found.append(Rule(unchanged, message))
    return tuple(found)


STOPPED_STATES = ("Failed", "Planned")
"""Members of `status.State` in which a job has no pods, other than Suspended."""


def fixed_while_at_work(spec: type[ApiModel]) -> tuple[Rule, ...]:
    """CEL for the fields of `spec` that may change only while no pods work with them: rules of the whole object,
    because its status says so.
    """
    states = ", ".join(f"'{state}'" for state in STOPPED_STATES)
    stopped = (
        "self.spec.suspend || oldSelf.spec.suspend ||"
        f" (has(oldSelf.status) && has(oldSelf.status.state) && oldSelf.status.state in [{states}])"
    )
    found = []
    for path, mark in marked_paths(spec).items():
        if mark.value.changes is Changes.WHILE_STOPPED:
            block, _, field = f"spec.{path}".rpartition(".")
            model = _block(spec, path.partition(".")[0]) if "." in path else spec
            assert model is not None
            unchanged = _unchanged(f"self.{block}", f"oldSelf.{block}", model, field)
            message = (
                f"spec.{path} cannot change while pods work with it; set spec.suspend: true first, or change it after"
                " the job has failed"
            )
            found.append(Rule(f"({unchanged}) || {stopped}", message))
    return tuple(found)


def _unchanged(after: str, before: str, model: type[ApiModel], name: str) -> str:
    """CEL: the field `name` of two objects of the type `model` is the same, or missing in both."""
    new, old = f"{after}.{name}", f"{before}.{name}"
    if is_always_there(model, name):
        return f"{new} == {old}"
    return f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"


def is_always_there(model: type[ApiModel], name: str) -> bool:
    """Whether each stored object has the field that is called `name` in a manifest: it is required, or the CRD has a
    default for it, which it has not for lists and maps.
    """
    field = next(field for key, field in model.model_fields.items() if (field.alias or to_camel(key)) == name)
    default = field.get_default(call_default_factory=True)
    return field.is_required() or not (default is None or isinstance(default, list | dict))


def result_part(spec: ApiModel) -> dict[str, Any]:
    """The part of a spec that decides the result, as JSON-ready data with outer names."""
    kept = {mark for mark in Decides if mark.value.in_result}
    marks(type(spec))  # every field has its own, so that none inherits the last argument
    return _part(spec.dump(), type(spec), kept, Decides.RESULT)


def planned_part(spec: ApiModel) -> dict[str, Any]:
    """The part of a spec with which `prepare` plans the run again, as JSON-ready data with outer names."""
    return _part(spec.dump(), type(spec), {mark for mark in Decides if mark.value.planned}, Decides.RESULT)


@once_for_each
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
    fields = _fields(model, type(inherited))
    found: dict[str, Any] = {}
    for name, value in data.items():
        own_mark, below = fields.get(name, (None, None))
        mark = own_mark or inherited
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


@cache
def _fields(model: type[ApiModel], kind: type[Mark]) -> dict[str, tuple[Mark | None, type[ApiModel] | None]]:
    """Outer name of each field of `model` → its own mark, and the type of the objects in it."""
    return {
        field.alias or to_camel(name): (_mark(field, kind), model_in(field.annotation))
        for name, field in model.model_fields.items()
    }


def _mark(field: FieldInfo, kind: type[Mark]) -> Mark | None:
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)
