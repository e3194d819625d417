"""The exit codes of the container `trainer`. The failure rules of Jobs and JobSets and the reasons of conditions are
derived from them.

64 to 78 follow sysexits.h where it has a code for the case; 79 and above are Luthier's own. All other codes come from a
shell, the container runtime or a signal: `ending` says what they mean.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum


class Retry(Enum):
    """Whether a pod is started again after an exit code of this class, and whether that counts."""

    NEVER = "never"
    """It is not started again, because it would fail in the same way: the user has to change something."""
    COUNTED = "counted"
    """It is started again, and that counts against `restarts.max`."""
    FREE = "free"
    """It is started again, and that does not count: the cluster stopped the pod."""


class ExitCode(IntEnum):
    """Exit code of the container `trainer`."""

    reason: str
    """CamelCase, as conditions and attempts show it."""
    retry: Retry
    """Whether the pod is started again, and whether that counts."""

    def __new__(cls, code: int, reason: str, retry: Retry) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.reason, member.retry = reason, retry
        return member

    COMPLETED = 0, "Completed", Retry.NEVER
    INVALID_SPEC = 64, "InvalidSpec", Retry.NEVER
    INVALID_DATASET = 65, "InvalidDataset", Retry.NEVER
    NOT_FOUND = 66, "NotFound", Retry.NEVER
    HUB_UNAVAILABLE = 69, "HubUnavailable", Retry.COUNTED
    TRAINING_ERROR = 70, "TrainingError", Retry.COUNTED
    INFRASTRUCTURE_ERROR = 71, "InfrastructureError", Retry.COUNTED
    STORAGE_ERROR = 74, "StorageError", Retry.COUNTED
    PREEMPTED = 75, "Preempted", Retry.FREE
    UNAUTHORIZED = 77, "Unauthorized", Retry.NEVER
    MISCONFIGURED = 78, "Misconfigured", Retry.NEVER
    CUDA_OUT_OF_MEMORY = 79, "CudaOutOfMemory", Retry.NEVER
    HANG = 80, "Hang", Retry.COUNTED
    PEER_LOST = 81, "PeerLost", Retry.COUNTED
    DIVERGED = 82, "Diverged", Retry.NEVER
    HOST_OUT_OF_MEMORY = 83, "HostOutOfMemory", Retry.NEVER
    DOES_NOT_FIT = 84, "DoesNotFit", Retry.NEVER

    @property
    def cause_rank(self) -> int:
        """Order of causes. Where several processes or pods fail together, the one with the lowest rank has caused the
        others to fail; of equal ranks, the first.

        A lost peer and an orderly stop come last, because a failure elsewhere causes them.
        """
        if self in CAUSES:
            return CAUSES.index(self)
        return MISTAKE_RANK if self.retry is Retry.NEVER else ERROR_RANK

    @classmethod
    def of(cls, code: int) -> ExitCode | None:
        """The member for `code`, or None for any other code (137, 1, ...)."""
        try:
            return cls(code)  # type: ignore[call-arg]  # looks the member up
        except ValueError:
            return None

    @classmethod
    def codes(cls, retry: Retry) -> list[int]:
        """The failing codes of one retry class, ascending, with those that others than Luthier give."""
        foreign = [code for code, ended in FOREIGN.items() if ended.code.retry is retry]
        return sorted([*(int(c) for c in cls if c.retry is retry and c != 0), *foreign])


MISTAKE_RANK, ERROR_RANK = 1, 4
CAUSES: tuple[ExitCode | None, ...] = (
    ExitCode.HOST_OUT_OF_MEMORY,  # the kernel kills one process, and the others then fail with any code
    None,  # MISTAKE_RANK: every other code that is never retried
    ExitCode.INFRASTRUCTURE_ERROR,
    ExitCode.STORAGE_ERROR,
    None,  # ERROR_RANK: every other code
    ExitCode.PEER_LOST,
    ExitCode.PREEMPTED,
)
"""Exit codes in the order of `ExitCode.cause_rank`."""


@dataclass(frozen=True)
class Ending:
    """What the exit code of a container means, where the container left no message."""

    code: ExitCode
    """The member whose reason and cost fit."""
    text: str
    """For the user, without the number."""


SIGNALED = 128
"""A shell and the container runtime add this to the number of the signal that ended a process."""
EXTERNAL_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM}
"""Sent to a process; a process that crashes gets others."""
SET_IMAGE = (
    "An administrator sets the image by trainer.image (chart): use the one of this version, for this architecture"
)
FOREIGN: Mapping[int, Ending] = {
    126: Ending(ExitCode.MISCONFIGURED, f"the python of the trainer image cannot be executed. {SET_IMAGE}"),
    127: Ending(ExitCode.MISCONFIGURED, f"the trainer image has no python, or lacks one of its libraries. {SET_IMAGE}"),
    128: Ending(ExitCode.INFRASTRUCTURE_ERROR, "the container runtime could not start the container"),
    255: Ending(ExitCode.INFRASTRUCTURE_ERROR, "the container runtime lost the container, or could not start it"),
}


def ending(code: int) -> Ending:
    """What any exit code from 1 to 255 means, where the container left no message."""
    if own := ExitCode.of(code):
        return Ending(own, "the process ended without a message")
    if foreign := FOREIGN.get(code):
        return foreign
    if SIGNALED < code <= SIGNALED + signal.NSIG - 1:
        return Ending(ExitCode.INFRASTRUCTURE_ERROR, f"the process {ended_by(code - SIGNALED)}")
    return Ending(ExitCode.TRAINING_ERROR, "the process ended without a message, with a code that is not Luthier's")


def ended_by(number: int) -> str:
    """How a process ended that a signal has ended, as the predicate of a sentence."""
    if number in EXTERNAL_SIGNALS:
        return f"was killed by {signal_name(number)}, which Luthier did not send: by the kernel, or by somebody"
    return f"crashed with {signal_name(number)}"


def signal_name(number: int) -> str:
    """`SIGKILL`; `signal 41` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
