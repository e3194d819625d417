"""Converts how a pod ended into one termination message: from the messages of its ranks, the exit of its process, and
what PID 1 did to it. Pure: no I/O, no clock.

When one rank fails, its peers fail a moment later as a consequence. The message to send is the cause, so messages are
ordered by `ExitCode.cause_rank`. A rank that a signal ended leaves no message: the order of deaths tells that it was
the first.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from luthier_api.exitcodes import ERROR_RANK, EXTERNAL_SIGNALS, ExitCode, Retry, ended_by
from luthier_api.status import Phase
from luthier_api.termination import TerminationMessage
from luthier_trainer.runtime import gpu_errors
from luthier_trainer.supervisor.process_tree import Death
from luthier_trainer.supervisor.stacks import Position

# Without them, pods of `prepare` and `publish` have the request of the chart, and no limit but that of a LimitRange.
_RAISE = "Raise it, and if the namespace has a LimitRange, have the administrator raise that"
MORE_MEMORY: Mapping[Phase, tuple[str, str]] = {
    "prepare": ("spec.prepare.memory", f"{_RAISE}. Fewer rows (split) need less"),
    "run": ("spec.resources.memory", "Raise it, or lower batch sizes or maxLength"),
    "publish": ("spec.publish.memory", _RAISE),
}

NO_LIMIT = (
    "The job sets no limit: the node itself ran out of memory, or a LimitRange of the namespace sets a limit. Set it to"
    " what the run needs, or lower batch sizes or maxLength"
)
# When one process has ended, torch's agent sends SIGTERM to the others, and SIGKILL 30 s later.
CONSEQUENCE_SECONDS = 20.0
POSITIONS_NAMED = 4  # in a message


@dataclass(frozen=True)
class Evidence:
    """What is known once the phase's process has ended."""

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
    last_step: int | None = None
    """The step of the last heartbeat."""
    positions: Sequence[Position] = ()
    """Where the ranks of this pod were, when it hung."""
    deaths: Sequence[Death] = ()
    """How the processes of the ranks ended, in their order."""
    memory_limit: str | None = None
    """`spec.resources.memory`."""
    memory_kills: int = 0
    """Processes that the kernel killed for their memory."""
    gpu_error: str = ""
    """The line of the output with an error of CUDA or NCCL: their threads abort a process without an exception."""


def judge(evidence: Evidence) -> TerminationMessage:
    """The pod's termination message. The container exits with its code."""
    messages = evidence.messages
    done = [m for m in messages.values() if m.code == ExitCode.COMPLETED]
    if messages and len(done) == len(messages) and (evidence.status == 0 or len(done) >= evidence.processes):
        # Teardown may still fail (torch's exit barrier, threads of a library): the result is complete by then.
        return messages[min(messages)]
    verdict = _cause(evidence)
    if evidence.stopped and verdict.code != ExitCode.PREEMPTED:
        # The cluster stopped the pod: a failure after that is not charged to the job. A real one will happen again.
        return _message(
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
        # A rank ends with 75 only after all ranks have agreed to stop: the connection broke because one had already
        # exited.
        first = next((m for m in failed if m.code == ExitCode.PREEMPTED), first)
    if first and first.exit_code and first.exit_code.retry is Retry.NEVER:
        return first
    if e.killed == "stop":
        return _message(e.phase, ExitCode.PREEMPTED, "stopped; the next start continues from here")
    if e.killed == "grace":
        return _message(
            e.phase,
            ExitCode.PREEMPTED,
            "the grace period ended before a checkpoint was saved",
            saved=False,
            step=_step(e.messages),
        )
    if e.memory_kills:
        field, remedy = MORE_MEMORY[e.phase]
        if e.phase == "run" and not e.memory_limit:
            remedy = NO_LIMIT
        return _message(
            e.phase,
            ExitCode.HOST_OUT_OF_MEMORY,
            f"{field}: the container ran out of memory and the kernel killed a process. {remedy}",
        )
    if e.killed == "hang":
        return _hang(e)
    silent = _silent(e)
    aborted = silent is not None and silent.status == -signal.SIGABRT  # as libraries do when they lose a peer
    if silent and not aborted:
        return _without_message(e, silent.status, f"rank {silent.rank}", silent.rank)
    # A process that was killed from outside had survived the errors of CUDA before it.
    ended_by_itself = e.phase == "run" and -e.status not in EXTERNAL_SIGNALS
    found = gpu_errors.match(e.gpu_error) if ended_by_itself else None
    if found and (first is None or first.code == ExitCode.PEER_LOST):
        code, remedy = found
        return _message(e.phase, code, f"{e.gpu_error.strip()}. {remedy}".removesuffix(". "), step=_step(e.messages))
    if silent and (first is None or first.code == ExitCode.PEER_LOST):
        return _without_message(e, silent.status, f"rank {silent.rank}", silent.rank)
    return first or _without_message(e, e.status, "the process")


def _silent(e: Evidence) -> Death | None:
    """The end of a rank without a message that caused the others to fail. None where no rank ended so.

    Of several, one that was killed or that crashed comes before one that aborted.
    """
    found = []
    for death in e.deaths if e.processes > 1 else ():
        left = e.messages.get(death.rank)
        if left is not None and left.code not in (ExitCode.COMPLETED, ExitCode.PEER_LOST):
            break  # that one has failed by itself, and torch's agent has ended those that follow
        if left is not None or death.at - e.deaths[0].at > CONSEQUENCE_SECONDS:
            continue
        by_agent = death.status is None or death.status == -signal.SIGTERM
        if not by_agent or death is e.deaths[0]:
            found.append(death)
    return min(found, key=lambda death: death.status == -signal.SIGABRT, default=None)


def _without_message(e: Evidence, status: int | None, who: str, rank: int | None = None) -> TerminationMessage:
    """About a process that left no message. `status`: as in `Death`. `who`: it, as the subject of a sentence."""
    if status is None:
        code, text = ExitCode.INFRASTRUCTURE_ERROR, f"{who} ended without a message; see its last lines"
    elif status == 0:
        code, text = ExitCode.TRAINING_ERROR, f"{who} ended with 0 but left no result; see its last lines"
    elif status > 0:
        code = ExitCode.of(status) or ExitCode.TRAINING_ERROR
        text = f"{who} ended with {status} and left no message; see its last lines"
    else:
        code, text = ExitCode.INFRASTRUCTURE_ERROR, f"{who} {ended_by(-status)}; see its last lines"
    return _message(e.phase, code, text, step=_step(e.messages), rank=rank)


def _hang(e: Evidence) -> TerminationMessage:
    """About a run that PID 1 ended because it made no progress."""
    text = f"no step for {e.silence:.0f} s"
    if e.last_step is not None:
        text += f" after step {e.last_step}"
    positions = sorted(e.positions, key=lambda position: position.answered)  # those that keep the others waiting first
    named = [f"rank {position.rank} {position.text}" for position in positions[:POSITIONS_NAMED]]
    if len(positions) > POSITIONS_NAMED:
        named.append(f"{len(positions) - POSITIONS_NAMED} more")
    if named:
        text += f": {', '.join(named)}"
    text += ". The stacks of all threads are in the log"
    rank = positions[0].rank if positions and not positions[0].answered else None
    return _message(e.phase, ExitCode.HANG, text, step=_step(e.messages), rank=rank)


def _cause_rank(message: TerminationMessage) -> tuple[int, int]:
    """A key for sorting, by code and then by rank: the message with the smallest one is the cause of the others."""
    code = message.exit_code
    return ERROR_RANK if code is None else code.cause_rank, message.rank or 0


def _step(messages: Mapping[int, TerminationMessage]) -> int | None:
    return max((m.step for m in messages.values() if m.step is not None), default=None)


def _message(
    phase: Phase,
    code: ExitCode,
    message: str,
    *,
    saved: bool | None = None,
    step: int | None = None,
    rank: int | None = None,
) -> TerminationMessage:
    return TerminationMessage(
        phase=phase, code=code, reason=code.reason, message=message, saved=saved, step=step, rank=rank
    )
