"""Finish: the job is complete. After any end, its pods are kept for a while, and its time to live runs."""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES
from luthier_operator import children
from luthier_operator.model import ChildRef
from luthier_operator.phases.context import Context, Step
from luthier_operator.statuses import moment, text


def finish(ctx: Context) -> Step:
    """Set the condition Complete: every phase that the job has is done."""
    workspace, hub = ctx.status.workspace, ctx.status.hub
    message = "done"
    if workspace:
        message = f"the result is in {workspace.folder}/result of claim {workspace.claim_name}"
        if hub:
            message += f" and {hub.url}"
    ctx = ctx.with_condition(ConditionType.COMPLETE, "True", Reason.COMPLETED, message)
    return ctx.with_status(completion_time=text(ctx.now)).stops()


def retire(ctx: Context) -> Step:
    """For a job that has ended: delete its children after the time that their logs are kept, and the job itself when
    its time to live is over.
    """
    if not ctx.status.completion_time:
        return ctx.stops()
    age = (ctx.now - moment(ctx.status.completion_time)).total_seconds()
    left: list[float] = []
    if ctx.job.spec.ttl_seconds_after_finished is not None:
        left.append(ctx.job.spec.ttl_seconds_after_finished - age)
        if left[-1] <= 0:
            return ctx.stops(delete_job=True)

    kept = [phase for phase in PHASES if (child := ctx.child(phase)) and not children.deleting(child)]
    delete: list[ChildRef] = []
    if kept:
        left.append(ctx.settings.finished_pods_seconds - age)
        if left[-1] <= 0:
            delete = [ctx.workload.child(phase) for phase in kept]
    return ctx.stops(delete=delete, requeue_after=min((seconds for seconds in left if seconds > 0), default=None))
