"""Prepare: one pod without a GPU that resolves the model, loads and tokenises the data and plans the run.

It fails early and cheaply, and is retried after failures of the infrastructure. A job with `planOnly` ends here.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children, statuses
from luthier_operator.failure.cause import judge
from luthier_operator.phases import waiting
from luthier_operator.phases.context import Context, Step
from luthier_operator.render.claim import claim
from luthier_operator.render.job import prepare as prepare_job

PREPARED = ConditionType.PREPARED
DOING = "a pod resolves the model, loads the data and plans the run"


def prepare(ctx: Context) -> Step:
    """Set the condition Prepared."""
    if ctx.status.is_true(PREPARED):
        return prepared(ctx)
    job = ctx.child("prepare")
    if not ctx.status.start_time:
        # A Job that exists was created before a status that was never written.
        ctx = ctx.with_status(start_time=statuses.text((job and children.created(job)) or ctx.now))
    if waits := waiting.for_old_pods(ctx, "prepare", PREPARED):
        return waits

    if job is None:
        places = ctx.places()
        return ctx.with_image("prepare").creates(
            PREPARED,
            Reason.PREPARING,
            DOING,
            ctx.configmap(),
            claim(ctx.workload, ctx.settings),
            prepare_job(ctx.workload, ctx.settings, places),
        )
    if children.succeeded(job):
        waits = waiting.for_messages(ctx, job, known=ctx.status.prepared is not None)
        return waits or prepared(ctx)
    if failed := children.failed(job):
        if waits := waiting.for_evidence(ctx, "prepare", job):
            return waits
        failure = judge(ctx.attempts("prepare"), "prepare", failed)
        ctx = ctx.with_condition(PREPARED, "False", failure.reason, failure.message)
        return ctx.fails(failure.reason, failure.message)
    return waiting.for_one_pod(ctx, "prepare", PREPARED, Reason.PREPARING, DOING)


def prepared(ctx: Context) -> Step:
    """Prepared. The next step follows unless only the plan was asked for."""
    plan_only = ctx.last == "prepare"
    reason = Reason.PLAN_ONLY if plan_only else Reason.PREPARED
    ctx = ctx.with_condition(PREPARED, "True", reason, summary(ctx))
    return ctx.stops() if plan_only else ctx.goes_on()


def summary(ctx: Context) -> str:
    """`org/model@c0ffee, 900 rows and 100 to evaluate, strategy ddp, 40 steps`."""
    found = ctx.status.prepared
    if found is None:
        return "prepared"
    model = found.model.source
    if found.model.revision:
        model += f"@{found.model.revision[:12]}"
    rows = f"{found.dataset.rows} rows"
    if found.dataset.eval_rows:
        rows += f" and {found.dataset.eval_rows} to evaluate"
    parts = [model, rows, f"strategy {found.plan.strategy}"]
    if found.plan.steps:
        parts.append(f"{found.plan.steps} steps")
    return ", ".join(parts)
