"""The last word of a pod: one JSON document, written by the supervisor, read by the operator and by `luthier run`."""

from __future__ import annotations

from pydantic import Field

from luthier_api.base import ApiModel
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Figures, HubStatus, Phase, Prepared
from luthier_api.terminationlog import encode


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
    notices: list[str] = Field(default_factory=list)
    """What the user should know although nothing failed: what was dropped, changed, drawn anew or chosen."""

    def encode(self) -> bytes:
        """As JSON that the kubelet keeps whole."""
        return encode(self.dump())

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
