"""Editing a status without changing what has not changed: a status that stays equal costs no write.

Conditions keep their transition time while their value stays; the word in STATE is read off the conditions, never
remembered.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from luthier_api.conditions import ConditionType, Reason
from luthier_api.metrics import figure
from luthier_api.status import Condition, JobStatus, Progress, State

Value = Literal["True", "False", "Unknown"]
MESSAGE_CHARACTERS = 4096  # as much as a pod can say; describe and etcd bear it

C, R = ConditionType, Reason
# What people would call it, where the reason is not that word already.
WORDS: dict[str, State] = {
    R.WAITING_FOR_JOB: State.WAITING,
    R.WAITING_FOR_QUEUE: State.QUEUED,
    R.WAITING_FOR_PODS: State.PENDING,
    R.WAITING_FOR_VOLUME: State.PENDING,
    R.JOB_SET_MISSING: State.PENDING,
    R.PLAN_ONLY: State.PLANNED,
    R.PUBLISHED: State.PUBLISHING,
}


def text(moment: datetime) -> str:
    """As Kubernetes writes times: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
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
    """`status` with this condition, in the place where it stood."""
    old = status.condition(type)
    since = old.last_transition_time if old and old.status == value else text(now)
    new = Condition(
        type=type,
        status=value,
        reason=reason,
        message=message[:MESSAGE_CHARACTERS],
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
    """One word for people: of `State`, or what stands in the way. `done` is the condition that says that `run` has
    ended well.
    """
    for end, word in ((C.FAILED, State.FAILED), (C.COMPLETE, State.COMPLETE), (C.SUSPENDED, State.SUSPENDED)):
        if status.is_true(end):
            return word
    prepared = status.condition(C.PREPARED)
    if status.is_true(done):
        shown, otherwise = C.PUBLISHED, State.PUBLISHING
    elif prepared and prepared.status == "True" and prepared.reason != R.PLAN_ONLY:
        shown, otherwise = C.RUNNING, State.STARTING
    elif status.is_true(C.ACCEPTED):
        shown, otherwise = C.PREPARED, State.PREPARING
    else:
        shown, otherwise = C.ACCEPTED, State.PENDING
    condition = status.condition(shown)
    return WORDS.get(condition.reason, condition.reason) if condition else otherwise


def at_end(progress: Progress | None, metrics: dict[str, float] | None) -> Progress | None:
    """Progress of a run that has ended well: its last steps, or rows, came after it was last read, if it was read at
    all.
    """
    steps, rows = (int(metrics[name]) if metrics and name in metrics else None for name in ("steps", "rows"))
    if progress is None and steps is None and rows is None:
        return None
    last = progress or Progress()
    step, row = steps or last.max_steps, rows or last.max_rows
    loss = metrics.get("lastLoss", last.loss) if metrics else last.loss
    ended = {
        "step": step,
        "max_steps": step,
        "rows": row,
        "max_rows": row,
        "loss": figure(loss),
        "percent": 100,
        "eta_seconds": 0,
    }
    return last.model_copy(update=ended)
