"""What fits into a termination log: a message as JSON, shortened until the kubelet keeps all of it.

Works on plain data, because PID 1 also reports an environment in which the types of `termination` cannot be imported.
"""

from __future__ import annotations

import json
from typing import Any

LIMIT_BYTES = 4096  # kubelet cuts a termination message there


def encode(message: dict[str, Any]) -> bytes:
    """JSON of at most LIMIT_BYTES: the output's lines are shortened first (from their beginning), then notices are left
    out (from their end), then the message is cut.
    """
    data = _without_some_notices(dict(message))
    for field in ("lastLines", "message"):
        value = str(data.get(field, ""))
        # A character is at most 6 bytes of JSON (\u001b), so a sixth of the excess is never too much; repeat until it
        # fits.
        while (excess := len(_dumps(data)) - LIMIT_BYTES) > 0 and value:
            cut = max(1, excess // 6)
            value = value[cut:] if field == "lastLines" else value[:-cut]
            data[field] = value
    return _dumps(data)


def _without_some_notices(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with as many of its notices as fit beside everything but the output's lines; the last one says how many
    are left out.
    """
    notices = list(data.get("notices", []))
    rest = {name: value for name, value in data.items() if name != "lastLines"}
    for kept in range(len(notices), -1, -1):
        left_out = len(notices) - kept
        more = [f"{left_out} more notices are in the log"] if left_out else []
        data["notices"] = rest["notices"] = notices[:kept] + more
        if len(_dumps(rest)) <= LIMIT_BYTES:
            break
    if not notices:
        data.pop("notices")
    return data


def _dumps(data: dict[str, Any]) -> bytes:
    # A name of a file that is no UTF-8 must not cost the message.
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
