"""Why a child does not run yet, as the message of a condition: a pending job always explains itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.secrets import secret_fields
from luthier_api.status import Phase
from luthier_operator import children, naming
from luthier_operator.children import NO_SCHEDULER_SECONDS, PendingReason
from luthier_operator.failure.attempts import ATTEMPTS_KEPT, evicted_too_often
from luthier_operator.failure.cause import Failure, location
from luthier_operator.model import ChildRef, Object
from luthier_operator.phases import queued
from luthier_operator.phases.context import Context, Step
from luthier_operator.phases.refusals import may_pass, missing_volume, no_node, refused_pods

EVIDENCE_SECONDS = 3.0
"""A child and its pods are watched separately. For this long after a child has ended, messages of its pods may still
arrive.
"""
NO_POD_SECONDS = 30.0
"""A Job has its first pod within 1 s, a JobSet within 2 s. After a longer delay the operator reads the Events of the
child: something may refuse the pods.
"""
NO_CONTROLLER_SECONDS = 300.0
"""Without a warning in the Events the controllers are only behind, as in a burst of jobs. After this time that is
reported, too: they may not be running.
"""
ASK_AGAIN_SECONDS = 60.0
"""Nothing but a new Event tells that pods are refused now, so the Events are read again."""
VOLUME_SECONDS = 15.0
"""A new claim is bound within seconds; until then the scheduler reports it as missing."""
SECONDS_PER_POD = 0.1  # the controllers create about 20 pods a second, for all jobs together
CONTAINER_SECONDS = 30.0
"""Volumes are mounted within seconds. A longer delay is reported, even if it is only a large image."""
PODS_NAMED = 3  # in a message
CONDITIONS: Mapping[Phase, ConditionType] = {
    "prepare": ConditionType.PREPARED,
    "run": ConditionType.RUNNING,
    "publish": ConditionType.PUBLISHED,
}
"""Phase → the condition that says why it waits."""


@dataclass(frozen=True)
class Overdue:
    """What has not happened yet, and when it becomes worth reporting."""

    due: datetime
    reason: PendingReason


def for_old_pods(ctx: Context, phase: Phase, condition: ConditionType) -> Step | None:
    """Wait until stopped pods have ended: two groups of pods must never write to one folder. None if there are none.

    The child from before the job resumed is deleted first.
    """
    child, pods = ctx.child(phase), ctx.pods(phase)
    if child and ctx.is_outdated(phase) and not children.deleting(child):
        replaced = f"{name(child)} is replaced, because the job has resumed"
        waits = ctx.waits(condition, Reason.WAITING_FOR_PODS, replaced)
        return replace(waits, delete=[ctx.workload.child(phase)])
    child_ends = child is not None and children.deleting(child)
    orphans = child is None and pods
    if not (child_ends or orphans):
        return None
    message = "waiting for the stopped pods to end"
    if pods:
        names = sorted(with_node(pod) for pod in pods)
        more = ", ..." if len(names) > PODS_NAMED else ""
        message += f": {', '.join(names[:PODS_NAMED])}{more}"
    return ctx.waits(condition, Reason.WAITING_FOR_PODS, message)


def with_node(pod: Object) -> str:
    """`pod-name on node-name`."""
    name: str = pod["metadata"]["name"]
    node = pod.get("spec", {}).get("nodeName")
    return f"{name} on {node}" if node else name


def for_one_pod(ctx: Context, phase: Phase, condition: ConditionType, reason: str, doing: str) -> Step:
    """Wait for the one pod of `prepare` or `publish`.

    The condition says, in this order: why the pod does not start, how it failed last, or what it does (`reason`,
    `doing`). That the pod has started is no news: it would be a write of the status for each job.
    """
    if failed := given_up(ctx, phase):
        ctx = ctx.with_condition(condition, "False", failed.reason, failed.message)
        return ctx.fails(failed.reason, failed.message, delete=[ctx.workload.child(phase)])
    pending, again = pending_reason(ctx, phase, 1)
    if pending:
        return ctx.waits(condition, pending.reason, pending.message, requeue_after=again)
    attempts = ctx.attempts(phase)
    if attempts:
        last = attempts[-1]
        if last.exit_code in ExitCode.codes(Retry.NEVER):
            return ctx.stops(requeue_after=again)  # the Job is about to fail
        message = f"{last.message} ({location(last)}). It will be retried"
        return ctx.waits(condition, last.reason, message, requeue_after=again)
    return ctx.waits(condition, reason, doing, requeue_after=again)


def pending_reason(ctx: Context, phase: Phase, pods: int) -> tuple[PendingReason | None, float | None]:
    """Why not all `pods` of a phase run.

    The second value is given where only time will tell: the seconds after which to look again.
    """
    child = ctx.child(phase)
    if child and children.suspended(child):
        return queued.pending_reason(ctx, phase, child), queued.check_again(ctx, child) if phase == "run" else None

    found = children.pending_reason(ctx.pods(phase), secret_fields(ctx.job.spec, phase))
    if found:
        if found.reason == Reason.UNSCHEDULABLE:
            found = replace(found, message=no_node(ctx, phase, found.message))
        return as_before(ctx, phase, found), seconds_to_start(ctx, found)

    first = min(overdue(ctx, phase, pods), key=lambda expected: expected.due, default=None)
    if first is None:
        return None, None
    no_warnings = first.reason.reason == Reason.NO_PODS and warning(ctx, phase) == ""
    if first.due <= ctx.now:
        return first.reason, ASK_AGAIN_SECONDS if no_warnings else seconds_to_start(ctx, first.reason)
    seconds = (first.due - ctx.now).total_seconds()
    return None, min(seconds, ASK_AGAIN_SECONDS) if no_warnings else seconds


def as_before(ctx: Context, phase: Phase, found: PendingReason) -> PendingReason:
    """`found` with the message of the condition, where that says the same and more: see `image_pull_failed`."""
    condition = ctx.status.condition(CONDITIONS[phase])
    if condition and condition.reason == found.reason and condition.message.startswith(found.message):
        return replace(found, message=condition.message)
    return found


def seconds_to_start(ctx: Context, found: PendingReason) -> float | None:
    """Seconds for which a container that cannot start is still waited for. None where time does not end the wait."""
    if found.since is None:
        return None
    return (found.since - ctx.now).total_seconds() + ctx.settings.start_timeout_seconds


def given_up(ctx: Context, phase: Phase) -> Failure | None:
    """Why the job fails although the cluster would go on trying to start a pod of `phase`."""
    if phase != "run" and (message := evicted_too_often(ctx.attempts(phase))):
        return Failure(Reason.NO_PROGRESS, message)
    pods = ctx.workload.pods if phase == "run" else 1
    expected = (one.reason for one in overdue(ctx, phase, pods) if one.reason.since)
    found = children.pending_reason(ctx.pods(phase), secret_fields(ctx.job.spec, phase)) or next(expected, None)
    left = seconds_to_start(ctx, found) if found else None
    if found is None or left is None or left > 0:
        return None
    found = as_before(ctx, phase, found)
    limit = f"{ctx.settings.start_timeout_seconds} seconds (jobs.startTimeoutSeconds in the chart)"
    return Failure(found.reason, f"{found.message}. It was waited for {limit}")


def for_container(ctx: Context) -> ConditionType | None:
    """The condition that waits for a container of a pod that has its node, if one is late."""
    if ctx.status.finished:
        return None
    for awaited in CONDITIONS.values():
        found = ctx.status.condition(awaited)
        if found and found.status == "False" and found.reason == Reason.CONTAINER_CREATING:
            return awaited
    return None


def warning(ctx: Context, phase: Phase) -> str | None:
    """What the Events of the child of `phase` say against its pods; empty if nothing, None if they were not read."""
    return ctx.observed.warnings.get(ctx.workload.child(phase))


def unexplained(ctx: Context) -> list[ChildRef]:
    """The children that have no pods yet, for a reason that only their Events can tell."""
    return [
        ctx.workload.child(phase)
        for phase, waits in CONDITIONS.items()
        if warning(ctx, phase) is None
        and (condition := ctx.status.condition(waits))
        and condition.status == "False"
        and condition.reason == Reason.NO_PODS
    ]


def overdue(ctx: Context, phase: Phase, pods: int) -> Iterator[Overdue]:
    """Pods that do not exist yet, and containers that have not started."""
    child, living = ctx.child(phase), ctx.pods(phase)
    since = children.active_since(child) if child else None
    created = len(living) + sum(end.exit_code == 0 for end in ctx.ends(phase))
    # After a failure the Job's back-off may delay the next pod for minutes.
    if child and since and created < pods and not ctx.attempts(phase):
        found = warning(ctx, phase)
        seconds = NO_CONTROLLER_SECONDS if found == "" else in_turn(NO_POD_SECONDS, backlog(ctx, phase))
        seconds += SECONDS_PER_POD * pods
        reason = PendingReason(Reason.NO_PODS, no_pods(child, created, pods, asked=found is not None))
        if found:
            message = refused_pods(phase, name(child), found)
            reason = PendingReason(Reason.NO_PODS, message, since=None if may_pass(found) else since)
        yield Overdue(since + timedelta(seconds=seconds), reason)
    for pod in living:
        if unbound := children.waits_for_volume(pod):
            message = missing_volume(ctx, phase, pod["metadata"]["name"], unbound.message)
            due = unbound.since + timedelta(seconds=VOLUME_SECONDS) if unbound.since else ctx.now
            yield Overdue(due, PendingReason(Reason.WAITING_FOR_VOLUME, message, since=unbound.since))
        scheduled = children.scheduled(pod)
        if scheduled and not children.deleting(pod) and "running" not in children.container(pod):
            due = scheduled + timedelta(seconds=CONTAINER_SECONDS)
            yield Overdue(due, PendingReason(Reason.CONTAINER_CREATING, no_container(pod)))
        new = children.awaits_scheduler_since(pod)
        if new and new + timedelta(seconds=NO_SCHEDULER_SECONDS) <= ctx.now:
            yield Overdue(ctx.now, PendingReason(Reason.UNSCHEDULABLE, no_scheduler(ctx, phase, pod)))


def backlog(ctx: Context, phase: Phase) -> int:
    """The children whose pods may come before those of `phase`. A later burst of jobs takes no message back."""
    reported = ctx.status.condition(CONDITIONS[phase])
    return 0 if reported and reported.reason == Reason.NO_PODS else ctx.observed.backlog


def in_turn(seconds: float, backlog: int) -> float:
    """`seconds` that pods may be missing, and the time that the controllers need for a `backlog` of children."""
    return min(seconds + SECONDS_PER_POD * backlog, NO_CONTROLLER_SECONDS)


def no_pods(child: Object, created: int, pods: int, *, asked: bool) -> str:
    """`asked`: its Events were read, and report no problem."""
    number = f"only {created} of {pods} pods" if created else "no pods"
    describe = f"`kubectl describe {child['kind'].lower()} {child['metadata']['name']}`"
    if child["kind"] == "JobSet":
        describe += f" and `kubectl describe job {child['metadata']['name']}-{naming.NODE}-0`"
    why = ", and reports no problem: its controllers are behind, or do not run" if asked else ""
    return f"the cluster has created {number} for {name(child)} so far{why}; see {describe}"


def no_container(pod: Object) -> str:
    pod_name = pod["metadata"]["name"]
    return (
        f"pod {pod_name} was scheduled, but its container has not started after {CONTAINER_SECONDS:g} s: it waits for"
        f" its image or for a volume (spec.volumes, spec.workspace); see `kubectl describe pod {pod_name}`"
    )


def no_scheduler(ctx: Context, phase: Phase, pod: Object) -> str:
    named = ctx.job.spec.scheduling.scheduler_name if phase == "run" else None
    which = f"{named} (spec.scheduling.schedulerName)" if named else "the scheduler"
    return (
        f"pod {pod['metadata']['name']} has no node, and no scheduler has said why for {NO_SCHEDULER_SECONDS:g} s:"
        f" {which} does not run in this cluster, or is behind"
    )


def name(child: Object) -> str:
    return f"{child['kind']} {child['metadata']['name']}"


def for_evidence(ctx: Context, phase: Phase, child: Object) -> Step | None:
    """Wait briefly until a pod explains why `child` has just failed. None if one does, or if it is too late."""
    attempts = ctx.attempts(phase)
    if child["kind"] == "JobSet":
        last, _ = children.restarts(child)
        explained = any(attempt.attempt == last for attempt in attempts)
    else:
        failed_pods = max(1, child.get("status", {}).get("failed") or 0)
        explained = len(attempts) >= min(ATTEMPTS_KEPT, failed_pods)
    return for_messages(ctx, child, known=explained)


def for_messages(ctx: Context, child: Object, *, known: bool) -> Step | None:
    """Wait briefly, after `child` was seen to have ended, for the messages of its pods. None if they are known, or too
    late.
    """
    since = ctx.observed.ended_since.get(ChildRef(child["kind"], child["metadata"]["name"]))
    if known or since is None or ctx.now >= since + timedelta(seconds=EVIDENCE_SECONDS):
        return None
    return ctx.stops(requeue_after=EVIDENCE_SECONDS)
