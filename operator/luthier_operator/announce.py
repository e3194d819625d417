"""Events: what a user wants to see in `kubectl describe`, derived from how the status changes.

Nothing is remembered: an event that was lost on the way is not sent again, one for an unchanged status never arises.
"""

from __future__ import annotations

from typing import Literal

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Condition, JobStatus
from luthier_operator.failure.cause import location
from luthier_operator.model import Event

C, R = ConditionType, Reason
EVENTS: dict[Reason, Literal["Normal", "Warning"]] = {
    R.ACCEPTED: "Normal",
    R.WAITING_FOR_JOB: "Normal",
    R.JOB_SET_MISSING: "Warning",
    R.SMALL_WORKSPACE: "Warning",
    R.PREPARING: "Normal",
    R.PREPARED: "Normal",
    R.PLAN_ONLY: "Normal",
    R.FAILED_CREATE: "Warning",
    R.NO_PODS: "Warning",
    R.UNSCHEDULABLE: "Warning",
    R.WAITING_FOR_QUEUE: "Normal",
    R.WAITING_FOR_VOLUME: "Warning",
    R.CONTAINER_CREATING: "Normal",
    R.IMAGE_PULL_FAILED: "Warning",
    R.STARTED: "Normal",
    R.RESTARTING: "Warning",
    R.RUNNING: "Normal",
    R.CHECKPOINT_BROKEN: "Warning",
    R.NOTICE: "Normal",
    R.TRAINED: "Normal",
    R.GENERATED: "Normal",
    R.PUBLISHING: "Normal",
    R.PUBLISH_FAILED: "Warning",
    R.PUBLISHED: "Normal",
    R.SUSPENDED: "Normal",
    R.RESUMED: "Normal",
    R.COMPLETED: "Normal",
    R.FAILED: "Warning",
}
"""All that are ever posted, in the order of a job's life; and, as warnings, the reasons of exit codes while a pod is
tried again.
"""
# Said by other events, or by the conditions alone.
SILENT = {R.STARTING, R.RESTARTING, R.WAITING_FOR_PODS, R.DEADLINE_EXCEEDED, R.NO_PROGRESS, R.SUSPENDED}
OF_PODS = {code.reason for code in ExitCode}
# Worth a line while a job waits to run; the others are said of other conditions then.
OF_WAITING = {R.WAITING_FOR_QUEUE, R.CONTAINER_CREATING}
ORDINARY = {reason for reason, kind in EVENTS.items() if kind == "Normal"}


def events(old: JobStatus, new: JobStatus) -> list[Event]:
    """A restart first, and what it found, then what has turned, in the order in which the conditions arose."""
    found = [restarted(old, new)] if new.restarts > old.restarts else []
    found += [broken(new)] if (new.broken_checkpoints or 0) > (old.broken_checkpoints or 0) else []
    found += [Event("Normal", R.NOTICE, text) for text in new.notices if text not in old.notices]
    return found + [e for c in new.conditions if (e := event(old.condition(c.type), c, new))]


def restarted(old: JobStatus, new: JobStatus) -> Event:
    last = next((a for a in reversed(new.attempts) if a.phase == "run"), None)
    why = f" after {last.reason}: {last.message} ({location(last)})" if last else ""
    free = "" if new.restarts_charged > old.restarts_charged else ", at no charge"
    return Event("Warning", R.RESTARTING, f"restart {new.restarts}{free}{why}")


def broken(status: JobStatus) -> Event:
    place, step = status.workspace, status.checkpoint and status.checkpoint.step
    where = f" in {place.folder}/checkpoints of claim {place.claim_name}" if place else ""
    on = f"goes on from step {step}" if step else "begins anew"
    return Event(
        "Warning",
        R.CHECKPOINT_BROKEN,
        f"a checkpoint does not match its manifest and is set aside as .corrupt-checkpoint-*{where}; the run {on}",
    )


def event(before: Condition | None, now: Condition, status: JobStatus) -> Event | None:
    """The event of one condition, if it has turned or got another reason."""
    if before and (before.status, before.reason) == (now.status, now.reason):
        return None
    if now.type == C.FAILED and now.status == "True":
        return Event("Warning", R.FAILED, f"{now.reason}: {now.message}")
    if now.type == C.RUNNING and now.status == "True":
        again = status.restarts or (before and before.reason == R.RESTARTING)
        return Event("Normal", R.RUNNING if again else R.STARTED, now.message)
    if now.type == C.ACCEPTED and now.status == "True" and before is None:
        return None  # Preparing says it, in the same moment
    if now.status == "True":
        return Event("Normal", now.reason, now.message)
    if now.type in (C.FAILED, C.COMPLETE) and now.reason == R.PUBLISHING:
        return None  # Published says it, in the same moment
    if now.reason in SILENT or (now.type == C.RUNNING and now.reason in ORDINARY - OF_WAITING):
        return None
    if now.reason in ORDINARY:
        return Event("Normal", now.reason, now.message)
    if status.is_true(C.FAILED):
        return None  # the event of Failed says it
    return Event(
        "Warning", R.PUBLISH_FAILED if now.type == C.PUBLISHED and now.reason in OF_PODS else now.reason, now.message
    )
