"""CRDs drawn from the types.

The walk turns pydantic's JSON schema into the structural OpenAPI schema that the API server wants: references inlined,
optional fields without null, no `additionalProperties: false` beside `properties` (strict validation refuses unknown
fields by itself), rules and formats as CEL.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any

import yaml
from pydantic.alias_generators import to_camel
from pydantic.json_schema import GenerateJsonSchema

from luthier_api import GROUP, VERSION
from luthier_api.base import ApiModel, Format, Rule
from luthier_api.kinds import CATEGORY, KINDS, JobKind, KindInfo
from luthier_api.marks import TabledSpec, explained, marked_fields, rules_of
from luthier_api.ruleset import root_rules

HEADER = "# Generated from crds/luthier_api by `make generate`. Do not edit.\n"
LIST_MARKS = {"x-kubernetes-list-type", "x-kubernetes-list-map-keys"}
INT_OR_STRING = "x-kubernetes-int-or-string"
INT32_MAX = 2**31 - 1
KEPT = {
    "type",
    "description",
    "default",
    "enum",
    "format",
    "minimum",
    "maximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
}


class WithFactories(GenerateJsonSchema):
    """Shows the defaults of fields that are objects; pydantic leaves out what comes from a factory."""

    def get_default_value(self, schema: Any) -> Any:
        made = schema["default_factory"]() if schema.get("default_factory") else None
        return made if isinstance(made, ApiModel) else super().get_default_value(schema)


@cache
def descriptions(model: type[ApiModel]) -> dict[str, str]:
    """Field → the text below it in the source. pydantic could read it, at each import: a quarter of what PID 1 takes to
    start.
    """
    if model.texts_of is not None:
        return descriptions(model.texts_of)
    found: dict[str, str] = {}
    for source in reversed([m for m in model.__mro__ if issubclass(m, ApiModel)]):
        (definition,) = ast.parse(dedent(inspect.getsource(source))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[to_camel(name)] = unwrapped(words)
    return found


def unwrapped(text: str) -> str:
    """A docstring without the line breaks of the source; blank lines stay."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def structural(
    schema: dict[str, Any], defs: dict[str, Any], models: dict[str, type[ApiModel]], is_item: bool = False
) -> dict[str, Any]:
    """One node of the JSON schema as a node of a structural schema. Raises ValueError on what Kubernetes cannot
    express.

    `is_item`: whether it is an item of a list, or below one. The rules of other objects stand at the root (`ruleset`).
    """
    if "anyOf" in schema:
        options = [o for o in schema["anyOf"] if o.get("type") != "null"]
        if len(options) != 1:
            raise ValueError(f"not structural: {schema}")
        schema = options[0] | {k: v for k, v in schema.items() if k != "anyOf" and not (k == "default" and v is None)}
    model: type[ApiModel] | None = None
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        model = models.get(name)
        schema = defs[name] | {k: v for k, v in schema.items() if k != "$ref"}
    if "pattern" in schema:
        raise ValueError(f"a pattern without words, use Format: {schema}")
    node = {k: v for k, v in schema.items() if k in KEPT}
    if node.get("default", ...) is None:
        del node["default"]
    if isinstance(node.get("default"), dict):
        # Whole: rules are checked against it before the fields below add theirs
        node["default"] = without_nulls(node["default"])
    if "const" in schema:
        node["enum"] = [schema["const"]]
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in schema:
            node |= {bound: schema[exclusive], exclusive: True}
    if "properties" in schema:
        texts = descriptions(model) if model else {}
        node["properties"] = {
            k: structural(({"description": texts[k]} if k in texts else {}) | v, defs, models, is_item)
            for k, v in schema["properties"].items()
        }
    elif schema.get("additionalProperties") is True:
        node["x-kubernetes-preserve-unknown-fields"] = True
    elif isinstance(schema.get("additionalProperties"), dict):
        node["additionalProperties"] = structural(schema["additionalProperties"], defs, models, is_item)
    if "items" in schema:
        node |= {"x-kubernetes-list-type": "atomic"} | {k: v for k, v in schema.items() if k in LIST_MARKS}
        node["items"] = structural(schema["items"], defs, models, is_item=True)
    if schema.get(INT_OR_STRING):
        del node["type"]
        node[INT_OR_STRING] = True
    if schema.get("type") == "integer":
        node["format"] = "int32" if node.get("maximum", math.inf) <= INT32_MAX else "int64"
    if rules := [*(rules_of(model) if model and is_item else ()), *written(schema)]:
        node["x-kubernetes-validations"] = validations(rules)
    return node


def explain_marks(model: type[TabledSpec], spec: dict[str, Any]) -> None:
    """Add to the descriptions below `spec` what its marks and tables say."""
    for field in marked_fields(model):
        node = spec
        for name in field.path.split("."):
            node = node["properties"][name.removesuffix("[]")]
            node = node["items"] if name.endswith("[]") else node
        node["description"] = " ".join(filter(None, [node.get("description"), explained(model, field)]))


def without_nulls(value: Any) -> Any:
    return {k: without_nulls(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def written(schema: dict[str, Any]) -> Iterator[Rule]:
    """The format of a text, or of the keys of a map (`propertyNames`, which Kubernetes does not know), as a rule."""
    if own := schema.get(Format.EXTENSION):
        yield Rule(own.cel("self"), own.words)
    if keys := schema.get("propertyNames", {}).get(Format.EXTENSION):
        yield Rule(f"self.all(key, {keys.cel('key')})", keys.words)


def validations(rules: Iterable[Rule]) -> list[dict[str, str]]:
    return [{"rule": rule.cel, "message": rule.message} for rule in rules]


def without_defaults(node: Any) -> Any:
    """A status is written by the operator alone: a default there would only hide what it did not say."""
    if isinstance(node, dict):
        return {
            k: without_defaults(v)
            for k, v in node.items()
            if not (k == "default" and not isinstance(v, dict)) and k != "required"
        } | ({"required": node["required"]} if "required" in node else {})
    return [without_defaults(v) for v in node] if isinstance(node, list) else node


def crd(kind: JobKind, info: KindInfo) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind."""
    schema = info.model.model_json_schema(by_alias=True, schema_generator=WithFactories)
    models = {m.__name__: m for m in all_models(ApiModel)}
    root = structural(schema, schema["$defs"], models)
    spec, status = root["properties"]["spec"], without_defaults(root["properties"]["status"])
    explain_marks(info.spec, spec)
    status.pop("default", None)
    columns = [
        {"name": c.name, "jsonPath": c.path, "type": c.type, **({"priority": c.priority} if c.priority else {})}
        for c in info.columns
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {
            "openAPIV3Schema": {
                "type": "object",
                "description": unwrapped(root["description"]),
                "required": ["spec"],
                "properties": {
                    "apiVersion": {"type": "string"},
                    "kind": {"type": "string"},
                    "metadata": {"type": "object"},
                    "spec": spec,
                    "status": status,
                },
                "x-kubernetes-validations": root_rules(info),
            }
        },
    }
    names = {
        "kind": kind.value,
        "plural": info.plural,
        "singular": kind.value.lower(),
        "shortNames": [info.short],
        "categories": [CATEGORY],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{info.plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def all_models(base: type[ApiModel]) -> Iterator[type[ApiModel]]:
    for model in base.__subclasses__():
        yield model
        yield from all_models(model)


def render() -> dict[str, str]:
    """File name → YAML."""
    return {
        f"{info.plural}.yaml": HEADER + yaml.safe_dump(crd(kind, info), sort_keys=False, width=120, allow_unicode=True)
        for kind, info in KINDS.items()
    }
