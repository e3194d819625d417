"""The failures that a status keeps, as attempts: one for each restart of a group, one for each failed pod otherwise.

They stand in the order in which the operator has seen them, those of a group and of each shard by their number. Clocks
of nodes may be minutes apart, and are never compared.

Also finds restarts that make no progress, which would go on forever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from luthier_api.exitcodes import ExitCode
from luthier_api.status import Attempt, Phase
from luthier_operator.failure.cause import cause, location
from luthier_operator.failure.pod_end import NO_EXIT_CODE, is_fatal, is_uncharged, message, reason
from luthier_operator.model import PodEnd
from luthier_operator.statuses import text

ATTEMPTS_KEPT = 10  # the limit in the CRD
LAST_LINES_CHARACTERS = 1000
NO_PROGRESS_RESTARTS = 3
A_SECOND = timedelta(seconds=1)  # times in a status have whole seconds
EVICTIONS = ATTEMPTS_KEPT  # more than a rolling upgrade of nodes causes; the status knows of no more


def attempt(end: PodEnd, number: int, step: int | None, rank: int | None) -> Attempt:
    """`end` as the status keeps it. `step` of the newest known checkpoint is used where the pod does not report one.

    `rank`: the process that failed, where it is known, or the shard.
    """
    last_lines = end.message.last_lines if end.message else end.raw_message
    reported = end.message.step if end.message else None
    return Attempt(
        phase=end.phase,
        attempt=number,
        reason=reason(end),
        exit_code=None if end.exit_code == NO_EXIT_CODE else end.exit_code,
        pod=end.pod,
        rank=rank,
        node=end.node,
        step=step if reported is None else reported,
        message=message(end),
        last_lines=last_lines[-LAST_LINES_CHARACTERS:],
        charged=not is_fatal(end) and not is_uncharged(end),
        time=text(end.ended_at),
    )


def attempts_of_group(
    known: Sequence[Attempt], ends: Sequence[PodEnd], restarts_before: int, step: int | None, fatal: bool
) -> list[Attempt]:
    """`known` with the attempts of a group of pods: one cause for each restart of the JobSet, revised while ends come
    in.

    `restarts_before`: restarts of earlier JobSets of this job. `fatal`: the JobSet has failed without a restart, so the
    cause of its last attempt is an end after which the cluster does not start it again.
    """
    attempts = list(known)
    by_number = {known_one.attempt: known_one for known_one in known if known_one.phase == "run"}
    latest = max((end.attempt for end in ends), default=0)
    for restart in sorted({end.attempt for end in ends}):
        number = restarts_before + restart
        of_restart = [end for end in ends if end.attempt == restart]
        fatal_ends = [end for end in of_restart if is_fatal(end)] if fatal and restart == latest else []
        found = cause(fatal_ends or of_restart)
        if found is None:
            continue
        kept = by_number.get(number)
        # A record whose pod is unknown was written by an earlier operator process, from ends that are gone: keep it,
        # unless it is an eviction. A queue evicts the group without a restart of the JobSet, so that the pods of the
        # next start have the same number.
        after_eviction = kept is not None and kept.reason == ExitCode.PREEMPTED.reason and not is_uncharged(found)
        revisable = kept is None or kept.pod in {end.pod for end in of_restart} or after_eviction
        if revisable and (kept is None or kept.pod != found.pod):
            reported = [end.message.step for end in of_restart if end.message and end.message.step is not None]
            put_numbered(attempts, attempt(found, number, max(reported, default=step), rank_of(found)))
    return attempts[-ATTEMPTS_KEPT:]


def put_numbered(attempts: list[Attempt], new: Attempt) -> None:
    """Replace the attempt of a group that has the number of `new`, or insert `new` before the next higher one."""
    for position, known in enumerate(attempts):
        if known.phase == new.phase and known.attempt >= new.attempt:
            replaced = 1 if known.attempt == new.attempt else 0
            attempts[position : position + replaced] = [new]
            return
    attempts.append(new)


def attempts_of_pods(known: Sequence[Attempt], ends: Sequence[PodEnd], phase: Phase) -> list[Attempt]:
    """`known` with the attempts of pods that are restarted independently: one for each that failed."""
    found = list(known)
    # Ends that were dropped from `known` to make room are still among `ends`, and must not be added again.
    oldest_kept = ("", "")
    if len(known) >= ATTEMPTS_KEPT:
        oldest_kept = (known[0].time or "", known[0].pod or "")
    failed = [end for end in ends if end.exit_code != 0]  # of thousands of shards most have succeeded
    for end in sorted(one_after_another(failed), key=lambda end: (text(end.ended_at), end.pod)):
        if (text(end.ended_at), end.pod) < oldest_kept:
            continue
        if end.pod not in {known_one.pod for known_one in found}:
            number = max(end.attempt, next_number(found, end, phase))
            found.append(attempt(end, number, None, shard_of(end)))
    return found[-ATTEMPTS_KEPT:]


def one_after_another(ends: Iterable[PodEnd]) -> list[PodEnd]:
    """`ends`, where each attempt of an index ends after the one before it: the nodes that say when may disagree."""
    latest: dict[int, datetime] = {}
    ordered = []
    for end in sorted(ends, key=lambda end: (end.attempt, end.ended_at)):
        if end.index in latest:
            end = replace(end, ended_at=max(end.ended_at, latest[end.index] + A_SECOND))
        latest[end.index] = end.ended_at
        ordered.append(end)
    return ordered


def rank_of(end: PodEnd) -> int | None:
    """The process of a group that failed first in this pod. A pod has several, so its index does not say."""
    return end.message.rank if end.message else None


def shard_of(end: PodEnd) -> int | None:
    """The index of a pod that is restarted alone. None outside `run`, where there is one pod."""
    return end.index if end.phase == "run" else None


def next_number(attempts: Iterable[Attempt], end: PodEnd, phase: Phase) -> int:
    """The number after the last attempt of this pod's index."""
    numbers = [known.attempt for known in attempts if known.phase == phase and known.rank == shard_of(end)]
    return max(numbers) + 1 if numbers else 0


def no_progress_of_group(attempts: Sequence[Attempt]) -> str | None:
    """The message about a group whose last charged restarts brought no newer checkpoint, else None.

    Restarts that are not charged, such as preemptions, may follow each other for as long as the cluster is busy.
    """
    of_run = [known for known in attempts if known.phase == "run"]
    last = [known for known in of_run if known.charged][-(NO_PROGRESS_RESTARTS + 1) :]
    if len(last) <= NO_PROGRESS_RESTARTS:
        return None
    first, end = last[0].attempt, last[-1].attempt
    between = [known for known in of_run if first <= known.attempt <= end]
    none_is_missing = [known.attempt for known in between] == list(range(first, end + 1))
    same_step = len({known.step or 0 for known in between}) == 1
    if not (none_is_missing and same_step):
        return None
    step = last[-1].step or 0
    return f"{NO_PROGRESS_RESTARTS} counted restarts brought no checkpoint after step {step}; {last_end(last[-1])}"


def no_progress_of_shards(ends: Sequence[PodEnd]) -> str | None:
    """The message about the first shard whose last charged restarts brought no further output, else None.

    A pod that was killed does not report how far it came, and is taken for progress.
    """
    charged = [end for end in ends if end.exit_code != 0 and not is_uncharged(end)]
    for index in sorted({end.index for end in charged}):
        of_shard = sorted((end for end in charged if end.index == index), key=lambda end: end.attempt)
        last = of_shard[-(NO_PROGRESS_RESTARTS + 1) :]
        outputs = [end.message.step or 0 for end in last if end.message]
        if len(outputs) > NO_PROGRESS_RESTARTS and len(set(outputs)) == 1:
            return (
                f"{NO_PROGRESS_RESTARTS} counted restarts of shard {index} brought no output after the first"
                f" {outputs[-1]}; {last_end(attempt(last[-1], 0, None, index))}"
            )
    return None


def evicted_too_often(attempts: Sequence[Attempt]) -> str | None:
    """The message about a pod of `prepare` or `publish` that the cluster has stopped again and again, else None.

    The cluster starts it again each time, and charges nothing. `attempts`: those of one child.
    """
    last = attempts[-EVICTIONS:]
    if len(last) < EVICTIONS or any(known.reason != ExitCode.PREEMPTED.reason for known in last):
        return None
    return f"the cluster has stopped the pod {EVICTIONS} times in a row before it was done; {last_end(last[-1])}"


def last_end(last: Attempt) -> str:
    return f"the last one ended with {last.reason}: {last.message} ({location(last)})"
