"""Publish: one pod without a GPU that uploads the result and verifies the upload. While the Hub is away it is retried;
the result is not lost.

The publish Job carries the hash of the `spec.hub` that it was made from. When `spec.hub` changes, the Job is replaced,
also after the job has ended (`reopen`): a trained result can be published at any time.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children, naming, statuses
from luthier_operator.failure.cause import judge
from luthier_operator.phases import waiting
from luthier_operator.phases.context import Context, Step
from luthier_operator.phases.reopen import HUB_CHANGED
from luthier_operator.render.job import publish as publish_job

PUBLISHED = ConditionType.PUBLISHED


def publish(ctx: Context) -> Step:
    """Set the condition Published, if the job has a repository."""
    if ctx.status.is_true(PUBLISHED):
        return ctx.goes_on()
    job = ctx.child("publish")
    if not ctx.publishes:
        at_work = job is not None and not children.deleting(job) and not children.succeeded(job)
        delete = [ctx.workload.child("publish")] if at_work else []
        return Step(statuses.without_condition(ctx.status, PUBLISHED), goes_on=True, delete=delete)
    if waits := waiting.for_old_pods(ctx, "publish", PUBLISHED):
        return waits

    if job is None:
        places = ctx.places()
        return ctx.with_image("publish").creates(
            PUBLISHED,
            Reason.PUBLISHING,
            doing(ctx),
            publish_job(ctx.workload, ctx.settings, places),
            repair=ctx.configmap(),  # spec.hub may have changed
        )
    if ctx.hub_changed:
        ctx = ctx.with_condition(PUBLISHED, "False", Reason.PUBLISHING, HUB_CHANGED)
        return ctx.stops(delete=[ctx.workload.child("publish")])
    if children.succeeded(job):
        waits = waiting.for_messages(ctx, job, known=ctx.status.hub is not None)
        return waits or published(ctx)
    if failed := children.failed(job):
        if waits := waiting.for_evidence(ctx, "publish", job):
            return waits
        failure, place = judge(ctx.attempts("publish"), "publish", failed), naming.place(ctx.job)
        message = (
            f"{failure.message}. The result stays in {place.folder}/result of claim {place.claim}; change spec.hub to"
            " publish it again"
        )
        return ctx.with_condition(PUBLISHED, "False", failure.reason, message).fails(failure.reason, message)
    return waiting.for_one_pod(ctx, "publish", PUBLISHED, Reason.PUBLISHING, doing(ctx))


def published(ctx: Context) -> Step:
    message = repo(ctx)
    if ctx.status.hub:
        message += f"@{ctx.status.hub.revision[:12]}"
    return ctx.with_condition(PUBLISHED, "True", Reason.PUBLISHED, message).goes_on()


def doing(ctx: Context) -> str:
    return f"a pod uploads to {repo(ctx)}"


def repo(ctx: Context) -> str:
    return (ctx.job.spec.hub and ctx.job.spec.hub.repo) or ""
