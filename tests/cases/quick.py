"""Tables of which `make test` takes some cases, because each takes seconds; `make e2e` takes all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *names: str) -> list[Any]:
    """The cases with their names, for `parametrize`: all but those in `names` are slow."""
    found = [pytest.param(c, id=c.name, marks=[] if c.name in names else [pytest.mark.slow]) for c in cases]
    assert {*names} <= {param.id for param in found}, "a name of no case"
    return found
