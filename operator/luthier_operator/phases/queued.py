"""Queued: the condition Admitted of a job that names a queue, as Kueue sees the child of `run`.

Kueue owns `spec.suspend` of the child. It may stop the pods at any time and let them go on later: the run then resumes
from its checkpoint, and nothing is charged.
"""

from __future__ import annotations

from datetime import timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import Phase
from luthier_operator import children, kueue
from luthier_operator.children import PendingReason
from luthier_operator.kueue import Verdict
from luthier_operator.model import Object
from luthier_operator.phases.context import Context

ADMITTED = ConditionType.ADMITTED
WHY_NO_WORKLOAD = (
    "is Kueue installed, are its integrations jobset.x-k8s.io/jobset and batch/job on, does it manage this namespace,"
    " does the priority class exist?"
)
WORKLOAD_SECONDS = 10.0
"""Kueue makes a Workload within a second."""
KEPT = {
    Reason.IMAGE_PULL_FAILED,
    Reason.UNSCHEDULABLE,
    Reason.WAITING_FOR_VOLUME,
    Reason.CONTAINER_CREATING,
    Reason.NO_PODS,
}
"""Reasons why pods did not start, which explain an eviction. The pods that showed them are deleted by it."""


def admission(ctx: Context, child: Object) -> Context:
    """Set the condition Admitted, if the job is queued."""
    queue = ctx.job.spec.scheduling.queue_name
    if not queue:
        return ctx
    found = kueue.verdict(ctx.observed.admission) if ctx.observed.admission else without_workload(ctx, child)
    if found is None:
        return ctx
    return ctx.with_condition(ADMITTED, found.value, found.reason, f'queue "{queue}": {found.message}')


def without_workload(ctx: Context, child: Object) -> Verdict | None:
    """What the child alone shows: Kueue is not installed, may not be read, or has made no Workload. None in the first
    seconds, in which it makes one.
    """
    name = describe(child)
    if children.suspended(child):
        if not ctx.observed.kueue_readable:
            return Verdict("False", Reason.PENDING, f"{name} is suspended; see `kubectl describe workloads`")
        if check_again(ctx, child):
            return None
        message = f"{name} is suspended, and Kueue has made no Workload for it: {WHY_NO_WORKLOAD}"
        return Verdict("False", Reason.WAITING_FOR_KUEUE, message)
    if children.was_suspended(child):
        return Verdict("True", Reason.ADMITTED, f"{name} was admitted")
    message = f"{name} was not held back until there is quota, and runs without any: {WHY_NO_WORKLOAD}"
    return Verdict("Unknown", Reason.NOT_QUEUED, message)


def check_again(ctx: Context, child: Object) -> float | None:
    """Seconds until the missing Workload of a suspended child is worth reporting. None if there is one, or by then."""
    created = children.created(child)
    if ctx.observed.admission or not ctx.observed.kueue_readable or created is None:
        return None
    left = (created + timedelta(seconds=WORKLOAD_SECONDS) - ctx.now).total_seconds()
    return left if left > 0 else None


def describe(child: Object) -> str:
    return f"{child['kind']} {child['metadata']['name']}"


def pending_reason(ctx: Context, phase: Phase, child: Object) -> PendingReason:
    """Why the pods of a suspended child do not run: the condition of its phase.

    After an eviction because the pods did not start, it keeps the reason why they did not: nothing else has it.
    """
    admitted, running = ctx.status.condition(ADMITTED), ctx.status.condition(ConditionType.RUNNING)
    if admitted is None or phase != "run":
        message = f"{describe(child)} is suspended by a queue; see `kubectl describe workloads`"
        return PendingReason(Reason.WAITING_FOR_QUEUE, message)
    if running and running.reason in KEPT and evicted_before_start(admitted.reason):
        return PendingReason(running.reason, running.message)
    return PendingReason(Reason.WAITING_FOR_QUEUE, admitted.message)


def evicted_before_start(reason: str) -> bool:
    return reason == "PodsReadyTimeout" or reason.startswith(f"{kueue.STOPPED}DueTo")
