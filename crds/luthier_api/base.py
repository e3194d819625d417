"""The base of every API type, and the CEL rules that travel with it into the CRD.

Neighbours: `crd` draws the schema and its rules, `validation` evaluates the same rules where no API server does (a laptop).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """One CEL rule. `path` names the field that the user should look at; it opens the message."""

    cel: str
    message: str

    @property
    def transition(self) -> bool:
        """Whether it compares with the object before: such a rule holds on updates only."""
        return "oldSelf" in self.cel


class ApiModel(BaseModel):
    """camelCase outside, snake_case inside; frozen; unknown fields are errors. What stands below a field is its description (`crd`)."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True,
        # PID 1 reads one kind, and fast: nothing is built at import, so defaults that are objects come from factories.
        defer_build=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    """CEL rules of this object."""

    def dump(self) -> dict[str, object]:
        """As JSON-ready data with the names users write; fields that are not set are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
