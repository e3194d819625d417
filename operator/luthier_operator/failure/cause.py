"""Which of several ends is the cause, and why a child (a Job or a JobSet) failed.

A failing pod takes its group along: the others lose their peer or are stopped. `ExitCode.cause_rank` orders the ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luthier_api.conditions import Reason
from luthier_api.exitcodes import ExitCode, Retry, ending
from luthier_api.status import Attempt, Phase
from luthier_operator.failure.pod_end import cause_rank
from luthier_operator.model import Object, PodEnd
from luthier_operator.naming import CONTAINER

EXIT_CODE = re.compile(r"pod \S+?/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
"""In the message of a Job's condition Failed."""


@dataclass(frozen=True)
class Failure:
    """Reason and message of the condition Failed."""

    reason: str
    message: str


def cause(ends: Iterable[PodEnd]) -> PodEnd | None:
    """The failed end that explains the others: the one with the lowest rank, of equal ranks the first."""
    failed = [end for end in ends if end.exit_code != 0]
    return min(failed, key=lambda end: (cause_rank(end), end.ended_at, end.pod), default=None)


def judge(attempts: Sequence[Attempt], phase: Phase, condition: Object) -> Failure:
    """Why the child of `phase` failed: from its attempts, else from its condition Failed."""
    of_phase = [attempt for attempt in attempts if attempt.phase == phase]
    fatal = [attempt for attempt in of_phase if attempt.exit_code in ExitCode.codes(Retry.NEVER)]
    if of_phase:
        return failure_of((fatal or of_phase)[-1])

    text = condition.get("message", "")
    if match := EXIT_CODE.search(text):
        code = int(match["code"])
        ended = ending(code)
        if ExitCode.of(code) is None:
            text = f"{ended.text} ({text})"
        logs = f"`kubectl logs {match['pod']} -c {CONTAINER}`"
        return Failure(ended.code.reason, f"{text}; the pod's own message was not seen. See {logs}")
    explanation = text or condition.get("reason", "") or "the cluster gives no reason"
    return Failure(Reason.FAILED, f"{phase} failed: {explanation}")


def failure_of(attempt: Attempt) -> Failure:
    """The failure that this attempt describes, with its location."""
    return Failure(attempt.reason, f"{attempt.message} ({location(attempt)})")


def repeated_out_of_memory(attempts: Sequence[Attempt]) -> Failure | None:
    """The failure of a group that ran out of memory, where the cluster is about to restart it although it will fail
    again.

    The kernel kills a container as a whole (memory.oom.group, cgroup v2) with exit code 137. The cluster's rules see
    only the exit code, which any SIGKILL has, and after which a restart may help.
    """
    last = next((attempt for attempt in reversed(attempts) if attempt.phase == "run"), None)
    if last is None or not last.charged:
        return None
    if last.reason != ExitCode.HOST_OUT_OF_MEMORY.reason:
        return None
    return failure_of(last)


def location(attempt: Attempt) -> str:
    """Where it failed: `run, rank 1, pod p on node n, exit code 81`."""
    parts: list[str] = [attempt.phase]
    if attempt.rank is not None:
        parts.append(f"rank {attempt.rank}")
    parts.append(f"pod {attempt.pod} on {attempt.node}" if attempt.node else f"pod {attempt.pod}")
    if attempt.exit_code is not None:
        parts.append(f"exit code {attempt.exit_code}")
    return ", ".join(parts)
