"""Marks on the fields of a spec: to which tasks or methods a field belongs.

A field that is marked with `For` has no default in the CRD. The tables (`tasks`, `methods`) say which members it
belongs to and what it is there when left out. From the mark are drawn the CEL rule that refuses the field elsewhere,
the text of `kubectl explain`, the pages, and the value that consumers read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, ClassVar, Protocol, Self, TypeVar, get_args, get_origin

from pydantic import ModelWrapValidatorHandler, model_validator
from pydantic.alias_generators import to_camel

from luthier_api.base import ApiModel, Rule, model_in, once_for_each
from luthier_api.decides import immutable, is_always_there, marked_paths

Spec = TypeVar("Spec", bound="TabledSpec")
Block = TypeVar("Block", bound=ApiModel)


@dataclass(frozen=True)
class For:
    """The field belongs to those members of a table whose row names it in its `fields`. All others refuse it."""

    table: str
    """Name of the table in `TabledSpec.tables`."""
    remedy: str = ""
    """What to do where it is refused, if that is more than to remove it or to choose a member to which it belongs."""


def by_table() -> Any:
    """The default of a field that is marked with `For`: none in the CRD. Reading a spec fills in what the tables say.

    Such a field is typed as its value, because it has one wherever it belongs; elsewhere it is None.
    """
    return None


class Row(Protocol):
    @property
    def fields(self) -> Mapping[str, Any]:
        """Path in the spec → default, of the fields that belong to this member of the table; None: no default."""
        ...


@dataclass(frozen=True)
class Table:
    """A table that a kind of job chooses a row of."""

    rows: Mapping[Any, Row]
    selector: str
    """Path in the spec of the field that chooses the row."""
    noun: str
    """What a row is called in messages."""


class TabledSpec(ApiModel):
    """A spec whose fields depend on the rows that it chooses."""

    tables: ClassVar[Mapping[str, Table]] = {}
    """Name of the table, as marks have it → the table."""

    @model_validator(mode="wrap")
    @classmethod
    def _with_defaults(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The one place where defaults that depend on the tables are filled in."""
        if isinstance(data, cls):  # a part of another object, such as the run config: they are filled in
            return data
        return with_defaults(handler(data))


@dataclass(frozen=True)
class MarkedField:
    """A field of a spec with `For` marks."""

    path: str
    """From the spec on; `[]` stands for the items of a list."""
    marks: tuple[For, ...]
    absent: str
    """CEL: whether a spec leaves the field out."""


@cache
def marked_fields(spec: type[TabledSpec]) -> tuple[MarkedField, ...]:
    """All fields below `spec` that are marked with `For`."""
    return tuple(_marked(spec, path="", this="self", present=""))


def _marked(model: type[ApiModel], path: str, this: str, present: str) -> Iterator[MarkedField]:
    """The marked fields of `model`, which is at `path`.

    `this`: CEL for such an object. `present`: CEL for whether it is there, where `%s` stands for what follows.
    """
    for name, field in model.model_fields.items():
        outer = field.alias or to_camel(name)
        here, value = f"{path}{outer}", f"{this}.{outer}"
        is_set = _joined(present, f"has({value})")
        if marks := tuple(mark for mark in field.metadata if isinstance(mark, For)):
            yield MarkedField(here, marks, f"!({is_set})" if " && " in is_set else f"!{is_set}")
        below = model_in(field.annotation)
        if below is None:
            continue
        if holds_a_list(field.annotation):
            item = f"item{here.count('[]')}"
            yield from _marked(below, f"{here}[].", item, _joined(is_set, f"{value}.exists({item}, %s)"))
        else:
            there = _joined(present, f"has({value}) && %s") if "%s" in present else is_set
            yield from _marked(below, f"{here}.", value, present if is_always_there(model, outer) else there)


def _joined(present: str, cel: str) -> str:
    if "%s" in present:
        return present.replace("%s", cel)
    return f"{present} && {cel}" if present else cel


def holds_a_list(annotation: Any) -> bool:
    """Whether a field of this type is a list, or may be one."""
    return get_origin(annotation) is list or any(holds_a_list(part) for part in get_args(annotation))


def members(spec: type[TabledSpec], field: MarkedField, mark: For) -> tuple[str, ...]:
    """The members of the mark's table to which the field belongs."""
    return tuple(name for name, row in spec.tables[mark.table].rows.items() if field.path in row.fields)


def defaults(spec: type[TabledSpec], field: MarkedField) -> dict[str, Any]:
    """Member → default, for the members of all tables that give the field one."""
    rows = _all_members(spec, field)
    return {name: row.fields[field.path] for name, row in rows.items() if row.fields[field.path] is not None}


def _all_members(spec: type[TabledSpec], field: MarkedField) -> dict[str, Row]:
    rows = [row for mark in field.marks if mark.table in spec.tables for row in spec.tables[mark.table].rows.items()]
    return {name: row for name, row in rows if field.path in row.fields}


@cache
def rules_of(model: type[ApiModel]) -> tuple[Rule, ...]:
    """The CEL rules of an object: those of its type, and those that are drawn from marks."""
    if not issubclass(model, TabledSpec):
        return model.rules
    return (
        *immutable(model),
        *model.rules,
        *(rule for field in marked_fields(model) for rule in _refusals(model, field)),
    )


def _refusals(spec: type[TabledSpec], field: MarkedField) -> Iterator[Rule]:
    path = f"spec.{field.path}".replace("[]", "")
    for mark in field.marks:
        if mark.table not in spec.tables:
            continue
        table, names = spec.tables[mark.table], members(spec, field, mark)
        if not names:
            kind = spec.__name__.removesuffix("Spec")
            yield Rule(field.absent, f"{path}: does not apply to a {kind}; remove it")
        elif len(names) < len(table.rows):
            choice = f"choose that {table.noun}" if len(names) == 1 else "choose one of these"
            remedy = mark.remedy or f"remove it, or {choice}"
            yield Rule(
                f"{field.absent} || self.{table.selector} in {_cel_list(names)}",
                f"{path}: applies to {', '.join(names)}; {remedy}",
            )


def works_with(
    member: str,
    allowed: Mapping[Any, Sequence[str]],
    field: str,
    values: Collection[str],
    why: Mapping[Any, str] | None = None,
) -> list[Rule]:
    """Rules that a member of a table works with some values of another field only.

    `member`, `field`: the fields that hold the two, as paths in the spec; `?` stands before a step that may be missing.
    `allowed`: member → values, out of `values`. A member with all of them needs no rule, nor one with none: its rows do
    not name the field, so that a mark refuses it. `why`: member → the reason, for the message.
    """
    guards = [cel for path in (member, field) if (cel := _missing(path))]
    member, field = member.replace("?", ""), field.replace("?", "")
    rules = []
    for name, some in allowed.items():
        if some and set(some) != set(values):
            choice = "choose that" if len(some) == 1 else "choose one of these"
            reason = f" ({why[name]})" if why and why.get(name) else ""
            rules.append(
                Rule(
                    " || ".join([*guards, f"self.{member} != '{name}'", f"self.{field} in {_cel_list(some)}"]),
                    f"spec.{field}: {name} works with {', '.join(some)}; {choice}, or another {member}{reason}",
                )
            )
    return rules


def _missing(path: str) -> str:
    """CEL: whether a step of `path` that may be missing (`model.?quantization.type`) is so."""
    before, optional, after = path.partition("?")
    return f"!has(self.{before}{after.partition('.')[0]})" if optional else ""


def _cel_list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{text}'" for text in texts) + "]"


def explained(spec: type[TabledSpec], field: MarkedField) -> str:
    """Sentences for `kubectl explain`: to what the field belongs, and what it is when left out."""
    found = []
    for mark in field.marks:
        if mark.table not in spec.tables:
            continue
        table, names = spec.tables[mark.table], members(spec, field, mark)
        if not names:
            found.append(f"Not for a {spec.__name__.removesuffix('Spec')}.")
        elif len(names) < len(table.rows):
            found.append(f"Only for {table.noun} {', '.join(names)}.")
    default = default_text(spec, field)
    return " ".join([*found, *([f"Default: {default}."] if default else [])])


def default_text(spec: type[TabledSpec], field: MarkedField) -> str:
    """What the field is when left out, as pages show it; which members have which default, where that differs."""
    shown = {name: json.dumps(value) for name, value in defaults(spec, field).items() if value != {}}
    if len(set(shown.values())) == 1 and len(shown) == len(_all_members(spec, field)):
        return next(iter(shown.values()))
    return ", ".join(f"{value} ({name})" for name, value in shown.items())


def with_defaults(spec: Spec) -> Spec:
    """`spec` with the marked fields that it leaves out, where they belong to the rows that it chooses."""
    return _filled(spec, _default_tree(type(spec), _chosen(spec)))


def written_part(spec: TabledSpec) -> dict[str, Any]:
    """`spec` as JSON-ready data with outer names, without what reading it fills in again."""
    data: dict[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    # The fields of a block before the block.
    for path, default in reversed(_table_defaults(type(spec), _chosen(spec))):
        *above, name = path.split(".")
        blocks: list[Any] = [data]
        for part in above:
            blocks.append(blocks[-1].get(part, {}))
        if blocks[-1].get(name) == default:
            del blocks[-1][name]
            if len(above) > 1 and not blocks[-1]:  # such a block may be left out, too
                del blocks[-2][above[-1]]
    return data


@once_for_each
def digests(spec: TabledSpec) -> dict[str, str]:
    """Path → hash, of each field whose change makes a failed job go on. Of what has its default there is none: a later
    version may add fields.
    """
    data = written_part(spec)
    found = {}
    for path, mark in marked_paths(type(spec)).items():
        value: Any = data
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if mark.value.resumes and value is not None:
            found[path] = sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    return found


def _chosen(spec: TabledSpec) -> tuple[Any, ...]:
    """The rows that `spec` chooses, by their names, in the order of its tables."""
    return tuple(_value(spec, table.selector) for table in spec.tables.values())


@cache
def _table_defaults(spec: type[TabledSpec], chosen: tuple[Any, ...]) -> tuple[tuple[str, Any], ...]:
    """Path → default, of the marked fields that belong to the rows `chosen`, blocks before their fields."""
    rows = {name: table.rows[row].fields for (name, table), row in zip(spec.tables.items(), chosen, strict=True)}
    found = []
    for field in marked_fields(spec):
        fields = [rows[mark.table] for mark in field.marks if mark.table in rows]
        if fields and all(field.path in some for some in fields):
            default = next((some[field.path] for some in fields if some[field.path] is not None), None)
            if default is not None:
                found.append((field.path, default))
    return tuple(found)


class _Defaults:
    """The default of a field that is left out, and the defaults of the fields below it."""

    def __init__(self) -> None:
        self.value: Any = None
        self.below: dict[str, _Defaults] = {}


@cache
def _default_tree(spec: type[TabledSpec], chosen: tuple[Any, ...]) -> dict[str, _Defaults]:
    """Outer name of a field → its defaults, for a spec that chooses the rows `chosen`."""
    tree: dict[str, _Defaults] = {}
    for path, default in _table_defaults(spec, chosen):
        *above, name = path.split(".")
        here = tree
        for block in above:
            here = here.setdefault(block, _Defaults()).below
        here.setdefault(name, _Defaults()).value = default
    return tree


def settings_of(spec: TabledSpec) -> dict[str, Any]:
    """Path → value, of the marked fields that belong to the rows that `spec` chooses, for people to read. Blocks and
    lists are left out, and options within a block that have their default, such as the epsilon of an optimiser.
    """
    found, table = {}, dict(_table_defaults(type(spec), _chosen(spec)))
    for field in marked_fields(type(spec)):
        value = None if "[]" in field.path else _value(spec, field.path)
        is_usual = field.path.count(".") > 1 and value == table.get(field.path)
        if value is not None and not isinstance(value, ApiModel) and not is_usual:
            found[field.path] = value
    return found


def _value(model: Any, path: str) -> Any:
    """What is at `path`; None where there is nothing that could hold it."""
    for name in path.split("."):
        if model is None:
            return None
        model = getattr(model, _attribute(type(model), name))
    return model


def _filled(model: Block, tree: Mapping[str, _Defaults]) -> Block:
    """`model` with the defaults of `tree` where there is no value. A copy for all of them: copies take most of the time
    of reading a job.
    """
    changed = {}
    for outer, default in tree.items():
        name = _attribute(type(model), outer)
        before = value = getattr(model, name)
        if value is None and default.value is not None:
            block = model_in(type(model).model_fields[name].annotation)
            value = block.model_validate(default.value) if block else copy.copy(default.value)
        if default.below and value is not None:
            value = _filled(value, default.below)
        if value is not before:
            changed[name] = value
    return model.model_copy(update=changed) if changed else model


def _attribute(model: type[ApiModel], outer: str) -> str:
    """Python's name of the field that is called `outer` in a manifest."""
    return _attributes(model)[outer]


@cache
def _attributes(model: type[ApiModel]) -> Mapping[str, str]:
    """Name of each field in a manifest → Python's name."""
    return {field.alias or to_camel(name): name for name, field in model.model_fields.items()}
