"""The base of every API type, and the rules that travel with it into the CRD: those of objects in CEL, those of texts
as patterns.

`validation` evaluates the same rules where there is no API server.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Rule:
    """One CEL rule. Its message opens with the field that the user should look at, from the name of the rule's object
    on: `hub.repo: ...`.
    """

    cel: str
    message: str

    @property
    def transition(self) -> bool:
        """Whether it compares with the object before: such a rule holds on updates only."""
        return "oldSelf" in self.cel

    def message_at(self, path: str) -> str:
        """The message, with the whole path of the rule's object, which may have indexes."""
        name = path.rpartition(".")[2].partition("[")[0]
        begins = name and re.match(rf"{name}[.:]", self.message)
        return path + self.message.removeprefix(name) if begins else self.message


@dataclass(frozen=True)
class Format:
    """How a text has to be written: `pattern` in the syntax of RE2, without quotes; `words` follow the path of the
    field.

    JSON Schema would show the pattern alone, which tells nobody what to write. So the CRD has it as a rule with these
    words.
    """

    pattern: str
    words: str
    never: str | None = None
    """What must stand nowhere in it: RE2 cannot look ahead, so that one pattern could not say both."""

    EXTENSION: ClassVar = "x-luthier-format"
    """Where the JSON schema has it, for `crd`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        matches: CoreSchema = core_schema.str_schema(pattern=self.pattern)
        if self.never:
            matches = core_schema.no_info_after_validator_function(self._without, matches)
        told = core_schema.custom_error_schema(matches, "format", custom_error_message=self.words)
        return core_schema.chain_schema([handler(source), told])

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), self.EXTENSION: self}

    def _without(self, text: str) -> str:
        """Raises ValueError if `never` occurs in `text`."""
        if self.never and re.search(self.never, text):
            raise ValueError(self.words)
        return text

    def cel(self, text: str) -> str:
        """CEL: whether `text`, itself an expression, is written so."""
        return f"{text}.matches('{self.pattern}')" + (f" && !{text}.matches('{self.never}')" if self.never else "")


@dataclass(frozen=True)
class Shortened:
    """A text of a status that is cut to so many characters: the API server would refuse the whole status for it."""

    characters: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.cut, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "maxLength": self.characters}

    def cut(self, text: str) -> str:
        return text if len(text) <= self.characters else text[: self.characters - 1] + "…"


@dataclass(frozen=True)
class ListType:
    """How the API server merges a list when several clients apply it (`x-kubernetes-list-type`). Lists without one are
    replaced whole: they are atomic.
    """

    name: Literal["set", "map"]
    key: str | None = None
    """Of a map: the field of its items that no two of them share, by its outer name."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._without_duplicates, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        keys = {"x-kubernetes-list-map-keys": [self.key]} if self.key else {}
        return {**handler(schema), "x-kubernetes-list-type": self.name, **keys}

    def _without_duplicates(self, items: list[Any]) -> list[Any]:
        """Raises PydanticCustomError, because pydantic opens the message of a ValueError with words of its own."""
        values = [item.dump()[self.key] for item in items] if self.key else items
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            field = self.key or "value"
            raise PydanticCustomError(
                "duplicate", f"two items have the {field} {{value}}; each must be there once", {"value": repr(twice)}
            )
        return items


SET = ListType("set")


def map_by(key: str) -> ListType:
    """A list whose items differ in `key`, their field by its outer name."""
    return ListType("map", key)


class ApiModel(BaseModel):
    """camelCase outside, snake_case inside; frozen; unknown fields are errors. What stands below a field is its
    description (`crd`).
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        # PID 1 reads one kind, and fast: nothing is built at import, so defaults that are objects come from factories.
        defer_build=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    """CEL rules of this object."""
    texts_of: ClassVar[type[ApiModel] | None] = None
    """The type in whose source the texts of the fields stand, of a type that is drawn from it."""

    def dump(self) -> dict[str, object]:
        """As JSON-ready data with the names users write; fields that are not set are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


Model = TypeVar("Model", bound=ApiModel)
Value = TypeVar("Value")


def once_for_each(function: Callable[[Model], Value]) -> Callable[[Model], Value]:
    """`function`, called once for each object, whose value is remembered as long as the object exists.

    Objects are frozen, and the spec of a job is the same one in all decisions about it (`stored`). The value is shared:
    nobody may change it.
    """
    known: dict[int, tuple[weakref.ref[Model], Value]] = {}

    @functools.wraps(function)
    def remembered(model: Model) -> Value:
        identity = id(model)
        found = known.get(identity)
        if found is not None and found[0]() is model:
            return found[1]
        value = function(model)
        known[identity] = weakref.ref(model, lambda _: known.pop(identity, None)), value
        return value

    return remembered


def model_in(annotation: Any) -> type[ApiModel] | None:
    """The type of objects that `annotation` holds: itself, as an option, or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := model_in(part))), None)
