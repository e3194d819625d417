"""Finish: the job is complete. After any end, its pods are kept for a while, and its time to live runs."""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES, State
from luthier_operator import children
from luthier_operator.phases.context import Context, Step
from luthier_operator.statuses import moment, text

COMPLETE, FAILED = ConditionType.COMPLETE, ConditionType.FAILED


def finish(ctx: Context) -> Step:
    """Set the condition Complete: every phase that the job has is done."""
    workspace, hub = ctx.status.workspace, ctx.status.hub
    message = "done"
    if workspace:
        message = f"the result is in {workspace.folder}/result of claim {workspace.claim_name}"
        if hub:
            message += f" and {hub.url}"
    ctx = ctx.with_condition(COMPLETE, "True", Reason.COMPLETED, message)
    return ctx.with_status(completion_time=text(ctx.now)).stops()


def retire(ctx: Context) -> Step:
    """For a job that has ended: stop what still runs, delete the children after the time that their logs are kept, and
    the job itself when its time to live is over.

    The status is written before children are deleted, so the operator may have died in between.
    """
    ctx, delete = with_end(ctx), ctx.unfinished()
    if not ctx.status.completion_time:
        return ctx.stops(delete=delete)
    age = (ctx.now - moment(ctx.status.completion_time)).total_seconds()
    left: list[float] = []
    if ctx.job.spec.ttl_seconds_after_finished is not None:
        left.append(ctx.job.spec.ttl_seconds_after_finished - age)
        if left[-1] <= 0:
            return ctx.stops(delete_job=True)

    kept = [phase for phase in PHASES if (child := ctx.child(phase)) and not children.deleting(child)]
    if kept:
        left.append(ctx.settings.finished_pods_seconds - age)
        if left[-1] <= 0:
            delete = [ctx.workload.child(phase) for phase in kept]
    return ctx.stops(delete=delete, requeue_after=min((seconds for seconds in left if seconds > 0), default=None))


def with_end(ctx: Context) -> Context:
    """With the condition that says how the job has ended. Another program, or another version, may have removed it."""
    if ctx.status.is_true(COMPLETE) or ctx.status.is_true(FAILED):
        return ctx
    message = "the condition of the end was missing and is restored from status.state"
    if ctx.status.state == State.COMPLETE:
        return ctx.with_condition(COMPLETE, "True", Reason.CONDITIONS_LOST, message)
    if ctx.status.state == State.FAILED:
        return ctx.with_condition(FAILED, "True", Reason.CONDITIONS_LOST, message)
    message = (
        "status.completionTime is set, but no condition says how the job has ended. It does not run again by itself;"
        " to run it again, create it under another name"
    )
    return ctx.with_condition(COMPLETE, "Unknown", Reason.CONDITIONS_LOST, message)
