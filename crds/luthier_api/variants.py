"""CEL rules of objects that choose their kind by a field `type`, drawn from a table of the kinds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from luthier_api.base import Rule


class Variant(Protocol):
    """What a row of such a table says."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the object that this kind takes, besides its type."""
        ...

    @property
    def required(self) -> tuple[str, ...]:
        """Those of them that it cannot do without."""
        ...

    @property
    def credentials(self) -> tuple[tuple[str, ...], ...]:
        """Which credentials `secretRef.keys` may name: one of these sets."""
        ...


def rules(block: str, table: Mapping[Any, Variant]) -> Iterator[Rule]:
    """The rules of an item of the list `block`: which fields each type takes, and which credentials."""
    for field in sorted({field for kind in table.values() for field in kind.fields}):
        names = [name for name, kind in table.items() if field in kind.fields]
        if len(names) < len(table):
            yield Rule(
                f"!has(self.{field}) || self.type in {_texts(names)}",
                f"{block}.{field}: belongs to {' and '.join(names)}; remove it",
            )
    every = list(dict.fromkeys(one for kind in table.values() for some in kind.credentials for one in some))
    for name, kind in table.items():
        for field in kind.required:
            yield Rule(
                f"self.type != '{name}' || has(self.{field})",
                f"{block}.{field}: {name} cannot do without; set it",
            )
        if kind.credentials:
            sets = " || ".join(f"({_only(some, every)})" for some in kind.credentials)
            yield Rule(
                f"!has(self.secretRef) || self.type != '{name}' || {sets}",
                f"{block}.secretRef.keys: {name} takes "
                + ", or ".join(" and ".join(some) for some in kind.credentials),
            )


def _only(some: Collection[str], every: Iterable[str]) -> str:
    """CEL: whether `secretRef.keys` names these credentials and no others."""
    return " && ".join(f"{'' if name in some else '!'}has(self.secretRef.keys.{name})" for name in every)


def _texts(names: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"
