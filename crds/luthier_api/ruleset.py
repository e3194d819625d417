"""The rules of a kind as its CRD has them: those of all objects of the spec, as two rules of the root.

The API server evaluates each rule with each write, also of a status: ratcheting makes an error of an unchanged field a
warning, but leaves no evaluation out (Kubernetes 1.35, `cel.Validator.validateExpressions`). And each step of a path
copies the schemas of all fields beside it (`model.Structural.Properties`). So 140 rules made 49,000 allocations in each
status write. As two rules they stand behind one comparison, which tells that only the status is written: 800.

Rules of the items of a list, and of a text, stay where they are: they are evaluated only where there is such a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic.alias_generators import to_camel

from luthier_api.base import ApiModel, Rule, model_in
from luthier_api.decides import is_always_there
from luthier_api.kinds import KindInfo
from luthier_api.marks import TabledSpec, holds_a_list, rules_of

WRITES = "writes"
"""Field of a status that differs after each write of it (`status.JobStatus.writes`)."""
SIZED = re.compile(r"\.\w+\(|\bsize\(|\bstring\(| in [^\[]|[=!]= [a-zA-Z]")
"""CEL whose cost depends on the size of a value. The API server knows the limit of a size only by the path from `self`,
not through a variable, and refuses a CRD whose cost it cannot limit.
"""
TOO_MANY = "more is wrong than fits into one message; `luthier plan --quick` shows it all"
"""When the messages together are longer than 5 KiB."""


def root_rules(info: KindInfo) -> list[dict[str, Any]]:
    """`x-kubernetes-validations` of the root of a kind. Those of names alone stay by themselves: names never change."""
    rules = [*info.model.rules, *rules_of_blocks(info.spec, "spec")]
    names = [{"rule": rule.cel, "message": rule.message} for rule in rules if "self.spec" not in rule.cel]
    about_spec = [rule for rule in rules if "self.spec" in rule.cel]
    standing = _as_one(
        [rule for rule in about_spec if not rule.transition],
        "(oldSelf.hasValue() && self.spec == oldSelf.value().spec)",
        variables(info.spec),
    )
    updates = _as_one([rule for rule in about_spec if rule.transition], "self.spec == oldSelf.spec", [])
    return [*names, standing | {"optionalOldSelf": True}, updates]


def _as_one(rules: Sequence[Rule], unchanged: str, paths: Sequence[str]) -> dict[str, Any]:
    """One rule that holds where only the status is written, where `unchanged` holds, or where all of `rules` hold.

    The API server writes a status or the rest of an object, never both, so that one number of the status is enough.
    To compare the spec costs thirty times as much; it lets pass what changes only labels, annotations or finalizers,
    also of a job that an earlier version has accepted. `paths`: what the rules read through variables.
    """
    only_status = f"self.?status.?{WRITES} != oldSelf.?status.?{WRITES}"
    texts = [f"(({rule.cel}) ? '' : {json.dumps(f'{rule.message}. ', ensure_ascii=False)})" for rule in rules]
    return {
        "rule": f"{only_status} || {unchanged} || ({_all_hold([rule.cel for rule in rules], paths)})",
        "messageExpression": _sum(texts),
        "message": TOO_MANY,
        "fieldPath": ".spec",
    }


def _all_hold(expressions: Sequence[str], paths: Sequence[str]) -> str:
    """CEL: all of `expressions` hold. Each of `paths` is read once: a creation makes 11,000 allocations, not 45,000.

    Raises ValueError for a rule that asks `has` of one of `paths`, which CEL cannot compile: they are always there.
    """
    if not paths:
        return " && ".join(f"({cel})" for cel in expressions)
    sized = [cel for cel in expressions if SIZED.search(cel)]
    inner = " && ".join(f"({cel})" for cel in expressions if not SIZED.search(cel))
    for path in sorted(paths, key=len, reverse=True):
        if f"has({path})" in inner:
            raise ValueError(f"{path} is always there: leave has({path}) out of the rule")
        inner = re.sub(rf"(?<![\w.]){re.escape(path)}\b", _variable(path), inner)
    for path in sorted(paths, key=len, reverse=True):
        above, _, field = path.rpartition(".")
        inner = f"[{_variable(above) if above in paths else above}.{field}].all({_variable(path)}, {inner})"
    return " && ".join([*(f"({cel})" for cel in sized), inner])


def _variable(path: str) -> str:
    return path.removeprefix("self.").replace(".", "_")


def variables(spec: type[TabledSpec]) -> list[str]:
    """Paths from `self` on that many rules read: objects that are always there, and what chooses a row of a table."""
    chosen = {f"self.spec.{table.selector}" for table in spec.tables.values()}
    return ["self.spec", *_always_there(spec, "self.spec"), *sorted(chosen)]


def _always_there(model: type[ApiModel], path: str) -> Iterator[str]:
    for name, below in blocks(model).items():
        if is_always_there(model, name):
            yield f"{path}.{name}"
            yield from _always_there(below, f"{path}.{name}")


def _sum(texts: Sequence[str]) -> str:
    """CEL: these texts as one. In halves, because CEL limits how deep an expression is."""
    if len(texts) == 1:
        return texts[0]
    half = len(texts) // 2
    return f"({_sum(texts[:half])} + {_sum(texts[half:])})"


def rules_of_blocks(model: type[ApiModel], path: str, present: str = "") -> Iterator[Rule]:
    """The rules of `model`, an object at `path`, and of all objects below it that are in no list, as rules of the root.

    `present`: CEL for whether the object is there, if it may be missing. Raises ValueError for a rule that says what
    may change in an object that may be missing: it would not see that the object comes or goes.
    """
    for rule in rules_of(model):
        if rule.transition and present:
            raise ValueError(f"{path}: a rule on updates belongs to an object that is always there: {rule.message}")
        cel = re.sub(r"\boldSelf\b", f"oldSelf.{path}", re.sub(r"\bself\b", f"self.{path}", rule.cel))
        yield Rule(f"!({present}) || ({cel})" if present else cel, rule.message_at(path))
    for name, below in blocks(model).items():
        here = f"{path}.{name}"
        is_set = present if is_always_there(model, name) else " && ".join(filter(None, (present, f"has(self.{here})")))
        yield from rules_of_blocks(below, here, is_set)


def blocks(model: type[ApiModel]) -> dict[str, type[ApiModel]]:
    """Outer name → type, of the fields of `model` that are objects."""
    found = {}
    for name, field in model.model_fields.items():
        below = model_in(field.annotation)
        if below is not None and not holds_a_list(field.annotation):
            found[field.alias or to_camel(name)] = below
    return found
