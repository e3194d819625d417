"""Quantities of Kubernetes: which ones a field takes, what they are worth, and how the API server writes them.

"1024Mi" is "1Gi", "0.5" is "500m", "1e3" is "1k". The forms mean the same, but after Kueue has admitted a JobSet it
owns the canonical text, and any other would be a conflict.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from luthier_api.base import Format

BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
DECIMAL = ("", "k", "M", "G", "T", "P", "E")
PARTS = {"m": 10**3, "u": 10**6, "n": 10**9}
WRITTEN = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")

# The grammar of apimachinery's resource.Quantity, without what is zero or below.
ABOVE_ZERO = "[+]?([0-9]*[1-9][0-9]*([.][0-9]*)?|[0-9]*[.][0-9]*[1-9][0-9]*)"
EXPONENT = "[eE][-+]?[0-9]{1,2}"


@dataclass(frozen=True)
class QuantityFormat(Format):
    """A format of quantities. As in Kubernetes, 16 may stand for "16"; here it becomes the text."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            self._as_text, super().__get_pydantic_core_schema__(source, handler)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return super().__get_pydantic_json_schema__(schema, handler) | {"x-kubernetes-int-or-string": True}

    def _as_text(self, value: Any) -> str:
        """Raises PydanticCustomError for what is neither a whole number nor a text."""
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise PydanticCustomError("format", self.words)
        return str(value)

    def cel(self, text: str) -> str:
        return f"type({text}) == int ? {text} > 0 : {super().cel(text)}"


Bytes = Annotated[
    str,
    Field(max_length=32),
    QuantityFormat(
        f"^{ABOVE_ZERO}([KMGTPE]i|[kMGTPE]|{EXPONENT})?$",
        "must be an amount above zero, in bytes, such as 200Gi or 512Mi",
    ),
]
Cores = Annotated[
    str,
    Field(max_length=32),
    QuantityFormat(
        f"^{ABOVE_ZERO}([num]|{EXPONENT})?$", 'must be a number of cores above zero, such as 4, "0.5" or 500m'
    ),
]

GpuBytes = Annotated[
    str,
    Field(max_length=32),
    Format(  # a number without a unit would be bytes
        "^([1-9][0-9]{0,3}([.][0-9]{1,3})?(Gi|G)|[1-9][0-9]{3,6}(Mi|M)|[1-9][0-9]?([.][0-9]{1,3})?(Ti|T))$",
        "must be the memory of one GPU, with its unit, such as 80Gi",
    ),
]


def split(quantity: str) -> tuple[Fraction, str]:
    """Value in base units, and the suffix it was written with. Raises ValueError for what is no quantity."""
    written = WRITTEN.fullmatch(quantity)
    if not written:
        raise ValueError(f"{quantity!r} is not a quantity")
    number, suffix = Fraction(written[1]), written[2]
    if suffix in PARTS:
        return number / PARTS[suffix], suffix
    if suffix.endswith("i"):
        return number * 1024 ** BINARY.index(suffix), suffix
    return number * 1000 ** DECIMAL.index(suffix), suffix


def canonical(quantity: str) -> str:
    """The same amount with the largest suffix that needs no fraction, rounded up to whole bytes or thousandths."""
    value, suffix = split(quantity)
    if suffix.endswith("i"):
        return _largest(math.ceil(value), 1024, BINARY)
    if value.denominator != 1:
        return f"{math.ceil(value * 1000)}m" if math.ceil(value * 1000) % 1000 else str(math.ceil(value))
    return _largest(int(value), 1000, DECIMAL)


def amount(quantity: str) -> Fraction:
    """Value in base units. Raises ValueError for what is no quantity."""
    return split(quantity)[0]


def cores(quantity: str) -> int:
    """Whole cores in a CPU quantity, at least one. Raises ValueError for what is no quantity."""
    return max(1, int(split(quantity)[0]))


def _largest(value: int, base: int, suffixes: tuple[str, ...]) -> str:
    power = 0
    while value and value % base == 0 and power + 1 < len(suffixes):
        value, power = value // base, power + 1
    return f"{value}{suffixes[power]}"
