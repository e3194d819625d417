"""The exit codes of the container `trainer`. The failure rules of Jobs and JobSets and the reasons of conditions are
derived from them.

64 to 78 follow sysexits.h where it has a code for the case; 79 and above are Luthier's own.
"""

from __future__ import annotations

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
        """The failing codes of one retry class, ascending."""
        return sorted(int(c) for c in cls if c.retry is retry and c != 0)


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
