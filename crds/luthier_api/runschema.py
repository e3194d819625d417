"""The shape of the run config as a JSON Schema, one for each kind: drawn from the types, for PID 1, which has no time
to import them.

References are inlined, so that the path of an error leads through the schema. Neighbours: `drawn` writes the file,
`luthier_trainer.shape` checks by it.
"""

from __future__ import annotations

import json
from typing import Any

from luthier_api.base import Format
from luthier_api.run import RUNS

KEPT = {
    "type",
    "enum",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
}
BELOW = {"properties", "additionalProperties", "propertyNames", "items"}
DROPPED = {"title", "description", "default", "$defs"}
"""Says nothing about the shape: a third of the file."""
OF_KUBERNETES = {"x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string"}
"""For the API server."""


def render() -> str:
    """The file: kind → schema."""
    kinds = {kind: draw(model.model_json_schema(by_alias=True)) for kind, model in RUNS.items()}
    return (
        json.dumps(
            {"$comment": "Generated from crds/luthier_api by `make generate`. Do not edit.", "kinds": kinds}, indent=1
        )
        + "\n"
    )


def draw(schema: dict[str, Any], defs: dict[str, Any] | None = None) -> dict[str, Any]:
    """One node of pydantic's JSON schema. Raises ValueError on what would be lost on the way."""
    defs = schema.get("$defs", {}) if defs is None else defs
    if "anyOf" in schema:
        return _or_null(schema["anyOf"], defs)
    if "$ref" in schema:
        schema = defs[schema["$ref"].rsplit("/", 1)[1]]
    if unknown := schema.keys() - KEPT - BELOW - DROPPED - OF_KUBERNETES - {"const", Format.EXTENSION}:
        raise ValueError(f"no word for {', '.join(sorted(unknown))}: {schema}")
    node = {k: v for k, v in schema.items() if k in KEPT}
    if "const" in schema:
        node["enum"] = [schema["const"]]
    if written := schema.get(Format.EXTENSION):
        node |= _written(written)
    if schema.get("x-kubernetes-int-or-string"):
        node |= {"type": ["string", "integer"], "exclusiveMinimum": 0}
    if schema.get("x-kubernetes-list-type") == "set":
        node["uniqueItems"] = True
    for key in BELOW & schema.keys():
        below = schema[key]
        if key == "properties":
            node[key] = {name: draw(field, defs) for name, field in below.items()}
        else:
            node[key] = draw(below, defs) if isinstance(below, dict) else below
    return dict(sorted(node.items()))


def _or_null(options: list[dict[str, Any]], defs: dict[str, Any]) -> dict[str, Any]:
    """An optional field, as one node: an error of a union would not say what is wrong with the value."""
    found = [draw(option, defs) for option in options if option != {"type": "null"}]
    if len(found) != 1 or len(options) != 2:
        raise ValueError(f"neither one thing nor null: {options}")
    types = found[0]["type"] if isinstance(found[0]["type"], list) else [found[0]["type"]]
    node = found[0] | {"type": [*types, "null"]}
    return node | {"enum": [*node["enum"], None]} if "enum" in node else node


def _written(form: Format) -> dict[str, Any]:
    """`words` is ours: what an error says in place of the pattern."""
    never = {"not": {"type": "string", "pattern": form.never}} if form.never else {}
    return {"pattern": form.pattern, "words": form.words} | never
