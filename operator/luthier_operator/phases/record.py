"""What is observed goes into the status before anything is decided: reports of pods, progress, restarts, failures.

Reports may come late, even after the job is complete, or never, if a pod was deleted before the operator saw it end. No
step waits for them forever (`waiting.for_messages`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from luthier_api import canary
from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES, Checkpoint, HubRequest, HubStatus, Phase, Prepared, SourceStatus, TrackedRun
from luthier_operator import children, naming, statuses
from luthier_operator.failure.attempts import attempts_of_pods
from luthier_operator.model import PodEnd
from luthier_operator.phases.context import Context
from luthier_operator.versions import RELEASE

NOTICES_KEPT = 40  # the limit in the CRD
PHASES_OF_ONE_POD: tuple[Phase, ...] = tuple(phase for phase in PHASES if phase != "run")


def record(ctx: Context) -> Context:
    """`ctx` with everything in its status that was observed."""
    ctx = ctx.with_status(
        observed_generation=ctx.job.metadata.generation,
        shape=ctx.workload.shape,
        workspace=naming.workspace_status(ctx.job),
    )
    ctx = reports(requests(ctx))
    ctx = ctx.without_condition(ConditionType.INTERNAL_ERROR)
    if ctx.status.finished:
        return ctx
    ctx = ignored_fields(ctx)
    if ctx.job.spec.suspend:
        return ctx
    ctx = restarts(ctx)
    for phase in PHASES_OF_ONE_POD:
        attempts = attempts_of_pods(ctx.status.attempts, ctx.ends(phase), phase)
        ctx = ctx.with_status(attempts=attempts)
    return ctx


def requests(ctx: Context) -> Context:
    """What existing children were made from. They are deleted some time after the job has ended."""
    prepare, publish = ctx.child("prepare"), ctx.child("publish")
    if prepare:
        places = json.loads(children.annotation(prepare, naming.SOURCES_ANNOTATION) or "{}")
        found = [
            SourceStatus(job=name, claim_name=claim, folder=folder) for name, (claim, folder) in sorted(places.items())
        ]
        ctx = ctx.with_status(sources=found or None)
    if publish:
        target = children.annotation(publish, naming.TARGET_ANNOTATION)
        request = HubRequest(target=target, hash=children.annotation(publish, naming.HUB_ANNOTATION))
        ctx = ctx.with_status(hub_request=request)
    return ctx


def reports(ctx: Context) -> Context:
    """What pods reported when they succeeded, and the metrics of those that run."""
    status, observed = ctx.status, ctx.observed
    metrics = final_metrics(ctx) or status.metrics
    progress = status.progress
    if status.is_true(ctx.done):
        progress = statuses.at_end(progress, metrics)
    elif observed.progress:
        progress = statuses.newer(status.progress, observed.progress)
    broken = status.broken_checkpoints
    if observed.broken_checkpoints is not None:
        broken = observed.broken_checkpoints or None
    return ctx.with_status(
        notices=notices(ctx),
        prepared=status.prepared or prepared(ctx),
        metrics=metrics,
        hub=hub(ctx) or status.hub,
        tracking=tracking(ctx) or status.tracking,
        progress=progress,
        checkpoint=checkpoint(ctx),
        broken_checkpoints=broken,
    )


def ignored_fields(ctx: Context) -> Context:
    """Fields that a newer CRD has let in, and that this operator leaves out of everything it creates."""
    unknown = ctx.observed.unknown_fields
    if not unknown:
        return ctx.without_condition(ConditionType.FIELDS_IGNORED)
    message = (
        f"{', '.join(unknown)}: this operator ({RELEASE}) does not know the field and ignores it, because the CRDs are"
        " newer; install both from the same chart"
    )
    return ctx.with_condition(ConditionType.FIELDS_IGNORED, "True", Reason.UNKNOWN_FIELDS, message)


def succeeded(ctx: Context, phase: Phase) -> list[PodEnd]:
    """Ends of pods of `phase` that succeeded and left a message."""
    ended = ctx.observed.ended
    return [end for end in ended if end.phase == phase and end.exit_code == 0 and end.message]


def prepared(ctx: Context) -> Prepared | None:
    """What the newest pod of `prepare` found.

    Until the condition holds, only a pod of the present Job counts: after another layout was asked for, there may be an
    earlier one with another plan.
    """
    ends = succeeded(ctx, "prepare")
    if not ctx.status.is_true(ConditionType.PREPARED):
        present = [] if ctx.is_outdated("prepare") else ctx.ends("prepare")
        ends = [end for end in ends if end in present]
    found = [end.message.prepared for end in ends if end.message and end.message.prepared]
    return found[-1] if found else None


def notices(ctx: Context) -> list[str]:
    """The known notices and after them the new ones, each once."""
    reported = [notice for end in ctx.observed.ended if end.message for notice in end.message.notices]
    progress, known = ctx.observed.progress, ctx.status.prepared
    if progress and known:
        reported += canary.remarks(known.plan, progress.plan_seconds_ratio, progress.plan_memory_ratio)
    return with_notices(ctx.status.notices, reported)


def with_notices(known: Sequence[str], further: Sequence[str]) -> list[str]:
    """The known notices and after them the further ones, each once, as many as the status has room for."""
    return list(dict.fromkeys([*known, *further]))[:NOTICES_KEPT]


def hub(ctx: Context) -> HubStatus | None:
    """Where the pod of `publish` uploaded the result, if spec.hub still names that place."""
    if ctx.hub_changed:
        return None
    ends = ctx.ends("publish")
    if ctx.child("publish") is None and ctx.status.is_true(ConditionType.PUBLISHED):
        ends = [end for end in ctx.observed.ended if end.phase == "publish"]  # the Job was deleted before the report
    reported = [end.message.hub for end in ends if end.exit_code == 0 and end.message and end.message.hub]
    return reported[-1] if reported else None


def tracking(ctx: Context) -> list[TrackedRun] | None:
    """Where trackers show the training, as the newest pod of `run` that tracked reported it."""
    reported = [
        end for end in ctx.observed.ended if end.phase == "run" and end.message and end.message.tracking is not None
    ]
    last = max(reported, key=lambda end: end.ended_at, default=None)
    return last.message.tracking if last and last.message else None


def final_metrics(ctx: Context) -> dict[str, float] | None:
    """Metrics of the result. None until all pods that count have reported."""
    ends = succeeded(ctx, "run")
    by_index = {end.index: end.message.metrics for end in ends if end.message and end.message.metrics}
    return ctx.workload.final_metrics(by_index)


def checkpoint(ctx: Context) -> Checkpoint | None:
    """The newest verified checkpoint: as rank 0 serves it, else as the last pods reported it when they ended.

    It may be older than the known one, because a broken checkpoint is set aside when the run resumes.
    """
    known, step = ctx.status.checkpoint, ctx.observed.checkpoint_step
    if not ctx.workload.has_checkpoints:
        return known
    if step is None:
        step = last_reported_step(ctx.ends("run") if ctx.child("run") else ends_of_last_run(ctx))
    if step is None or (known and known.step == step):
        return known
    return Checkpoint(step=step, time=statuses.text(ctx.now)) if step else None


def ends_of_last_run(ctx: Context) -> list[PodEnd]:
    """The ends of pods of the newest child of `run` that was deleted. A suspended pod saves a checkpoint, and its end
    may be seen after its JobSet is gone.
    """
    ends = [end for end in ctx.observed.ended if end.phase == "run"]
    last = max(ends, key=lambda end: end.ended_at, default=None)
    return [end for end in ends if last and end.child == last.child]


def last_reported_step(ends: list[PodEnd]) -> int | None:
    """The highest step that a pod of the last attempt reported."""
    last = max((end.attempt for end in ends), default=0)
    steps = [end.message.step for end in ends if end.attempt == last and end.message and end.message.step is not None]
    return max(steps, default=None)


def restarts(ctx: Context) -> Context:
    """Failures of the run, and its restarts."""
    child = ctx.child("run")
    if child is None or children.deleting(child) or ctx.is_outdated("run"):
        return ctx
    found = ctx.workload.restarts(child, ctx.status, ctx.ends("run"), ctx.pods("run"))
    return ctx.with_status(attempts=found.attempts, restarts=found.total, restarts_charged=found.charged)
