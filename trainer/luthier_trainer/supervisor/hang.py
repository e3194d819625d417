"""When a run counts as hung: too long without a heartbeat.

The limit is the job's (`scheduling.stepTimeoutSeconds`). Where the job sets none, the administrator's is an upper
bound, and a run whose steps have all been short gets a shorter limit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from luthier_api.run import FineTuneRun, GenerateRun, step_timeout_of
from luthier_api.status import Plan
from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE

START_FACTOR, START_SECONDS = 3, 1800.0  # loading, compilation and the first allocation come before the first heartbeat
# Of a limit that is derived from the steps so far. Ten minutes are more than a volume usually takes to come back.
HEARTBEATS_SEEN, LONGEST_FACTOR, LEAST_SECONDS = 20, 20, 600.0


@dataclass(frozen=True)
class StepLimit:
    """How long a run may be without a heartbeat, in seconds."""

    seconds: float
    is_derived: bool = False
    """Whether `seconds` is an upper bound, and the limit follows from the heartbeats so far."""
    save_seconds: float = 0
    """Planned time of a save, which may pass without a heartbeat. A slow volume takes twice as long."""

    @classmethod
    def of(cls, run: FineTuneRun | GenerateRun, plan: Plan | None) -> StepLimit:
        """The limit of a run."""
        return cls(
            seconds=step_timeout_of(run),
            is_derived=run.spec.scheduling.step_timeout_seconds is None,
            save_seconds=(plan and plan.save_seconds) or 0,
        )

    def before_first_step(self) -> float:
        return max(START_FACTOR * self.seconds, START_SECONDS)

    def between_steps(self, heartbeats: int, longest: float) -> float:
        """The limit after so many heartbeats, of which no two were more than `longest` seconds apart."""
        limit = self.seconds
        if self.is_derived and heartbeats >= HEARTBEATS_SEEN:
            limit = min(limit, max(LEAST_SECONDS, LONGEST_FACTOR * longest))
        return max(limit, 2 * self.save_seconds)


class HeartbeatWatch:
    """Watches the heartbeat files by the monotonic clock: changes of their times count, not the times themselves."""

    def __init__(self, run_dir: Path, limit: StepLimit) -> None:
        self._starting, self._heartbeat = run_dir / STARTING_FILE, run_dir / HEARTBEAT_FILE
        self._limit = limit
        self._seen: tuple[int | None, int | None] = (None, None)
        self._since = time.monotonic()
        self._count, self._longest = 0, 0.0
        self.step: int | None = None
        """The last step of a training that has a heartbeat."""

    @property
    def silence(self) -> float:
        """Seconds since the last heartbeat."""
        return time.monotonic() - self._since

    @property
    def limit(self) -> float:
        """Seconds without a heartbeat after which the run is lost."""
        if self._seen[1] is None:
            return self._limit.before_first_step()
        return self._limit.between_steps(self._count, self._longest)

    def lost(self) -> bool:
        """Whether there has been no heartbeat for too long."""
        seen = changed_at(self._starting), changed_at(self._heartbeat)
        if seen != self._seen:
            if self._seen[1] is not None:  # the time before the first step says nothing about the steps
                self._longest = max(self._longest, self.silence)
                self._count += 1
            self._seen, self._since = seen, time.monotonic()
            self.step = step_in(self._heartbeat) or self.step
        return self.silence > self.limit


def changed_at(file: Path) -> int | None:
    """When `file` was last written, in ns; None when it is not there."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def step_in(file: Path) -> int | None:
    """The step that `file` names. None where it names none, as while it is being written."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None
