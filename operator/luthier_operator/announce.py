"""Events: what a user wants to see in `kubectl describe`, derived from how the status changes.

Nothing is remembered: an event that was lost on the way is not sent again, one for an unchanged status never arises.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Condition, JobStatus
from luthier_operator.failure import place
from luthier_operator.model import Event

C, R = ConditionType, Reason
# Said by other events, or by the conditions alone.
SILENT = {R.STARTING, R.RESTARTING, R.WAITING_FOR_PODS, R.DEADLINE_EXCEEDED, R.NO_PROGRESS}
OF_PODS = {code.reason for code in ExitCode}
# Worth a line while a job waits to run; the others are said of other conditions then.
OF_WAITING = {R.WAITING_FOR_QUEUE, R.CONTAINER_CREATING}
ORDINARY = {R.PREPARING, R.PUBLISHING, R.WAITING_FOR_JOB, R.RESUMED, R.TRAINED, R.GENERATED, R.SUSPENDED, *OF_WAITING}


def events(old: JobStatus, new: JobStatus) -> list[Event]:
    """A restart first, then what has turned, in the order in which the conditions arose."""
    found = [restarted(old, new)] if new.restarts > old.restarts else []
    return found + [e for c in new.conditions if (e := event(old.condition(c.type), c, new))]


def restarted(old: JobStatus, new: JobStatus) -> Event:
    last = next((a for a in reversed(new.attempts) if a.phase == "run"), None)
    why = f" after {last.reason}: {last.message} ({place(last)})" if last else ""
    free = "" if new.restarts_charged > old.restarts_charged else ", at no charge"
    return Event("Warning", R.RESTARTING, f"restart {new.restarts}{free}{why}")


def event(before: Condition | None, now: Condition, status: JobStatus) -> Event | None:
    """The event of one condition, if it has turned or got another reason."""
    if before and (before.status, before.reason) == (now.status, now.reason):
        return None
    if now.type is C.FAILED and now.status == "True":
        return Event("Warning", "Failed", f"{now.reason}: {now.message}")
    if now.type is C.RUNNING and now.status == "True":
        again = status.restarts or (before and before.reason == R.RESTARTING)
        return Event("Normal", "Running" if again else "Started", now.message)
    if now.type is C.ACCEPTED and now.status == "True" and before is None:
        return None  # Preparing says it, in the same moment
    if now.status == "True":
        return Event("Normal", now.reason, now.message)
    if now.reason in SILENT or (now.type is C.RUNNING and now.reason in ORDINARY - OF_WAITING):
        return None
    if now.reason in ORDINARY:
        return Event("Normal", now.reason, now.message)
    if status.is_true(C.FAILED):
        return None  # the event of Failed says it
    return Event("Warning", "PublishFailed" if now.type is C.PUBLISHED and now.reason in OF_PODS else now.reason, now.message)
