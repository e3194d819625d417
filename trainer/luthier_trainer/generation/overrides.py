"""The settings of a row that overrides some of those of the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from luthier_api.base import model_in
from luthier_api.inputs import RowOverrides
from luthier_api.task_settings import Settings
from luthier_api.validation import broken_rules


def with_overrides(settings: Settings, overrides: Mapping[str, Any]) -> Settings:
    """Return `settings` with the values of a row. `overrides`: by the names of the fields in a manifest.

    Raises pydantic.ValidationError if a value does not fit its field.
    """
    return type(settings).model_validate({**settings.dump(), **overrides})


def read_overrides(block: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row overrides of a block of settings, with the types of the fields, from cells or a manifest.

    Empty cells override nothing. Raises ValueError, with the field, if a value does not fit it.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ""}
    kind = model_in(RowOverrides.model_fields[block].annotation)
    assert kind is not None
    try:
        return dict(kind.model_validate(given).dump())
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{block}.{name}: {first['msg']}, and not {first['input']!r}") from None


def problem_of(block: str, settings: Settings, overrides: Mapping[str, Any]) -> str | None:
    """Return why the settings of the job do not go together with what a row overrides of them; None if they do."""
    return next(broken_rules(with_overrides(settings, overrides), block), None)
