"""The termination message of a pod: JSON, written by the supervisor, read by the operator and by `luthier run`."""

from __future__ import annotations

from pydantic import Field
from pydantic_core import from_json

from luthier_api.base import ApiModel
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Figures, HubStatus, Phase, Prepared, TrackedRun
from luthier_api.stored import read_known
from luthier_api.terminationlog import encode


class TerminationMessage(ApiModel):
    """How the pod ended."""

    phase: Phase
    code: int
    reason: str
    message: str = ""
    """For the user: the path of the field, what was found, what to do."""
    rank: int | None = None
    """Global rank of the process that failed first, if there is one."""
    step: int | None = None
    """Step of the newest verified checkpoint. Of a shard: number of outputs in the workspace."""
    saved: bool | None = None
    """After a stop: whether a checkpoint was saved for it."""
    last_lines: str = ""
    seconds: float | None = None
    prepared: Prepared | None = None
    metrics: Figures | None = None
    hub: HubStatus | None = None
    tracking: list[TrackedRun] | None = None
    notices: list[str] = Field(default_factory=list)
    """What the user should know although nothing has failed: what was left out, changed, newly initialised or chosen.
    """

    def encode(self) -> bytes:
        """As JSON that fits into a termination log."""
        return encode(self.dump())

    @classmethod
    def read(cls, text: str | None) -> TerminationMessage | None:
        """The message in `text`, or None for any other text (of another image, or the end of an output).

        What another version of the image has added is ignored.
        """
        try:
            document = from_json(text or "")
            return read_known(cls, document) if isinstance(document, dict) else None
        except ValueError:
            return None

    @property
    def exit_code(self) -> ExitCode | None:
        return ExitCode.of(self.code)
