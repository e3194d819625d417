"""The audit log of an API server, which lies beside the kubeconfig of a cluster of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def requests(path: Path, user: str, since: str) -> list[dict[str, Any]] | None:
    """The requests of a user since a time (RFC 3339, UTC); None where there is no log."""
    if not path.exists():
        return None
    with path.open() as lines:
        entries = [json.loads(line) for line in lines if f'"username":"{user}"' in line]
    return [entry for entry in entries if entry["requestReceivedTimestamp"] >= since]
