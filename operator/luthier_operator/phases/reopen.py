"""Reopen: what makes a job resume that has ended, or that stopped after its plan.

Only fields that control a job may change then, so a change of them is a request: more time, another place for the
result, or the run after the plan. The deadline starts anew, or it would be over before the request is fulfilled.
"""

from __future__ import annotations

from dataclasses import replace

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children
from luthier_operator.phases.context import Context
from luthier_operator.phases.limits import current_condition, expires
from luthier_operator.statuses import moment, text, without_condition

PREPARED = ConditionType.PREPARED
PUBLISHED = ConditionType.PUBLISHED
COMPLETE = ConditionType.COMPLETE
FAILED = ConditionType.FAILED

HUB_CHANGED = "spec.hub has changed: publishing again"
HUB_SET = "spec.hub.repo is set: publishing"
MORE_TIME = "spec.activeDeadlineSeconds was raised: the job resumes where it stopped"


def reopen(ctx: Context) -> Context | None:
    """The job as one that resumes. None where nothing makes it resume.

    The status is written after this alone, because the next decision may delete the child that gave the reason.
    """
    if has_more_time(ctx):
        ctx = ctx.with_condition(FAILED, "False", Reason.RESUMED, MORE_TIME)
        halted = current_condition(ctx)
        if halted:
            ctx = replace(ctx, status=without_condition(ctx.status, halted))
        return restarted(ctx)
    if failed_to_publish(ctx) and ctx.hub_changed:
        ctx = ctx.with_condition(FAILED, "False", Reason.PUBLISHING, HUB_CHANGED)
        return publishing(restarted(ctx), HUB_CHANGED)
    if belongs_elsewhere(ctx):
        why = HUB_CHANGED if ctx.status.condition(PUBLISHED) else HUB_SET
        ctx = ctx.with_condition(COMPLETE, "False", Reason.PUBLISHING, why).with_status(hub=None)
        return publishing(restarted(ctx), why)
    plan = ctx.status.condition(PREPARED)
    if plan and plan.reason == Reason.PLAN_ONLY and ctx.last != "prepare" and not ctx.status.finished:
        return restarted(ctx.with_condition(PREPARED, "True", Reason.PREPARED, plan.message))
    return None


def publishing(ctx: Context, why: str) -> Context:
    if ctx.publishes:
        return ctx.with_condition(PUBLISHED, "False", Reason.PUBLISHING, why)
    return replace(ctx, status=without_condition(ctx.status, PUBLISHED))


def restarted(ctx: Context) -> Context:
    return ctx.with_status(completion_time=None, deadline_start_time=text(ctx.now))


def has_more_time(ctx: Context) -> bool:
    """Whether the job ended at its deadline, which is later now, or gone."""
    failed, ended_at = ctx.status.condition(FAILED), ctx.status.completion_time
    if failed is None or failed.status != "True" or ended_at is None:
        return False
    if failed.reason != Reason.DEADLINE_EXCEEDED:
        return False
    expiry = expires(ctx)
    return expiry is None or expiry > moment(ended_at)


def failed_to_publish(ctx: Context) -> bool:
    """Whether the job has failed in `publish`, by a failure of its Job."""
    failed, published = ctx.status.condition(FAILED), ctx.status.condition(PUBLISHED)
    if failed is None or failed.status != "True" or failed.reason == Reason.DEADLINE_EXCEEDED:
        return False
    if published is None or published.status == "True" or not ctx.status.is_true(ctx.done):
        return False
    job = ctx.child("publish")
    return job is not None and children.failed(job) is not None


def belongs_elsewhere(ctx: Context) -> bool:
    """Whether the job is complete, and its result is not in the place that spec.hub names now."""
    if not (ctx.status.is_true(COMPLETE) and ctx.status.is_true(ctx.done) and ctx.last == "publish"):
        return False
    # The target, not all of spec.hub: another token alone moves nothing.
    return ctx.target_changed or not ctx.status.is_true(PUBLISHED)
