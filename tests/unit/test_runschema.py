"""What the shape of the run config is drawn from, and what is refused rather than lost on the way. `test_shape` holds
it against the types.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier_api.base import Format
from luthier_api.run import RUNS
from luthier_api.runschema import draw, render

FORM = {Format.EXTENSION: Format("^a+$", "must be a's", never="aaa")}
DRAWN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "what says nothing about the shape",
        {"type": "string", "title": "A", "description": "a", "default": ""},
        {"type": "string"},
    ),
    (
        "bounds",
        {"type": "integer", "minimum": 1, "exclusiveMaximum": 9},
        {"type": "integer", "minimum": 1, "exclusiveMaximum": 9},
    ),
    ("one word", {"type": "string", "const": "a"}, {"type": "string", "enum": ["a"]}),
    (
        "or nothing",
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
        {"type": ["integer", "null"], "minimum": 1},
    ),
    (
        "a word or nothing",
        {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]},
        {"type": ["string", "null"], "enum": ["a", None]},
    ),
    ("a reference", {"$ref": "#/$defs/A", "$defs": {"A": {"type": "boolean"}}}, {"type": "boolean"}),
    (
        "a format",
        {"type": "string"} | FORM,
        {"type": "string", "pattern": "^a+$", "words": "must be a's", "not": {"type": "string", "pattern": "aaa"}},
    ),
    (
        "keys of a map",
        {"type": "object", "propertyNames": FORM, "additionalProperties": True},
        {
            "type": "object",
            "propertyNames": {"pattern": "^a+$", "words": "must be a's", "not": {"type": "string", "pattern": "aaa"}},
            "additionalProperties": True,
        },
    ),
    (
        "fields",
        {"type": "object", "properties": {"title": {"type": "string", "title": "T"}}, "required": ["title"]},
        {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    ),
]


@pytest.mark.parametrize(("schema", "expect"), [c[1:] for c in DRAWN], ids=[c[0] for c in DRAWN])
def test_drawn(schema: dict[str, Any], expect: dict[str, Any]) -> None:
    assert draw(schema) == expect


LOST: list[tuple[str, dict[str, Any], str]] = [
    ("a union", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "neither one thing nor null"),
    ("a keyword that nobody has thought of", {"type": "string", "format": "date"}, "no word for format"),
    (
        "a pattern without words",
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}},
        "no word for pattern",
    ),
]


@pytest.mark.parametrize(("schema", "message"), [c[1:] for c in LOST], ids=[c[0] for c in LOST])
def test_nothing_is_lost(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(schema)


def test_there_is_a_schema_for_each_kind() -> None:
    assert list(json.loads(render())["kinds"]) == list(RUNS)
