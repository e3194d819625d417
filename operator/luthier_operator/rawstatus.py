"""Statuses as plain data: what is written of a job that the operator does not understand or fails with, and the patch
that keeps what another version has written.
"""

from __future__ import annotations

import traceback
from datetime import UTC, datetime
from pathlib import Path

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import Condition, State
from luthier_operator.model import Event, Object
from luthier_operator.statuses import MESSAGE_CHARACTERS, Value, text
from luthier_operator.versions import RELEASE, SAME_CHART

PACKAGE = Path(__file__).parent


def status_patch(before: Object, understood: Object, desired: Object) -> Object:
    """The merge patch that turns the stored status `before` into `desired`.

    `understood`: the part of `before` that `desired` was made from. Everything else in `before` stays.
    """
    patch = merge_patch(_present(understood, before), desired)
    if patch.get("conditions") is not None:
        patch["conditions"] = kept_conditions(conditions(before), understood.get("conditions", []), patch["conditions"])
    return patch


def _present(understood: Object, stored: Object) -> Object:
    """`understood` without the defaults that reading has added: they are written."""
    return {
        key: _present(value, stored[key]) if isinstance(value, dict) and isinstance(stored[key], dict) else value
        for key, value in understood.items()
        if key in stored
    }


def merge_patch(before: Object, after: Object) -> Object:
    """The JSON merge patch (RFC 7396) from `before` to `after`. Empty if they are equal; a removed key becomes null."""
    patch: Object = {key: None for key in before if key not in after}
    for key, value in after.items():
        if key not in before:
            patch[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            if inner := merge_patch(before[key], value):
                patch[key] = inner
        elif value != before[key]:
            patch[key] = value
    return patch


def kept_conditions(stored: list[Object], understood: list[Object], desired: list[Object]) -> list[Object]:
    """`desired`, where what has not changed is as it is stored, and with the stored ones that were not understood.

    A merge patch replaces a list whole.
    """
    by_type = {condition.get("type"): condition for condition in stored}
    read = {condition["type"]: condition for condition in understood}
    kept = [by_type.get(c["type"], c) if read.get(c["type"]) == c else c for c in desired]
    known = read.keys() | {c["type"] for c in desired}
    return kept + [condition for condition in stored if condition.get("type") not in known]


def conditions(status: Object) -> list[Object]:
    return [c for c in status.get("conditions") or [] if isinstance(c, dict)]


def with_raw_condition(
    found: Object, status: Object, type: ConditionType, value: Value, reason: Reason, message: str
) -> Object:
    """`status`, which is one of `found`, with this condition."""
    others = conditions(status)
    old = next((c for c in others if c.get("type") == type), None)
    since = text(datetime.now(UTC))
    if old and old.get("status") == value and old.get("lastTransitionTime"):
        since = old["lastTransitionTime"]
    new = Condition(
        type=type,
        status=value,
        reason=reason,
        message=message[:MESSAGE_CHARACTERS],
        last_transition_time=since,
        observed_generation=found["metadata"].get("generation"),
    ).dump()
    return status | {"conditions": [new if c is old else c for c in others] + ([] if old else [new])}


def not_understood_status(found: Object, problem: str) -> Object:
    """The status of a job with a value in its spec that this operator does not know.

    All else in it stays: the job may be at work for an operator that understood it.
    """
    status = found.get("status", {})
    message = f"this operator ({RELEASE}) does not understand the job. {SAME_CHART}.\n{problem}"
    status = with_raw_condition(found, status, ConditionType.ACCEPTED, "False", Reason.NOT_UNDERSTOOD, message)
    status = with_raw_condition(found, status, ConditionType.STALLED, "True", Reason.NOT_UNDERSTOOD, message)
    if found["spec"].get("suspend") is True:
        message = "spec.suspend is true: the pods save a checkpoint and stop; set it to false to resume the job"
        status = with_raw_condition(found, status, ConditionType.SUSPENDED, "True", Reason.SUSPENDED, message)
        return status | {"state": State.SUSPENDED}
    return status | {"state": status.get("state") or State.PENDING}


def internal_error_status(found: Object, error: Exception) -> Object:
    """The status of a job with which the operator itself fails. It is the same for the same error."""
    message = (
        f"{type(error).__name__}: {error} ({place(error)}, Luthier {RELEASE}). This is a defect of Luthier, not of the"
        " job. Please report this message, the manifest and the status of the job. Pods of the job go on; the operator"
        " tries again with growing delays"
    )
    return with_raw_condition(
        found, found.get("status", {}), ConditionType.INTERNAL_ERROR, "True", Reason.INTERNAL_ERROR, message
    )


def place(error: Exception) -> str:
    """`phases/run.py:42`, where the operator's own code was last at work."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(f.filename).parents]
    if not frames:
        return "outside the operator"
    return f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}"


def new_event(before: Object, after: Object, type: ConditionType) -> Event | None:
    """The warning of the condition `type` in `after`, if `before` has not already had it."""
    old, new = (next((c for c in conditions(s) if c.get("type") == type), None) for s in (before, after))
    if new is None or (old and (old.get("status"), old.get("reason")) == (new["status"], new["reason"])):
        return None
    return Event("Warning", new["reason"], new["message"])
