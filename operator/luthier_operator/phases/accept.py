"""Accept: the checks that need the state of the cluster, which the rules of the CRD do not have.

Do the jobs exist whose results this one uses, and is everything installed that it needs? Checked until `prepare` has
begun; from then on the job works with what was found.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_api.kinds import KINDS, JobKind, source_of
from luthier_api.status import State
from luthier_operator import naming, policy
from luthier_operator.phases.context import Context, Step
from luthier_operator.render.configmap import LIMIT_BYTES
from luthier_operator.versions import INSTALL_JOBSET, RELEASE, SAME_CHART

CHECK_AGAIN_SECONDS = 30

ACCEPTED = ConditionType.ACCEPTED
CAN_RUN = "The job can run"
START_FROM = {JobKind.FINE_TUNE: "another model", JobKind.GENERATE: "other inputs"}


def accept(ctx: Context) -> Step:
    """Set the condition Accepted. The job waits while it is False."""
    if ctx.child("prepare") or ctx.status.is_true(ConditionType.PREPARED):
        if not ctx.status.is_true(ACCEPTED):  # the status was not written when `prepare` was created
            ctx = ctx.with_condition(ACCEPTED, "True", Reason.ACCEPTED, CAN_RUN)
        return ctx.goes_on()

    mistake = find_mistake(ctx)
    if mistake:
        ctx = ctx.with_condition(ACCEPTED, "False", Reason.INVALID_SPEC, mistake)
        return ctx.fails(ExitCode.INVALID_SPEC.reason, mistake, resumable=False)

    if refused := not_allowed(ctx):
        return ctx.with_condition(ACCEPTED, "False", Reason.NOT_ALLOWED, refused).fails(Reason.NOT_ALLOWED, refused)
    if waits := for_jobset(ctx, ACCEPTED):
        return waits
    for field, name in ctx.workload.sources.items():
        if waits := for_source(ctx, field, name):
            return waits
    message = CAN_RUN + policy.describe_defaults(ctx.observed.job, ctx.settings)
    return ctx.with_condition(ACCEPTED, "True", Reason.ACCEPTED, message).goes_on()


def for_jobset(ctx: Context, condition: ConditionType) -> Step | None:
    """Wait until JobSet is installed. None if it is, or if the job does not need it."""
    if ctx.observed.jobset_installed or ctx.workload.run_child_kind != "JobSet":
        return None
    missing = f"FineTuneJobs need JobSet, which this cluster does not have. Install it: {INSTALL_JOBSET}"
    return ctx.waits(condition, Reason.JOB_SET_MISSING, missing, requeue_after=CHECK_AGAIN_SECONDS)


def for_source(ctx: Context, field: str, name: str) -> Step | None:
    """Wait until the job `name`, whose result the job uses, has succeeded. None if it has."""
    source = ctx.observed.sources.get(name)
    kind, alone = source_of(name)
    done = KINDS[kind].done
    described = f'{field}: {kind} "{alone}"'
    if name in ctx.observed.unreadable_sources:
        problem = ctx.observed.unreadable_sources[name]
        waiting = f"{described} exists, but this operator ({RELEASE}) does not understand it: {problem}. {SAME_CHART}"
        return ctx.waits(ACCEPTED, Reason.SOURCE_NOT_UNDERSTOOD, waiting, requeue_after=CHECK_AGAIN_SECONDS)
    if source is None:
        waiting = f'{field}: there is no {kind} "{alone}" in this namespace; waiting for its result'
        return ctx.waits(ACCEPTED, Reason.WAITING_FOR_JOB, waiting, requeue_after=CHECK_AGAIN_SECONDS)

    if source.status.is_true(done) or source.status.is_true(ConditionType.COMPLETE):
        return None
    if source.status.is_true(ConditionType.FAILED):
        failed = f"{described} has failed, so there is no result to start from. Repair that job first"
        return ctx.with_condition(ACCEPTED, "False", Reason.SOURCE_FAILED, failed).fails(Reason.SOURCE_FAILED, failed)
    waiting = f"{described} is {source.status.state or State.PENDING}; waiting for its result"
    return ctx.waits(ACCEPTED, Reason.WAITING_FOR_JOB, waiting, requeue_after=CHECK_AGAIN_SECONDS)


def find_mistake(ctx: Context) -> str | None:
    """A mistake in the spec with which the job can never run."""
    mistake = ctx.workload.find_mistake()
    if mistake:
        return mistake
    if ctx.observed.cycle:
        field = next(field for field, name in ctx.workload.sources.items() if name == ctx.observed.cycle[1])
        return (
            f"{field}: {ctx.job.kind}s wait for each other's results:"
            f" {' → '.join(source_of(name)[1] for name in ctx.observed.cycle)}. One of them has to start from"
            f" {START_FROM[naming.kind(ctx.job)]}"
        )
    (document,) = ctx.configmap()["data"].values()
    size = len(document.encode())
    if size > LIMIT_BYTES:
        return (
            f"spec: {size} bytes as a run config, more than the {LIMIT_BYTES} that a ConfigMap holds; put the rows into"
            " a file (spec.inputs.dataset.files)"
        )
    return None


def not_allowed(ctx: Context) -> str | None:
    """Why the administrator's settings refuse the job. None if they allow it."""
    try:
        policy.check(ctx.workload, ctx.settings)
    except policy.NotAllowed as refused:
        return str(refused)
    return None
