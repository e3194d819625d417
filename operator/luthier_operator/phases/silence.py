"""Pods that run but make no progress: said after a few minutes, long before the pod itself ends as hung.

The trainer serves the age of its heartbeat, which every step, batch of an evaluation, output and growing file renews. A
pod without one is still loading its model, and is judged by its own limit alone.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.run import METRICS_PORT
from luthier_operator import children
from luthier_operator.children import PendingReason
from luthier_operator.phases.context import Context

NO_STEP_SECONDS = 300.0
STEPS_WAITED = 3  # where a step takes minutes
FIRST_STEP_SECONDS = 900.0  # it may have to compile the model
REASONS = (Reason.NO_STEP, Reason.PROGRESS_UNKNOWN)


def silent(ctx: Context) -> PendingReason | None:
    """Why it is doubtful that the running pods make progress. None if they do.

    The text stays the same while the situation does: it is written once, and not at each reading.
    """
    pods = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in ctx.pods("run") if not children.deleting(pod)}
    known = {name: ctx.observed.silences[uid] for uid, name in pods.items() if uid in ctx.observed.silences}
    if not known:  # this operator process has not read any of them yet
        return written_before(ctx)

    limit = longest_pause(ctx)
    names = sorted(name for name, silence in known.items() if silence.seconds >= limit)
    if not names:
        return None
    name, more = names[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
    if error := known[name].error:
        return PendingReason(
            Reason.PROGRESS_UNKNOWN,
            f"the metrics of pod {name}{more} could not be read for {limit:g} s ({error}): whether it makes progress is"
            " unknown. Either its process hangs, or a NetworkPolicy keeps the operator from port"
            f" {METRICS_PORT} of the pods (docs/install.md); see `kubectl logs {name}`",
        )
    return PendingReason(
        Reason.NO_STEP,
        f"pod {name}{more} has made no progress for {limit:g} s: no step, batch of an evaluation, output or growing"
        f" checkpoint{last_step(ctx)}. A pod that hangs ends by itself with exit code 80 (spec.scheduling"
        f".stepTimeoutSeconds), with the stacks of its processes in the log, and is started again; see `kubectl logs"
        f" {name}`",
    )


def written_before(ctx: Context) -> PendingReason | None:
    """What the status says, until this operator process knows better."""
    condition = ctx.status.condition(ConditionType.RUNNING)
    if condition and condition.status == "True" and condition.reason in REASONS:
        return PendingReason(condition.reason, condition.message)
    return None


def longest_pause(ctx: Context) -> float:
    """Seconds without a heartbeat that are nothing unusual."""
    progress = ctx.status.progress
    if progress is None or not (progress.step or progress.rows):
        return FIRST_STEP_SECONDS
    if not progress.eta_seconds or not progress.max_steps:
        return NO_STEP_SECONDS
    left = progress.max_steps - (progress.step or 0)
    if left <= 0:
        return NO_STEP_SECONDS
    return max(NO_STEP_SECONDS, float(round(STEPS_WAITED * progress.eta_seconds / left)))


def last_step(ctx: Context) -> str:
    progress = ctx.status.progress
    if progress is None or progress.step is None:
        return ""
    return f"; the last step was {progress.step} of {progress.max_steps}"
