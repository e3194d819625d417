"""The events that a user sees in `kubectl describe`, derived from the changes of the status.

Nothing is remembered: an event that could not be posted is not sent again, and an unchanged status causes none.
"""

from __future__ import annotations

from typing import Literal

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Attempt, Condition, JobStatus
from luthier_operator.failure.cause import location
from luthier_operator.model import Event
from luthier_operator.workloads.base import Workload

C, R = ConditionType, Reason
EVENTS: dict[Reason, Literal["Normal", "Warning"]] = {
    R.ACCEPTED: "Normal",
    R.WAITING_FOR_JOB: "Normal",
    R.SOURCE_NOT_UNDERSTOOD: "Warning",
    R.NOT_UNDERSTOOD: "Warning",
    R.UNKNOWN_FIELDS: "Warning",
    R.INTERNAL_ERROR: "Warning",
    R.STATUS_REFUSED: "Warning",
    R.JOB_SET_MISSING: "Warning",
    R.SMALL_WORKSPACE: "Warning",
    R.PREPARING: "Normal",
    R.PREPARED: "Normal",
    R.PLAN_ONLY: "Normal",
    R.FAILED_CREATE: "Warning",
    R.NO_PODS: "Warning",
    R.UNSCHEDULABLE: "Warning",
    R.WAITING_FOR_QUEUE: "Normal",
    R.ADMITTED: "Normal",
    R.EVICTED: "Warning",
    R.DEACTIVATED: "Warning",
    R.INADMISSIBLE: "Warning",
    R.UNSATISFIABLE: "Warning",
    R.WAITING_FOR_KUEUE: "Warning",
    R.NOT_QUEUED: "Warning",
    R.RUNS_ELSEWHERE: "Normal",
    R.WAITING_FOR_VOLUME: "Warning",
    R.CONTAINER_CREATING: "Normal",
    R.IMAGE_PULL_FAILED: "Warning",
    R.STARTED: "Normal",
    R.RESTARTING: "Warning",
    R.RUNNING: "Normal",
    R.NO_STEP: "Warning",
    R.PROGRESS_UNKNOWN: "Warning",
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
"""All events that are ever posted, in the order of a job's life. While a failed pod is retried, the reason of its exit
code is posted as well, as a warning.
"""
# Reported by another event, or only by a condition.
WITHOUT_EVENT = {
    R.PENDING,
    R.QUOTA_RESERVED,
    R.STARTING,
    R.RESTARTING,
    R.WAITING_FOR_PODS,
    R.DEADLINE_EXCEEDED,
    R.NO_PROGRESS,
    R.NOT_ALLOWED,
    R.SUSPENDED,
}
REASONS_OF_EXIT_CODES = {code.reason for code in ExitCode}
# Of the reasons why a job does not run yet, those that are an event. The others are events of other conditions.
WORTH_AN_EVENT_WHILE_PENDING = {R.WAITING_FOR_QUEUE, R.CONTAINER_CREATING, R.RUNS_ELSEWHERE}
NORMAL = {reason for reason, event_type in EVENTS.items() if event_type == "Normal"}


def events(workload: Workload, old: JobStatus, new: JobStatus) -> list[Event]:
    """The events between two statuses: a restart, what it found, new notices, then the changes of conditions."""
    found = []
    cause = cause_of_restart(workload, new)
    # Children and pods are watched separately: that the run restarts may be seen before how its pod has ended.
    explained_late = new.restarts == old.restarts and cause and not cause_of_restart(workload, old)
    if new.restarts > old.restarts or explained_late:
        found.append(restarted(old, new, cause))
    if (new.broken_checkpoints or 0) > (old.broken_checkpoints or 0):
        found.append(broken_checkpoint(new))
    found += [Event("Normal", R.NOTICE, text) for text in new.notices if text not in old.notices]
    for condition in new.conditions:
        changed = event(old.condition(condition.type), condition, new)
        if changed:
            found.append(changed)
    return found


def cause_of_restart(workload: Workload, status: JobStatus) -> Attempt | None:
    """The failure before the last restart, if it is known."""
    attempts = [attempt for attempt in status.attempts if attempt.phase == "run"]
    return workload.cause_of_restart(attempts, status.restarts) if status.restarts else None


def restarted(old: JobStatus, new: JobStatus, cause: Attempt | None) -> Event:
    message = f"restart {new.restarts}"
    if new.restarts > old.restarts and new.restarts_charged == old.restarts_charged:
        message += " (not charged)"
    if cause:
        message += f" after {cause.reason}: {cause.message} ({location(cause)})"
        return Event("Warning", R.RESTARTING, message)
    message += "; how the pod before it ended has not been seen"
    last = next((attempt for attempt in reversed(new.attempts) if attempt.phase == "run"), None)
    if last:
        message += f". The last known failure is {last.reason}: {last.message} ({location(last)})"
    return Event("Warning", R.RESTARTING, message)


def broken_checkpoint(status: JobStatus) -> Event:
    where = ""
    if status.workspace:
        where = f" in {status.workspace.folder}/checkpoints of claim {status.workspace.claim_name}"
    resumes = "starts from the beginning"
    if status.checkpoint and status.checkpoint.step:
        resumes = f"resumes from step {status.checkpoint.step}"
    message = (
        f"a checkpoint does not match its manifest and was set aside as .corrupt-checkpoint-*{where}; the run {resumes}"
    )
    return Event("Warning", R.CHECKPOINT_BROKEN, message)


def event(before: Condition | None, now: Condition, status: JobStatus) -> Event | None:
    """The event of one condition, if its status or its reason has changed."""
    if before and (before.status, before.reason) == (now.status, now.reason):
        return None
    if now.type in (C.RECONCILING, C.STALLED):
        return None  # they follow from the others
    if now.reason == R.CONDITIONS_LOST:
        return None  # the event of the end was posted when the job ended
    if now.status == "True":
        return event_of_true(before, now, status)
    if now.type in (C.FAILED, C.COMPLETE) and now.reason == R.PUBLISHING:
        return None  # the event of Published follows at once
    if now.reason in WITHOUT_EVENT:
        return None
    if now.type == C.ADMITTED:
        return event_of_queue(now)
    if now.type == C.RUNNING and now.reason in NORMAL - WORTH_AN_EVENT_WHILE_PENDING:
        return None
    if now.reason in NORMAL:
        return Event("Normal", now.reason, now.message)
    if status.is_true(C.FAILED):
        return None  # the event of Failed has the same message
    reason = now.reason
    if now.type == C.PUBLISHED and now.reason in REASONS_OF_EXIT_CODES:
        reason = R.PUBLISH_FAILED
    return Event("Warning", reason, now.message)


def event_of_queue(now: Condition) -> Event:
    """The event of a job that its queue does not admit. The reason may be any that Kueue has."""
    for reason, event_type in EVENTS.items():
        if now.reason == reason:
            return Event(event_type, reason, now.message)
    if now.reason.startswith(R.DEACTIVATED):
        return Event("Warning", R.DEACTIVATED, f"{now.reason}: {now.message}")
    return Event("Warning", R.EVICTED, f"{now.reason}: {now.message}")


def event_of_true(before: Condition | None, now: Condition, status: JobStatus) -> Event | None:
    """The event of a condition that is True."""
    if now.type == C.FAILED:
        return Event("Warning", R.FAILED, f"{now.reason}: {now.message}")
    if now.type == C.RUNNING and now.reason in (R.NO_STEP, R.PROGRESS_UNKNOWN):
        return Event("Warning", now.reason, now.message)
    if now.type == C.RUNNING:
        again = status.restarts or (before and before.reason in (R.RESTARTING, R.NO_STEP, R.PROGRESS_UNKNOWN))
        return Event("Normal", R.RUNNING if again else R.STARTED, now.message)
    if now.type == C.ACCEPTED and before is None:
        return None  # the event of Preparing follows at once
    if now.type in (C.FIELDS_IGNORED, C.INTERNAL_ERROR):
        return Event("Warning", now.reason, now.message)
    return Event("Normal", now.reason, now.message)
