"""Changing a status so that it stays equal where nothing has changed: an equal status is not written.

A condition keeps its transition time while its value stays. The column STATE is derived from the conditions.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from luthier_api.conditions import ConditionType, Reason
from luthier_api.metrics import figure
from luthier_api.status import Condition, JobStatus, Progress, State

Value = Literal["True", "False", "Unknown"]
MESSAGE_CHARACTERS = 4096  # the size of a termination message

RECONCILING_MESSAGE = "the job is at work or waits; the other conditions say more"
CONDITIONS_LOST_MESSAGE = (
    "how the job ended was lost from its status; it has a completionTime, so it does not run again"
)

C, R = ConditionType, Reason
# The column STATE, where it is not the reason of the condition.
STATES: dict[str, State] = {
    R.WAITING_FOR_JOB: State.WAITING,
    R.WAITING_FOR_QUEUE: State.QUEUED,
    R.WAITING_FOR_PODS: State.PENDING,
    R.WAITING_FOR_VOLUME: State.PENDING,
    R.JOB_SET_MISSING: State.PENDING,
    R.NOT_UNDERSTOOD: State.PENDING,
    R.SOURCE_NOT_UNDERSTOOD: State.WAITING,
    R.PLAN_ONLY: State.PLANNED,
    R.PUBLISHED: State.PUBLISHING,
    R.PROGRESS_UNKNOWN: State.RUNNING,
}


def text(moment: datetime) -> str:
    """A time as Kubernetes writes it: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
    """The time that Kubernetes has written as `text`. Raises ValueError when it is none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def with_condition(
    status: JobStatus,
    type: ConditionType,
    value: Value,
    reason: str,
    message: str,
    now: datetime,
    generation: int | None,
) -> JobStatus:
    """`status` with this condition, at its old position in the list."""
    old, message = status.condition(type), message[:MESSAGE_CHARACTERS]
    if old and (old.status, old.reason, old.message, old.observed_generation) == (value, reason, message, generation):
        return status
    since = old.last_transition_time if old and old.status == value else text(now)
    new = Condition(
        type=type,
        status=value,
        reason=reason,
        message=message,
        last_transition_time=since,
        observed_generation=generation,
    )
    conditions = [new if c.type == type else c for c in status.conditions] + ([] if old else [new])
    return status.model_copy(update={"conditions": conditions})


def without_condition(status: JobStatus, type: ConditionType) -> JobStatus:
    if status.condition(type) is None:
        return status
    return status.model_copy(update={"conditions": [c for c in status.conditions if c.type != type]})


def state(status: JobStatus, done: ConditionType) -> str:
    """The column STATE of kubectl: a `State`, or the reason why the job waits. `done`: the condition that is True once
    `run` has succeeded.
    """
    for final, shown_as in ((C.FAILED, State.FAILED), (C.COMPLETE, State.COMPLETE), (C.SUSPENDED, State.SUSPENDED)):
        if status.is_true(final):
            return shown_as
    if status.completion_time is not None:
        return State.UNKNOWN
    prepared = status.condition(C.PREPARED)
    if status.is_true(done):
        shown, otherwise = C.PUBLISHED, State.PUBLISHING
    elif prepared and prepared.status == "True" and prepared.reason != R.PLAN_ONLY:
        shown, otherwise = C.RUNNING, State.STARTING
    elif status.is_true(C.ACCEPTED):
        shown, otherwise = C.PREPARED, State.PREPARING
    else:
        shown, otherwise = C.ACCEPTED, State.PENDING
    condition, admitted = status.condition(shown), status.condition(C.ADMITTED)
    if shown == C.RUNNING and admitted and admitted.status == "False":
        return queue_state(admitted.reason)
    return STATES.get(condition.reason, condition.reason) if condition else otherwise


def queue_state(reason: str) -> str:
    """The column STATE of a job that its queue does not admit, by the reason of Admitted."""
    if reason.startswith(State.DEACTIVATED):  # Kueue adds why: DeactivatedDueToRequeuingLimitExceeded
        return State.DEACTIVATED
    return reason if reason in (State.UNSATISFIABLE, State.INADMISSIBLE) else State.QUEUED


def with_kstatus(status: JobStatus, now: datetime, generation: int | None) -> JobStatus:
    """`status` with the conditions of kstatus, which follow from its STATE: Reconciling while the operator is at work,
    Stalled once only the user can help. At rest (complete, suspended, planned) there is neither.
    """
    failed = status.condition(C.FAILED) if status.is_true(C.FAILED) else None
    at_rest = status.state in (State.COMPLETE, State.SUSPENDED, State.PLANNED)
    if failed or status.state == State.UNKNOWN or at_rest:
        status = without_condition(status, C.RECONCILING)
    else:
        status = with_condition(status, C.RECONCILING, "True", str(status.state), RECONCILING_MESSAGE, now, generation)
    if failed:
        return with_condition(status, C.STALLED, "True", failed.reason, failed.message, now, generation)
    if status.state == State.UNKNOWN:
        return with_condition(status, C.STALLED, "True", R.CONDITIONS_LOST, CONDITIONS_LOST_MESSAGE, now, generation)
    return without_condition(status, C.STALLED)


def newer(known: Progress | None, read: Progress) -> Progress:
    """`read`, with the time of `known` if nothing else has changed."""
    if known is not None and known.model_copy(update={"time": read.time}) == read:
        return known
    return read


def at_end(progress: Progress | None, metrics: dict[str, float] | None) -> Progress | None:
    """Progress of a run that has succeeded. Its last steps or rows came after its progress was last read, if ever."""
    steps, rows = _count(metrics, "steps"), _count(metrics, "rows")
    if progress is None and steps is None and rows is None:
        return None
    last = progress or Progress()
    step, row = steps or last.max_steps, rows or last.max_rows
    failed = _count(metrics, "failedRows")
    loss = metrics.get("lastLoss", last.loss) if metrics else last.loss
    ended = {
        "step": step,
        "max_steps": step,
        "rows": row,
        "max_rows": row,
        "failed_rows": last.failed_rows if failed is None else failed,
        "loss": figure(loss),
        "percent": 100,
        "eta_seconds": 0,
    }
    return last.model_copy(update=ended)


def _count(metrics: dict[str, float] | None, name: str) -> int | None:
    return int(metrics[name]) if metrics and name in metrics else None
