"""The last word of a pod: one JSON document, written by the supervisor, read by the operator and by `luthier run`."""

from __future__ import annotations

import json
from typing import Any

from luthier_api.base import ApiModel
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Figures, HubStatus, Phase, Prepared

LIMIT_BYTES = 4096  # kubelet cuts a termination message there


class TerminationMessage(ApiModel):
    """What happened in this pod."""

    phase: Phase
    code: int
    reason: str
    message: str = ""
    """For the user: the path of the field, what was found, what to do."""
    rank: int | None = None
    """Global rank of the process that failed, when one process is to blame."""
    step: int | None = None
    """Of the newest verified checkpoint; of a shard, how many outputs lie in the workspace."""
    saved: bool | None = None
    """After a stop: whether a checkpoint was saved for it."""
    last_lines: str = ""
    seconds: float | None = None
    prepared: Prepared | None = None
    metrics: Figures | None = None
    hub: HubStatus | None = None

    def encode(self) -> bytes:
        """JSON of at most LIMIT_BYTES: the output's lines are shortened first (from their beginning), then the message."""
        data = self.dump()
        for field in ("lastLines", "message"):
            value = str(data.get(field, ""))
            # A character is at most 6 bytes of JSON (\u001b), so a sixth of the excess is never too much; repeat until it fits.
            while (excess := len(_dumps(data)) - LIMIT_BYTES) > 0 and value:
                cut = max(1, excess // 6)
                value = value[cut:] if field == "lastLines" else value[:-cut]
                data[field] = value
        return _dumps(data)

    @classmethod
    def read(cls, text: str | None) -> TerminationMessage | None:
        """The message in `text`, or None when it is not one (an image that is not ours, an output's tail)."""
        try:
            return cls.model_validate_json(text or "")
        except ValueError:
            return None

    @property
    def exit_code(self) -> ExitCode | None:
        return ExitCode.of(self.code)


def _dumps(data: dict[str, Any]) -> bytes:
    # A name of a file that is no UTF-8 must not cost the message.
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
