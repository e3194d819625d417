"""Finish: the job is complete. After any end, its time to live (`ttlSecondsAfterFinished`) runs."""

from __future__ import annotations

from datetime import timedelta

from luthier_api.conditions import ConditionType, Reason
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
    """For a job that has ended: delete it when its time to live is over."""
    seconds = ctx.job.spec.ttl_seconds_after_finished
    if seconds is None or not ctx.status.completion_time:
        return ctx.stops()
    expiry = moment(ctx.status.completion_time) + timedelta(seconds=seconds)
    left = (expiry - ctx.now).total_seconds()
    return ctx.stops(requeue_after=left) if left > 0 else ctx.stops(delete_job=True)
