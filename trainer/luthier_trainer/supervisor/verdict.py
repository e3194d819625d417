"""How a pod ended: one message out of what its ranks said, how its process ended, and what PID 1 did to it. Pure.

When one rank fails, its peers fail of it a moment later; the message to send is the first cause, so messages are
ordered by what they can be a consequence of.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from luthier_api.exitcodes import ERROR_RANK, ExitCode, Retry
from luthier_api.status import Phase
from luthier_api.termination import TerminationMessage
from luthier_trainer.runtime import gpu_errors

# `spec.resources` is for `run` alone: the other phases have the chart's request, and no limit but that of a LimitRange.
_ASK = (
    "Have the administrator raise it in the chart, and the namespace's LimitRange if that sets a limit; spec.resources"
    " is for the run alone"
)
MORE_MEMORY: Mapping[Phase, tuple[str, str]] = {
    "prepare": ("jobs.memoryRequest", f"{_ASK}. Fewer rows (split) need less"),
    "run": ("spec.resources.memory", "Raise it, or lower batch sizes or maxLength"),
    "publish": ("jobs.memoryRequest", _ASK),
}

FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # a process that crashes raises others


@dataclass(frozen=True)
class Evidence:
    """What is known when the phase's process is gone."""

    phase: Phase
    status: int
    """Exit code of the process, or minus the signal that ended it."""
    messages: Mapping[int, TerminationMessage] = field(default_factory=dict)
    """By global rank."""
    processes: int = 1
    """Ranks of this pod that should have left a message."""
    stopped: bool = False
    """Whether PID 1 was told to stop."""
    killed: Literal["stop", "grace", "hang"] | None = None
    """Why PID 1 killed the process."""
    silence: float = 0
    """Seconds without a heartbeat, when it hung."""
    memory_kills: int = 0
    """Processes that the kernel killed for their memory."""
    gpu_error: str = ""
    """The line of the output in which CUDA or NCCL tell why: their threads abort a process without an exception."""


def judge(evidence: Evidence) -> TerminationMessage:
    """The pod's last word. Its code is what the container exits with."""
    messages = evidence.messages
    done = [m for m in messages.values() if m.code == ExitCode.COMPLETED]
    if messages and len(done) == len(messages) and (evidence.status == 0 or len(done) >= evidence.processes):
        # Teardown may still fail (torch's exit barrier, threads of a library): the result is complete by then.
        return messages[min(messages)]
    verdict = _cause(evidence)
    if evidence.stopped and verdict.code != ExitCode.PREEMPTED:
        # The cluster wanted us gone: whatever broke meanwhile is not the job's fault, and comes again if it is.
        return _say(
            evidence.phase,
            ExitCode.PREEMPTED,
            f"stopped before a checkpoint was saved ({verdict.reason}: {verdict.message})",
            saved=any(bool(m.saved) for m in messages.values()),
            step=_step(messages),
        )
    return verdict


def _cause(e: Evidence) -> TerminationMessage:
    failed = sorted((m for m in e.messages.values() if m.code != ExitCode.COMPLETED), key=_cause_rank)
    first = failed[0] if failed else None
    if first and first.code == ExitCode.PEER_LOST:
        # A rank ends with 75 only after all of them have agreed to stop: then the connection broke because one had left
        # already.
        first = next((m for m in failed if m.code == ExitCode.PREEMPTED), first)
    if first and first.exit_code and first.exit_code.retry is Retry.NEVER:
        return first
    if e.killed == "stop":
        return _say(e.phase, ExitCode.PREEMPTED, "stopped; the next start goes on from here")
    if e.killed == "grace":
        return _say(
            e.phase,
            ExitCode.PREEMPTED,
            "the grace period ended before a checkpoint was saved",
            saved=False,
            step=_step(e.messages),
        )
    if e.memory_kills:
        place, remedy = MORE_MEMORY[e.phase]
        return _say(
            e.phase,
            ExitCode.HOST_OUT_OF_MEMORY,
            f"{place}: the container ran out of memory and the kernel killed a process. {remedy}",
        )
    if e.killed == "hang":
        return _say(
            e.phase,
            ExitCode.HANG,
            f"no step for {e.silence:.0f} s; the stacks of all threads are in the log",
            step=_step(e.messages),
        )
    # What CUDA said before a kill, the process had got over
    of_its_own = e.phase == "run" and -e.status not in FROM_OUTSIDE
    if of_its_own and (found := gpu_errors.read(e.gpu_error)) and (first is None or first.code == ExitCode.PEER_LOST):
        code, remedy = found
        return _say(e.phase, code, f"{e.gpu_error.strip()}. {remedy}".removesuffix(". "), step=_step(e.messages))
    if first:
        return first
    if e.status == 0:
        return _say(e.phase, ExitCode.TRAINING_ERROR, "the process ended with 0 but left no result; see its last lines")
    if e.status < 0:
        where = "from outside the container" if -e.status in FROM_OUTSIDE else "of its own; see its last lines"
        return _say(
            e.phase, ExitCode.INFRASTRUCTURE_ERROR, f"the process was ended by {_signal_name(-e.status)} {where}"
        )
    code = ExitCode.of(e.status) or ExitCode.TRAINING_ERROR
    return _say(e.phase, code, f"the process ended with {e.status} and left no message; see its last lines")


def _cause_rank(message: TerminationMessage) -> tuple[int, int]:
    """The smallest is the cause of the others: by code, then by rank."""
    code = message.exit_code
    return ERROR_RANK if code is None else code.cause_rank, message.rank or 0


def _step(messages: Mapping[int, TerminationMessage]) -> int | None:
    return max((m.step for m in messages.values() if m.step is not None), default=None)


def _say(
    phase: Phase, code: ExitCode, message: str, *, saved: bool | None = None, step: int | None = None
) -> TerminationMessage:
    return TerminationMessage(phase=phase, code=code, reason=code.reason, message=message, saved=saved, step=step)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
