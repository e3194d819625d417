"""What the user may change at any time: the deadline, and whether the job is suspended. Both stop the pods; the
workspace keeps their work.

The deadline limits the time of work. It is counted in the status whenever the job stops or begins to work, so that
another operator goes on counting.

Suspending deletes the child of the current phase: its pods get SIGTERM, save a checkpoint and end. Resuming creates the
child again, which continues from the checkpoint. This also works under Kueue, which owns `spec.suspend` of a child.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES, JobStatus, Phase
from luthier_operator import children
from luthier_operator.model import Object
from luthier_operator.phases.context import Context, Step
from luthier_operator.statuses import moment, text

SUSPENDED = ConditionType.SUSPENDED


def suspend(ctx: Context) -> Step:
    """Set the condition Suspended, if the job is or was suspended."""
    if ctx.job.spec.suspend:
        message = "spec.suspend is true: the pods save a checkpoint and stop; set it to false to resume the job"
        ctx = ctx.with_condition(SUSPENDED, "True", Reason.SUSPENDED, message)
        ctx = ctx.without_condition(ConditionType.ADMITTED)  # it ends with the child
        return halted(ctx, Reason.SUSPENDED, "spec.suspend is true").stops(delete=ctx.unfinished())
    if ctx.status.is_true(SUSPENDED):
        message = "spec.suspend is false: the job resumes where it stopped"
        ctx = ctx.with_condition(SUSPENDED, "False", Reason.RESUMED, message)
    return ctx.goes_on()


def deadline(ctx: Context) -> Step:
    """Fail the job at its deadline, unless its work was finished by then."""
    left = seconds_left(ctx)
    if left is None or not is_active(ctx):
        return ctx.goes_on()
    if left > 0:
        return ctx.goes_on(requeue_after=left)
    if finished_by(ctx, ctx.now + timedelta(seconds=left)):  # the operator may look at the job later than that
        return ctx.goes_on()
    message = (
        f"spec.activeDeadlineSeconds: the job was at work for {ctx.job.spec.active_deadline_seconds} seconds."
        " Checkpoints and outputs stay in the workspace; raise the limit to resume the job"
    )
    ctx = halted(ctx, Reason.DEADLINE_EXCEEDED, message)
    return ctx.fails(Reason.DEADLINE_EXCEEDED, message, delete=ctx.unfinished())


def seconds_left(ctx: Context) -> float | None:
    """Seconds of work until the deadline. None without a limit, and before the first phase."""
    limit = ctx.job.spec.active_deadline_seconds
    if not limit or not ctx.status.start_time:
        return None
    return limit - seconds_used(ctx)


def seconds_used(ctx: Context) -> float:
    """How long the job has been at work, in seconds."""
    since = ctx.status.active_since
    running = (work_stopped(ctx) - moment(since)).total_seconds() if since else 0.0
    return ctx.status.active_seconds + max(0.0, running)


def is_active(ctx: Context) -> bool:
    """Whether the job is at work: not before its first phase, suspended, in a queue, planned or ended."""
    planned = ctx.status.condition(ConditionType.PREPARED)
    rests = planned is not None and planned.reason == Reason.PLAN_ONLY and ctx.last == "prepare"
    stopped = ctx.job.spec.suspend or ctx.status.finished or rests
    return bool(ctx.status.start_time) and not stopped and not queued(ctx)


def queued(ctx: Context) -> Object | None:
    """The child that a queue has suspended, if one waits there."""
    present = (ctx.child(phase) for phase in PHASES)
    return next((child for child in present if child and children.suspended(child)), None)


def work_stopped(ctx: Context) -> datetime:
    """Until when the job was at work: now, or since a queue suspended its child. The operator may see that later."""
    child = queued(ctx)
    since = children.suspended_since(child) if child else None
    return min(ctx.now, since) if since else ctx.now


def clock(ctx: Context) -> JobStatus:
    """The status with the time of the job's work counted, when the job begins to work or stops."""
    status = ctx.status
    if is_active(ctx) and not status.active_since:
        return status.model_copy(update={"active_since": text(ctx.now)})
    if status.active_since and not is_active(ctx):
        return status.model_copy(update={"active_since": None, "active_seconds": round(seconds_used(ctx))})
    return status


def finished_by(ctx: Context, time: datetime) -> bool:
    """Whether the last phase had succeeded, or any phase had failed, at `time`."""
    conditions = {"prepare": ConditionType.PREPARED, "run": ctx.done, "publish": ConditionType.PUBLISHED}
    condition = ctx.status.condition(conditions[ctx.last])
    if condition and condition.status == "True" and moment(condition.last_transition_time) <= time:
        return True
    return any(child_finished_by(ctx, phase, time) for phase in PHASES)


def child_finished_by(ctx: Context, phase: Phase, time: datetime) -> bool:
    child = ctx.child(phase)
    if child is None:
        return False
    if not children.failed(child) and phase != ctx.last:  # the success of an earlier phase does not finish the job
        return False
    ended_at = children.ended_at(child)
    return ended_at is not None and ended_at <= time


def halted(ctx: Context, reason: Reason, message: str) -> Context:
    """With the condition of the current phase set to False, because its pods are stopped."""
    condition = current_condition(ctx)
    if condition is None or ctx.status.condition(condition) is None:
        return ctx
    return ctx.with_condition(condition, "False", reason, message)


def current_condition(ctx: Context) -> ConditionType | None:
    """The condition of the phase at work. None after the last one."""
    if not ctx.status.is_true(ConditionType.PREPARED):
        return ConditionType.PREPARED
    if not ctx.status.is_true(ctx.done):
        return ConditionType.RUNNING
    if not ctx.status.is_true(ConditionType.PUBLISHED):
        return ConditionType.PUBLISHED
    return None
