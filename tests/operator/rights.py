"""What the chart lets the operator do, read from the chart; `fake_api` refuses everything else, as the real API server
would.
"""

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
    """The rules of the operator's role, whether it is a ClusterRole or one of each namespace, and of the one for its
    Lease.
    """
    found = re.findall(r'define "luthier.\w*[rR]ules" -}}\n(.*?){{- end }}', NAMES.read_text(), re.DOTALL)
    assert len(found) == 2
    rules: list[dict[str, Any]] = yaml.safe_load("".join(re.sub("{{.*?}}", "name", text) for text in found))
    return frozenset(
        Right(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    )


GRANTED = granted()
