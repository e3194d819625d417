"""From terminated pods to one cause: what ended an attempt, what it cost, and what the user should read.

A crash takes the whole group along, and the Job controller deletes the survivors at once: the evidence is kept as it is
seen, here as `PodEnd`, in the status as `attempts`. Neighbours: `children` reads objects, `phases` asks `judge` when a
child has failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from luthier_api.conditions import Reason
from luthier_api.exitcodes import ERROR_RANK, ExitCode, Retry
from luthier_api.status import PHASES, Attempt, Phase
from luthier_api.termination import TerminationMessage
from luthier_operator import children
from luthier_operator.children import container, label
from luthier_operator.model import Object, PodEnd
from luthier_operator.naming import CHILD_LABELS, CONTAINER, PHASE_LABEL
from luthier_operator.statuses import moment, text

KEPT = 10  # attempts in a status; etcd and readers bear no more
LINES_CHARACTERS = 1000
NO_EXIT_CODE = -1
"""Of a pod that is gone without its container having told: evicted, or lost with its node."""
DISRUPTED_RANK = -1
NO_PROGRESS_RESTARTS = 3
EXIT_CODE = re.compile(r"pod \S+?/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
NO_LIMIT = (
    "the pod was killed for its memory, though it has no limit of ours: its node was full, or a LimitRange of the"
    " namespace is too small. The administrator can raise jobs.memoryRequest (chart)"
)
OUT_OF_MEMORY: dict[Phase, str] = {
    "prepare": NO_LIMIT,
    "run": "the pod used more memory than its limit; raise spec.resources.memory, or use smaller batches",
    "publish": NO_LIMIT,
}
KILLED = {NO_EXIT_CODE, 137, 143}  # SIGKILL and SIGTERM from outside say nothing of the program


@dataclass(frozen=True)
class Failure:
    """Why a child failed, for the condition Failed."""

    reason: str
    message: str


def pod_end(pod: Object, now: datetime) -> PodEnd | None:
    """How the pod ended; None while its container may still run, and for pods that are not ours. `now` stands in for a
    missing time.
    """
    phase = next((p for p in PHASES if p == label(pod, PHASE_LABEL)), None)
    status, meta = pod.get("status", {}), pod["metadata"]
    ended = container(pod).get("terminated")
    if phase is None or (ended is None and status.get("phase") != "Failed"):
        return None
    number, free = children.attempt(pod)
    raw = (ended or {}).get("message") or status.get("message") or ""
    return PodEnd(
        pod=meta["name"],
        uid=meta["uid"],
        phase=phase,
        attempt=number,
        free_before=free,
        index=children.index(pod),
        node=pod.get("spec", {}).get("nodeName"),
        exit_code=ended["exitCode"] if ended else NO_EXIT_CODE,
        kubernetes_reason=(ended or {}).get("reason") or status.get("reason") or "",
        disrupted=any(
            c["type"] == "DisruptionTarget" and c["status"] == "True" for c in status.get("conditions") or []
        ),
        message=TerminationMessage.read(raw),
        raw_message=raw,
        finished_at=moment(ended["finishedAt"]) if ended and ended.get("finishedAt") else now,
        child=next((uid for name in CHILD_LABELS if (uid := label(pod, name))), ""),
    )


def never(end: PodEnd) -> bool:
    """Whether the cluster does not try again after such an end."""
    return end.exit_code in ExitCode.codes(Retry.NEVER)


def free(end: PodEnd) -> bool:
    return not never(end) and (end.disrupted or end.exit_code in ExitCode.codes(Retry.FREE))


def reason(end: PodEnd) -> str:
    # containerd reports OOMKilled whatever the exit code, so it overrides the code.
    if end.kubernetes_reason == "OOMKilled":
        return ExitCode.HOST_OUT_OF_MEMORY.reason
    if free(end):
        return ExitCode.PREEMPTED.reason
    if code := ExitCode.of(end.exit_code):
        return code.reason
    return (ExitCode.INFRASTRUCTURE_ERROR if end.exit_code in KILLED else ExitCode.TRAINING_ERROR).reason


def cause_rank(end: PodEnd) -> int:
    """`ExitCode.cause_rank` of an end, with what only the cluster knows: a pod that it took away comes before all, and
    the kernel's kill next.
    """
    if end.disrupted and not never(end):
        return DISRUPTED_RANK
    if end.kubernetes_reason == "OOMKilled":
        return ExitCode.HOST_OUT_OF_MEMORY.cause_rank
    code = ExitCode.of(end.exit_code)
    # A pod that was killed from outside may have been killed because of another one, as any pod that failed for no
    # known reason.
    return ERROR_RANK if code is None else code.cause_rank


def cause(ends: Iterable[PodEnd]) -> PodEnd | None:
    """The end that explains the others; of equal ones the first."""
    return min((e for e in ends if e.exit_code != 0), key=lambda e: (cause_rank(e), e.finished_at, e.pod), default=None)


def message(end: PodEnd) -> str:
    """For the user."""
    if end.message and end.message.message:
        return end.message.message
    if end.kubernetes_reason == "OOMKilled":
        return OUT_OF_MEMORY[end.phase]
    lines = [line.strip() for line in end.raw_message.splitlines() if line.strip()]
    if end.disrupted:
        return "the cluster took the pod away" + (f": {lines[-1]}" if lines else "")
    if end.message is None and lines:
        return lines[-1][:500]
    return "the pod is gone without a word" if end.exit_code == NO_EXIT_CODE else "the process ended without a word"


def attempt(end: PodEnd, number: int, step: int | None) -> Attempt:
    """An end as the status keeps it. `step`: of the newest checkpoint known, where the pod does not say."""
    said = end.message.last_lines if end.message else end.raw_message
    return Attempt(
        phase=end.phase,
        attempt=number,
        reason=reason(end),
        exit_code=None if end.exit_code == NO_EXIT_CODE else end.exit_code,
        pod=end.pod,
        rank=end.index if end.phase == "run" else None,
        node=end.node,
        step=end.message.step if end.message and end.message.step is not None else step,
        message=message(end),
        last_lines=said[-LINES_CHARACTERS:],
        charged=not never(end) and not free(end),
        time=text(end.finished_at),
    )


def grouped(
    known: Sequence[Attempt], ends: Sequence[PodEnd], before: int, step: int | None, fatal: bool
) -> list[Attempt]:
    """Attempts of a group of pods: one cause for each restart of the JobSet, revised while evidence comes in.

    `before`: restarts of earlier JobSets. `fatal`: the JobSet has ended over a mistake, so that is what its last
    attempt ended of.
    """
    found = {a.attempt: a for a in known if a.phase == "run"}
    latest = max((e.attempt for e in ends), default=0)
    for number in sorted({e.attempt for e in ends}):
        of_it = [e for e in ends if e.attempt == number]
        mistakes = [e for e in of_it if never(e)] if fatal and number == latest else []
        culprit = cause(mistakes or of_it)
        kept = found.get(before + number)
        # A record whose pod is not known any more was made from evidence that is gone, by an operator before us.
        if culprit and (kept is None or (kept.pod != culprit.pod and kept.pod in {e.pod for e in of_it})):
            steps = [e.message.step for e in of_it if e.message and e.message.step is not None]
            found[before + number] = attempt(culprit, before + number, max(steps, default=step))
    return newest([a for a in known if a.phase != "run"] + list(found.values()))


def single(known: Sequence[Attempt], ends: Sequence[PodEnd], phase: Phase) -> list[Attempt]:
    """Attempts of pods that stand for themselves: each failed one."""
    found = list(known)
    # What has made room for newer ones is still among the ends: it would be numbered anew at each look.
    oldest = (known[0].time or "", known[0].pod or "") if len(known) >= KEPT else ("", "")
    for end in sorted(ends, key=lambda e: (e.finished_at, e.pod)):
        if end.exit_code != 0 and (text(end.finished_at), end.pod) >= oldest and end.pod not in {a.pod for a in found}:
            number = end.attempt or max(
                (
                    a.attempt + 1
                    for a in found
                    if a.phase == phase and a.rank == (end.index if phase == "run" else None)
                ),
                default=0,
            )
            found.append(attempt(end, number, None))
    return newest(found)


def newest(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The last ones, oldest first."""
    return sorted(attempts, key=lambda a: (a.time or "", a.pod or ""))[-KEPT:]


def judge(attempts: Sequence[Attempt], phase: Phase, said: str, why: str = "") -> Failure:
    """Why the child of `phase` failed, from its attempts; without any, from what its condition says (`said`, with the
    reason `why`).
    """
    mine = [a for a in attempts if a.phase == phase]
    mistakes = [a for a in mine if a.exit_code in ExitCode.codes(Retry.NEVER)]
    if mine:
        last = (mistakes or mine)[-1]
        return Failure(last.reason, f"{last.message} ({place(last)})")
    if match := EXIT_CODE.search(said):
        code = ExitCode.of(int(match["code"])) or ExitCode.TRAINING_ERROR
        return Failure(
            code.reason, f"{said}; what the pod said is lost. Look at `kubectl logs {match['pod']} -c {CONTAINER}`"
        )
    return Failure(Reason.FAILED, f"{phase} has failed: {said or why or 'no reason given'}")


def hopeless(attempts: Sequence[Attempt]) -> Failure | None:
    """Says so when a group has run out of memory and the cluster, which knows exit codes alone, is about to try the
    same again.

    The kernel kills a container as a whole (memory.oom.group, cgroup v2): 137, which in itself is anybody's SIGKILL and
    worth a restart.
    """
    last = next((a for a in reversed(attempts) if a.phase == "run"), None)
    if last is None or last.reason != ExitCode.HOST_OUT_OF_MEMORY.reason or not last.charged:
        return None
    return Failure(last.reason, f"{last.message} ({place(last)})")


def place(attempt: Attempt) -> str:
    """Where it happened: `run, rank 1, pod p on node n, exit code 81`."""
    parts = [
        attempt.phase,
        None if attempt.rank is None else f"rank {attempt.rank}",
        f"pod {attempt.pod}" + (f" on {attempt.node}" if attempt.node else ""),
    ]
    return ", ".join(
        [p for p in parts if p] + ([] if attempt.exit_code is None else [f"exit code {attempt.exit_code}"])
    )


def stuck(attempts: Sequence[Attempt]) -> str | None:
    """Says so when the last restarts of a group brought no newer checkpoint: such a job would restart for ever."""
    last = [a for a in attempts if a.phase == "run"][-(NO_PROGRESS_RESTARTS + 1) :]
    numbers = [a.attempt for a in last]
    if (
        len(last) <= NO_PROGRESS_RESTARTS
        or numbers != list(range(numbers[0], numbers[0] + len(last)))
        or len({a.step or 0 for a in last}) > 1
    ):
        return None
    return (
        f"{NO_PROGRESS_RESTARTS} restarts in a row brought no checkpoint after step {last[-1].step or 0};"
        f" {how_it_ended(last[-1])}"
    )


def stuck_shard(ends: Sequence[PodEnd]) -> str | None:
    """The same of shards, each of which restarts alone. A pod that was killed does not say how far it came: it counts
    as progress.
    """
    for index in sorted({e.index for e in ends}):
        last = sorted((e for e in ends if e.index == index), key=lambda e: (e.finished_at, e.pod))[
            -(NO_PROGRESS_RESTARTS + 1) :
        ]
        told = [e.message for e in last if e.message and e.exit_code != 0]
        if len(told) > NO_PROGRESS_RESTARTS and len({m.step or 0 for m in told}) == 1:
            end = attempt(last[-1], 0, None)
            return (
                f"{NO_PROGRESS_RESTARTS} restarts in a row of shard {index} brought no output after the first"
                f" {end.step or 0}; {how_it_ended(end)}"
            )
    return None


def how_it_ended(last: Attempt) -> str:
    return f"the last ended with {last.reason}: {last.message} ({place(last)})"
