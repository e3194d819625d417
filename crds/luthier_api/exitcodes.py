"""How a pod ends: the one list of exit codes. JobSet and Job failure rules are rendered from it, conditions take their
reasons from it.

64 to 78 follow sysexits.h where it has a word for the case; 79 and above are ours.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class Retry(Enum):
    """What an end of this class costs."""

    NEVER = "never"
    """The same pod would end the same way: the user has to change something."""
    COUNTED = "counted"
    """Tried again, charged to `restarts.max`."""
    FREE = "free"
    """Tried again, at nobody's charge: the cluster took the pod away."""


class ExitCode(IntEnum):
    """Exit code of the container `trainer`."""

    reason: str
    """CamelCase, as conditions and attempts show it."""
    retry: Retry
    """What an end with this code costs."""

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

    @property
    def cause_rank(self) -> int:
        """Where several processes or pods have failed together, the one with the lowest rank is the cause of the
        others; of equal ones, the first.

        A peer that was lost and an orderly stop are what a failure elsewhere looks like, so these come last.
        """
        if self in CAUSES:
            return CAUSES.index(self)
        return MISTAKE_RANK if self.retry is Retry.NEVER else ERROR_RANK

    @classmethod
    def of(cls, code: int) -> ExitCode | None:
        """The member for `code`, or None for a code that is not ours (137, 1, ...)."""
        try:
            return cls(code)  # type: ignore[call-arg]  # looks the member up
        except ValueError:
            return None

    @classmethod
    def codes(cls, retry: Retry) -> list[int]:
        """The failing codes of one retry class, ascending."""
        return sorted(int(c) for c in cls if c.retry is retry and c != 0)


MISTAKE_RANK, ERROR_RANK = 1, 4
CAUSES: tuple[ExitCode | None, ...] = (
    ExitCode.HOST_OUT_OF_MEMORY,  # the kernel kills without asking, and what is left of the process fails in any way
    None,  # MISTAKE_RANK: every other code that is never retried
    ExitCode.INFRASTRUCTURE_ERROR,
    ExitCode.STORAGE_ERROR,
    None,  # ERROR_RANK: every other code
    ExitCode.PEER_LOST,
    ExitCode.PREEMPTED,
)
"""Codes by `ExitCode.cause_rank`."""
