"""Run: the pods that train or generate.

Begins when `prepare` has succeeded, ends when the JobSet or Job is finished. The cluster restarts pods by itself, also
while the operator is away, so this step only creates the child, reads it and judges how it ended.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_operator import children, naming, statuses
from luthier_operator.failure.cause import Failure, judge, location
from luthier_operator.model import Object
from luthier_operator.phases import queued, waiting
from luthier_operator.phases.accept import for_jobset, not_allowed
from luthier_operator.phases.context import Context, Step
from luthier_operator.phases.record import with_notices
from luthier_operator.phases.silence import silent

RUNNING = ConditionType.RUNNING


def run(ctx: Context) -> Step:
    """Set the condition Running, and Trained or Generated at the end."""
    if ctx.status.is_true(ctx.done):
        return ctx.goes_on()
    if waits := waiting.for_old_pods(ctx, "run", RUNNING):
        return waits

    child = ctx.child("run")
    if child is None:
        ctx = ctx.without_condition(ConditionType.ADMITTED)
        if waits := for_jobset(ctx, RUNNING):  # it was installed when the job was accepted, and may be gone since
            return waits
        if refused := not_allowed(ctx):  # the settings or the job may have changed since it was accepted
            return ctx.with_condition(RUNNING, "False", Reason.NOT_ALLOWED, refused).fails(Reason.NOT_ALLOWED, refused)
        status, places = ctx.status, ctx.places()
        before = ctx.workload.restarts_before(status)
        ctx = ctx.with_image("run")
        manifest = ctx.workload.run_manifest(ctx.settings, places, before, status.restarts_charged)
        return ctx.creates(RUNNING, Reason.STARTING, starting(ctx), manifest, repair=ctx.configmap())

    ctx = queued.admission(ctx, child)
    if children.succeeded(child):
        waits = waiting.for_messages(ctx, child, known=ctx.status.metrics is not None)
        return waits or succeeded(ctx)

    if failed := children.failed(child):
        if waits := waiting.for_evidence(ctx, "run", child):
            return waits
        failure = judge(ctx.attempts("run"), "run", failed)
        if again := with_smaller_micro_batch(ctx, failure):
            return again
        message = failure.message + ctx.workload.describe_budget(child, failed)
        return ctx.with_condition(RUNNING, "False", failure.reason, message).fails(failure.reason, message)

    no_progress = ctx.workload.no_progress(ctx.attempts("run"), ctx.ends("run"))
    if no_progress:
        return stop_run(ctx, Reason.NO_PROGRESS, no_progress)
    return at_work(ctx, child)


def with_smaller_micro_batch(ctx: Context, failure: Failure) -> Step | None:
    """After CUDA has run out of memory, resume once with half the rows in a forward pass and twice the passes.

    The optimiser steps see the same rows and the loss is their sum, so the result is the same. The child is replaced by
    the next decision.
    """
    if failure.reason != ExitCode.CUDA_OUT_OF_MEMORY.reason or ctx.status.prepared is None:
        return None
    rows = ctx.workload.smaller_micro_batch(ctx.status)
    if rows is None:
        return None
    plan = ctx.status.prepared.plan
    smaller = plan.with_micro_batch(rows)
    why = (
        f"microBatchSize: {rows} instead of {plan.micro_batch_size}, because CUDA ran out of memory;"
        f" {smaller.accumulation_steps} accumulation steps instead of {plan.accumulation_steps or 1} keep the batch of"
        " a step and its loss the same"
    )
    smaller = smaller.model_copy(update={"reasons": [*plan.reasons, why]})
    ctx = ctx.with_status(
        prepared=ctx.status.prepared.model_copy(update={"plan": smaller}),
        reduced_micro_batch_size=rows,
        resumes=ctx.status.resumes + 1,
        notices=with_notices(ctx.status.notices, [why]),
    )
    return ctx.waits(RUNNING, Reason.RESTARTING, f"after {failure.reason}: {failure.message}. {why}")


def succeeded(ctx: Context) -> Step:
    ctx = ctx.with_status(progress=statuses.at_end(ctx.status.progress, ctx.status.metrics))
    place, reason = naming.place(ctx.job), Reason(ctx.done)
    ctx = ctx.with_condition(ctx.done, "True", reason, f"the result is in {place.folder}/result of claim {place.claim}")
    return ctx.with_condition(RUNNING, "False", reason, "all pods have succeeded").goes_on()


def at_work(ctx: Context, child: Object) -> Step:
    """The pods are queued, starting, running or restarting."""
    restart = ctx.workload.current_restart(child)
    running = children.running(ctx.pods("run"), restart)
    # Pods succeed one after another, and all of them before the child does. Those that have succeeded count as running.
    succeeded = sum(end.exit_code == 0 and restart in (None, end.attempt) for end in ctx.ends("run"))
    if ctx.workload.is_running(running, succeeded):
        return is_running(ctx)

    if (manager := children.manager(child)) and not children.suspended(child):
        message = (
            f"{child['kind']} {child['metadata']['name']} is run by {manager} (spec.managedBy), in another cluster. Its"
            " pods need the claim of the workspace and the ConfigMap of this job there, too"
        )
        return ctx.waits(RUNNING, Reason.RUNS_ELSEWHERE, message)

    attempts = ctx.attempts("run")
    repeated = ctx.workload.repeated_failure(attempts)
    if repeated:
        return stop_run(ctx, repeated.reason, repeated.message)

    if given_up := waiting.given_up(ctx, "run"):
        return stop_run(ctx, given_up.reason, given_up.message)
    expected = min(ctx.workload.pods, ctx.workload.parallel_pods + succeeded)
    pending, again = waiting.pending_reason(ctx, "run", expected)
    if pending:
        return ctx.waits(RUNNING, pending.reason, pending.message, requeue_after=again)
    if attempts:
        last = attempts[-1]
        if ctx.workload.is_final(last, ctx.status):
            return ctx.stops(requeue_after=again)  # the child is about to fail
        message = f"after {last.reason}: {last.message} ({location(last)})"
        return ctx.waits(RUNNING, Reason.RESTARTING, message, requeue_after=again)
    return ctx.waits(RUNNING, Reason.STARTING, starting(ctx), requeue_after=again)


def is_running(ctx: Context) -> Step:
    doubt = silent(ctx)
    reason, message = (doubt.reason, doubt.message) if doubt else (Reason.RUNNING, ctx.workload.describe_pods())
    ctx = ctx.with_condition(RUNNING, "True", reason, message)
    condition = ctx.status.condition(RUNNING)
    if condition and not ctx.status.run_start_time:
        ctx = ctx.with_status(run_start_time=condition.last_transition_time)
    return ctx.stops()


def stop_run(ctx: Context, reason: str, message: str) -> Step:
    """Fail the job although the cluster would restart its pods."""
    ctx = ctx.with_condition(RUNNING, "False", reason, message)
    return ctx.fails(reason, message, delete=[ctx.workload.child("run")])


def starting(ctx: Context) -> str:
    return f"waiting for {ctx.workload.describe_pods()} to start"
