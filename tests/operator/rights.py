"""What the chart lets the operator do, read from the chart; `fake_api` refuses everything else, as the real API server would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

NAMES = Path(__file__).parents[2] / "charts/luthier/templates/_names.tpl"
VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}


class Right(NamedTuple):
    group: str
    resource: str
    """With its subresource: finetunejobs/status."""
    verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}.{self.group}".rstrip(".")


def granted() -> frozenset[Right]:
    """The rules of the operator's role, whether it is a ClusterRole or one of each namespace. They hold nothing that Helm would fill in."""
    found = re.search(r'define "luthier.rules" -}}\n(.*?){{- end }}', NAMES.read_text(), re.DOTALL)
    assert found
    rules: list[dict[str, Any]] = yaml.safe_load(found[1])
    return frozenset(Right(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"])


GRANTED = granted()
