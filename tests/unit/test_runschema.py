"""What the shape of the run config is drawn from, and what is refused rather than lost on the way. `test_shape` holds
it against the types.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from luthier_api.base import Format
from luthier_api.run import RUNS
from luthier_api.runschema import draw, render

FORM = {Format.EXTENSION: Format("^a+$", "must be a's", never="aaa")}


@dataclass(frozen=True)
class DrawnCase:
    name: str
    schema: dict[str, Any]
    expect: dict[str, Any]


DRAWN = [
    DrawnCase(
        name="what says nothing about the shape",
        schema={"type": "string", "title": "A", "description": "a", "default": ""},
        expect={"type": "string"},
    ),
    DrawnCase(
        name="bounds",
        schema={"type": "integer", "minimum": 1, "exclusiveMaximum": 9},
        expect={"type": "integer", "minimum": 1, "exclusiveMaximum": 9},
    ),
    DrawnCase(
        name="one word",
        schema={"type": "string", "const": "a"},
        expect={"type": "string", "enum": ["a"]},
    ),
    DrawnCase(
        name="or nothing",
        schema={"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
        expect={"type": ["integer", "null"], "minimum": 1},
    ),
    DrawnCase(
        name="a word or nothing",
        schema={"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]},
        expect={"type": ["string", "null"], "enum": ["a", None]},
    ),
    DrawnCase(
        name="a reference",
        schema={"$ref": "#/$defs/A", "$defs": {"A": {"type": "boolean"}}},
        expect={"type": "boolean"},
    ),
    DrawnCase(
        name="a format",
        schema={"type": "string"} | FORM,
        expect={
            "type": "string",
            "pattern": "^a+$",
            "words": "must be a's",
            "not": {"type": "string", "pattern": "aaa"},
        },
    ),
    DrawnCase(
        name="keys of a map",
        schema={"type": "object", "propertyNames": FORM, "additionalProperties": True},
        expect={
            "type": "object",
            "propertyNames": {"pattern": "^a+$", "words": "must be a's", "not": {"type": "string", "pattern": "aaa"}},
            "additionalProperties": True,
        },
    ),
    DrawnCase(
        name="fields",
        schema={"type": "object", "properties": {"title": {"type": "string", "title": "T"}}, "required": ["title"]},
        expect={"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    ),
]


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_drawn(case: DrawnCase) -> None:
    assert draw(case.schema) == case.expect


@dataclass(frozen=True)
class LostCase:
    name: str
    schema: dict[str, Any]
    message: str


LOST = [
    LostCase(
        name="a union",
        schema={"anyOf": [{"type": "string"}, {"type": "integer"}]},
        message="neither one thing nor null",
    ),
    LostCase(
        name="a keyword that nobody has thought of",
        schema={"type": "string", "format": "date"},
        message="no word for format",
    ),
    LostCase(
        name="a pattern without words",
        schema={"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}},
        message="no word for pattern",
    ),
]


@pytest.mark.parametrize("case", LOST, ids=lambda case: case.name)
def test_nothing_is_lost(case: LostCase) -> None:
    with pytest.raises(ValueError, match=case.message):
        draw(case.schema)


def test_there_is_a_schema_for_each_kind() -> None:
    assert list(json.loads(render())["kinds"]) == list(RUNS)
