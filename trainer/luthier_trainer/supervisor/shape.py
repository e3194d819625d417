"""Whether a run config has the shape that its types ask for, seen without importing them: that alone would take longer
than all of this.

The JSON Schema is drawn from the types (`luthier_api.runschema`), with the words of each format in it. Neighbours:
`gate` reads the document, `luthier_api.validation` says the same to those who write manifests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, cast

from jsonschema_rs import Draft202012Validator, RegexOptions, ValidationError

import luthier_api
from luthier_trainer.supervisor.redaction import redact

SHOWN = 100  # characters of a value: more would push the next problem out of the termination message
TYPES = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}
BOUNDS = {
    "minimum": "must be at least {}",
    "exclusiveMinimum": "must be greater than {}",
    "maximum": "must be at most {}",
    "exclusiveMaximum": "must be less than {}",
    "multipleOf": "must be a multiple of {}",
    "minLength": "must have {} character or more",
    "maxLength": "must have {} characters at most",
    "minItems": "must have {} item or more",
    "maxItems": "must have {} items at most",
    "uniqueItems": "must not hold an item twice",
    "maxProperties": "must have {} entries at most",
}


def problems(document: Any) -> list[str]:
    """One line for each field that is wrong: its path, what is wrong, what was found. Empty for a document that the
    types will take.
    """
    schemas = json.loads(Path(luthier_api.__file__).with_name(luthier_api.RUN_SCHEMA).read_bytes())["kinds"]
    kind = {"type": "object", "properties": {"kind": {"enum": list(schemas)}}, "required": ["kind"]}
    if unsayable := [_line(*fault) for fault in _no_json(document, ())]:
        return unsayable
    return _broken(kind, document) or _broken(schemas[document["kind"]], document)


def _no_json(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """What Python reads, but JSON has no word for: infinities, NaN, halves of a surrogate pair."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, "must be a finite number", value
    elif isinstance(value, str) and not value.isascii() and value != value.encode(errors="replace").decode():
        yield path, "must be Unicode", value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _no_json(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _no_json(key, path)
            yield from _no_json(item, (*path, key))


def _broken(schema: dict[str, Any], document: Any) -> list[str]:
    found: dict[tuple[Any, ...], str] = {}
    for error in validator(schema).iter_errors(document):
        for path, said, *value in _faults(error, schema):
            # One is enough: what is no number is no small number either
            found.setdefault(path, _line(path, said, *value))
    return list(found.values())


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """With the engine for patterns that pydantic has, too."""
    return Draft202012Validator(schema, pattern_options=RegexOptions())


def _faults(error: ValidationError, schema: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Path, words and, where it helps, value of each field that `error` is about."""
    path, kind = tuple(error.instance_path), cast(Any, error.kind)
    *way, keyword = error.schema_path
    node: Any = reduce(lambda below, part: below[part], way, cast(Any, schema))
    match kind.name:
        case "additionalProperties":
            for name in kind.unexpected:
                yield (*path, name), "unknown field" + _meant(name, node["properties"])
        case "required":
            yield (*path, kind.property), "required"
        case "propertyNames":
            yield (*path, kind.error.instance), words(str(keyword), node), kind.error.instance
        case _:
            yield path, words(str(keyword), node), error.instance


def words(keyword: str, node: dict[str, Any]) -> str:
    """What a value must be for `keyword`, in which `node` of the schema."""
    match keyword:
        case "type":
            types = node["type"] if isinstance(node["type"], list) else [node["type"]]
            return f"must be {TYPES[types[0]]}"  # null, where it is among them, is the last
        case "enum":
            *but_last, last = [repr(v) for v in node["enum"] if v is not None]
            return "must be " + (f"{', '.join(but_last)} or {last}" if but_last else last)
        case "pattern" | "not":
            return str(node["words"])
        case "exclusiveMinimum" if "words" in node:  # of a quantity
            return str(node["words"])
    return BOUNDS[keyword].format(node[keyword])


def _meant(name: str, known: dict[str, Any]) -> str:
    import difflib  # costs as much as the rest of the check

    near = difflib.get_close_matches(name, known, 1)
    return f". Did you mean {near[0]!r}?" if near else ""


def _line(path: tuple[Any, ...], said: str, *value: Any) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "run config"
    # Hidden before it is cut: half a token would not be known for one.
    shown = [text if len(text) <= SHOWN else f"{text[:SHOWN]}…" for text in (redact(repr(v)) for v in value)]
    return f"{where}: {said}" + "".join(f" (it is {text})" for text in shown)
