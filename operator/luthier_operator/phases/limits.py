"""What the user may change at any time: the deadline, and whether the job is suspended. Both stop the pods; the
workspace keeps their work.

Suspending deletes the child of the current phase: its pods get SIGTERM, save a checkpoint and end. Resuming creates the
child again, which continues from the checkpoint. This also works under Kueue, which owns `spec.suspend` of a child.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES, Phase
from luthier_operator import children
from luthier_operator.phases.context import Context, Step
from luthier_operator.statuses import moment, text

SUSPENDED = ConditionType.SUSPENDED


def suspend(ctx: Context) -> Step:
    """Set the condition Suspended, if the job is or was suspended."""
    if ctx.job.spec.suspend:
        message = "spec.suspend is true: the pods save a checkpoint and stop; set it to false to resume the job"
        ctx = ctx.with_condition(SUSPENDED, "True", Reason.SUSPENDED, message)
        return halted(ctx, Reason.SUSPENDED, "spec.suspend is true").stops(delete=ctx.unfinished())
    if ctx.status.is_true(SUSPENDED):
        message = "spec.suspend is false: the job resumes where it stopped"
        ctx = ctx.with_condition(SUSPENDED, "False", Reason.RESUMED, message)
        if ctx.status.start_time:
            ctx = ctx.with_status(deadline_start_time=text(ctx.now))
    return ctx.goes_on()


def deadline(ctx: Context) -> Step:
    """Fail the job at its deadline, unless its work was finished by then.

    The time in which a job is suspended does not count: this step does not run then, and resuming starts the time anew.
    """
    expiry = expires(ctx)
    if expiry is None:
        return ctx.goes_on()
    if ctx.now < expiry:
        return ctx.goes_on(requeue_after=(expiry - ctx.now).total_seconds())
    if finished_by(ctx, expiry):  # the operator may look at the job later than that
        return ctx.goes_on()
    message = (
        f"spec.activeDeadlineSeconds: {ctx.job.spec.active_deadline_seconds} seconds have passed since"
        f" {counted_from(ctx)}. Checkpoints and outputs stay in the workspace; raise the limit to resume the job"
    )
    ctx = halted(ctx, Reason.DEADLINE_EXCEEDED, message)
    return ctx.fails(Reason.DEADLINE_EXCEEDED, message, delete=ctx.unfinished())


def counted_from(ctx: Context) -> str | None:
    """When the deadline began to run. A job that resumes gets the whole time again, as Kubernetes' Jobs do."""
    return ctx.status.deadline_start_time or ctx.status.start_time


def expires(ctx: Context) -> datetime | None:
    """The deadline. None without a limit, and before the first phase."""
    seconds, since = ctx.job.spec.active_deadline_seconds, counted_from(ctx)
    if not seconds or not since:
        return None
    return moment(since) + timedelta(seconds=seconds)


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
