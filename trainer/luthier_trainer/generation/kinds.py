"""The types of the columns of generated rows, which follow from all lines and not from the first ones.

`datasets` infers the types from the first lines of one file, and fails if a column is null there and text later.
"""

from __future__ import annotations

from typing import Any

Kind = str | dict[str, Any] | list[Any] | None
"""A dtype, the fields of an object, the kind of the items of a list, or None if all values so far are null."""


def kind_of(value: Any) -> Kind:
    """Return the kind of a value of JSON."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: kind_of(inner) for name, inner in value.items()}
    if isinstance(value, list):
        kind: Kind = None
        for item in value:
            kind = merged(kind, kind_of(item))
        return [kind]
    return {bool: "bool", int: "int64", float: "float64", str: "string"}[type(value)]


def merged(one: Kind, other: Kind) -> Kind:
    """Return the kind that can represent the values of both kinds."""
    if one is None or one == other:
        return other
    if other is None:
        return one
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: merged(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [merged(one[0], other[0])]
    return "float64" if {str(one), str(other)} == {"int64", "float64"} else "string"
