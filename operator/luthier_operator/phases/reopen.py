"""Reopen: what makes a job resume that has failed, is complete, or stopped after its plan; or that has other fields now
than its pods work with.

The rules of the CRD let each field change only when that can be followed, so a change is a request. The status is
written after this step alone: what the next decisions delete may have been the reason. It counts in `status.resumes`,
and children that were made before are replaced.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.decides import BUDGET, PUBLICATION, marked_paths
from luthier_api.marks import digests
from luthier_api.status import AppliedSpec
from luthier_operator.phases.context import Context
from luthier_operator.phases.limits import current_condition, seconds_left
from luthier_operator.versions import RELEASE

ACCEPTED = ConditionType.ACCEPTED
PREPARED = ConditionType.PREPARED
PUBLISHED = ConditionType.PUBLISHED
SUSPENDED = ConditionType.SUSPENDED
COMPLETE = ConditionType.COMPLETE
FAILED = ConditionType.FAILED

HUB = "hub"  # the field of the spec
HUB_CHANGED = "spec.hub has changed: publishing again"
HUB_SET = "spec.hub.repo is set: publishing"
MORE_TIME = "spec.activeDeadlineSeconds was raised: the job resumes where it stopped"


def reopen(ctx: Context) -> Context | None:
    """The job as one that resumes. None where nothing makes it resume."""
    if ctx.status.is_true(FAILED):
        return after_failure(ctx)
    if belongs_elsewhere(ctx):
        why = HUB_CHANGED if ctx.status.condition(PUBLISHED) else HUB_SET
        ctx = ctx.with_condition(COMPLETE, "False", Reason.PUBLISHING, why).with_status(hub=None)
        return publishing(with_spec(ctx.with_status(completion_time=None, active_seconds=0)), why)
    if ctx.status.is_true(COMPLETE) or ctx.job.spec.suspend:
        return None
    if changed := changed_at_work(ctx):
        return with_children_replaced(ctx, changed)
    plan = ctx.status.condition(PREPARED)
    if plan and plan.reason == Reason.PLAN_ONLY and ctx.last != "prepare":
        return ctx.with_condition(PREPARED, "True", Reason.PREPARED, plan.message)
    return None


def after_failure(ctx: Context) -> Context | None:
    """The job that has failed as one that resumes where it stopped, with a new budget of restarts and of time."""
    changed = [path for path in changed_fields(ctx) if path != HUB or needs_hub(ctx)]
    if changed:
        ctx = ctx.with_condition(FAILED, "False", Reason.RESUMED, resumes_because(changed))
        ctx = ctx.with_status(completion_time=None, restarts_charged=0, active_seconds=0)
        return with_children_replaced(ctx, changed)
    if has_more_time(ctx):
        ctx = ctx.with_condition(FAILED, "False", Reason.RESUMED, MORE_TIME)
        return with_children_replaced(ctx.with_status(completion_time=None), [])
    return None


def needs_hub(ctx: Context) -> bool:
    """Whether the job has failed in a phase that works with the Hub."""
    failed = ctx.status.condition(FAILED)
    if failed is None or failed.reason == Reason.DEADLINE_EXCEEDED:
        return False
    return current_condition(ctx) in (PREPARED, PUBLISHED)


def with_children_replaced(ctx: Context, changed: list[str]) -> Context:
    """With the current phase to be done by new children, for which the fields `changed` are read."""
    paths = marked_paths(type(ctx.job.spec))
    if any(paths[path].value.planned for path in changed) and not ctx.status.is_true(ctx.done):
        ctx = ctx.without_condition(PREPARED).with_status(prepared=None, reduced_micro_batch_size=None)
    for stopped in (ACCEPTED, current_condition(ctx)):
        if stopped and not ctx.status.is_true(stopped):
            ctx = ctx.without_condition(stopped)
    return with_spec(ctx.with_status(resumes=ctx.status.resumes + 1))


def with_spec(ctx: Context) -> Context:
    """With the present spec as the one that the job is at work with: the one that its user has written, without the
    administrator's defaults.
    """
    applied, generation = ctx.status.applied_spec, ctx.job.metadata.generation
    if applied and generation and (applied.generation, applied.written_by) == (generation, RELEASE):
        return ctx  # as in most decisions
    fields = digests(ctx.observed.job.spec)
    return ctx.with_status(applied_spec=AppliedSpec(generation=generation, fields=fields, written_by=RELEASE))


def changed_fields(ctx: Context) -> list[str]:
    """The paths of fields that make a failed job resume, and that have changed since it was last at work."""
    applied = ctx.status.applied_spec
    # Without another generation, what differs is this version of the operator: it may have other defaults.
    if applied is None or applied.generation == ctx.job.metadata.generation:
        return []
    current = digests(ctx.observed.job.spec)
    return sorted(
        path for path in applied.fields.keys() | current.keys() if applied.fields.get(path) != current.get(path)
    )


def changed_at_work(ctx: Context) -> list[str]:
    """The changed fields with which pods are at work, or will be after a suspension.

    A budget is read when a run is created. `publish` itself compares the Hub.
    """
    paths = marked_paths(type(ctx.job.spec))
    return [path for path in changed_fields(ctx) if paths[path] not in (BUDGET, PUBLICATION)]


def resumes_because(changed: list[str]) -> str:
    verb = "has" if len(changed) == 1 else "have"
    return f"{', '.join(f'spec.{path}' for path in changed)} {verb} changed: the job resumes where it stopped"


def publishing(ctx: Context, why: str) -> Context:
    if ctx.publishes:
        return ctx.with_condition(PUBLISHED, "False", Reason.PUBLISHING, why)
    return ctx.without_condition(PUBLISHED)


def has_more_time(ctx: Context) -> bool:
    """Whether the job ended at its deadline, which is later now, or gone."""
    failed = ctx.status.condition(FAILED)
    if failed is None or failed.reason != Reason.DEADLINE_EXCEEDED:
        return False
    left = seconds_left(ctx)
    return left is None or left > 0


def belongs_elsewhere(ctx: Context) -> bool:
    """Whether the job is complete, and its result is not in the place that spec.hub names now."""
    if not (ctx.status.is_true(COMPLETE) and ctx.status.is_true(ctx.done) and ctx.last == "publish"):
        return False
    # The target, not all of spec.hub: another token alone moves nothing.
    return ctx.target_changed or not ctx.status.is_true(PUBLISHED)
