"""What fits into a termination log: a message as JSON, shortened until the kubelet keeps all of it.

Works on plain data, because PID 1 may have to write before it has time for types. Neighbour: `termination`, whose messages these are.
"""

from __future__ import annotations

import json
from typing import Any

LIMIT_BYTES = 4096  # kubelet cuts a termination message there


def encode(message: dict[str, Any]) -> bytes:
    """JSON of at most LIMIT_BYTES: the output's lines are shortened first (from their beginning), then the message."""
    data = dict(message)
    for field in ("lastLines", "message"):
        value = str(data.get(field, ""))
        # A character is at most 6 bytes of JSON (\u001b), so a sixth of the excess is never too much; repeat until it fits.
        while (excess := len(_dumps(data)) - LIMIT_BYTES) > 0 and value:
            cut = max(1, excess // 6)
            value = value[cut:] if field == "lastLines" else value[:-cut]
            data[field] = value
    return _dumps(data)


def _dumps(data: dict[str, Any]) -> bytes:
    # A name of a file that is no UTF-8 must not cost the message.
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
