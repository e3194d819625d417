"""The words that users see, STATE and the reasons of events, are those of the tables: whatever condition turns, none is
another.
"""

from __future__ import annotations

import itertools

from cases.observed import BEGIN, status

from luthier_api.conditions import ONLY_EVENTS, ConditionType, Reason
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Condition, JobStatus, State
from luthier_operator import statuses
from luthier_operator.announce import EVENTS, event
from luthier_operator.statuses import text

OF_CODES = {code.reason for code in ExitCode}
REASONS = sorted(({*Reason} | OF_CODES) - ONLY_EVENTS)
C, R = ConditionType, Reason
# The reasons of a condition that is True.
HOLDS: dict[ConditionType, set[str]] = {
    C.ACCEPTED: {R.ACCEPTED},
    C.PREPARED: {R.PREPARED, R.PLAN_ONLY},
    C.ADMITTED: {R.ADMITTED},
    C.RUNNING: {R.RUNNING},
    C.TRAINED: {R.TRAINED},
    C.GENERATED: {R.GENERATED},
    C.PUBLISHED: {R.PUBLISHED},
    C.SUSPENDED: {R.SUSPENDED},
    C.COMPLETE: {R.COMPLETED},
    C.FAILED: {R.FAILED, R.NO_PROGRESS, R.NOT_ALLOWED, *OF_CODES},
    C.RECONCILING: set(),
    C.STALLED: set(),
    C.FIELDS_IGNORED: {R.UNKNOWN_FIELDS},
    C.INTERNAL_ERROR: {R.INTERNAL_ERROR},
}
ALWAYS_TRUE = set.union(*HOLDS.values()) - OF_CODES - {R.SUSPENDED, R.TRAINED, R.GENERATED, R.NOT_ALLOWED}
FATAL = {R.SOURCE_FAILED, R.FAILED, R.INVALID_SPEC, R.NOT_ALLOWED}
"""Of a condition that is False only when the job has failed with it."""


def turned(type: ConditionType, value: str, reason: str) -> Condition:
    return Condition(type=type, status=value, reason=reason, last_transition_time=text(BEGIN))  # type: ignore[arg-type]


def test_every_event_is_in_the_table() -> None:
    seen = set()
    for kind, value, reason in itertools.product(ConditionType, ("True", "False"), REASONS):
        if reason not in HOLDS[kind] if value == "True" else reason in ALWAYS_TRUE:
            continue
        for before in (None, turned(kind, "False", "Restarting")):
            if found := event(
                before, turned(kind, value, reason), status("Failed") if reason in FATAL else JobStatus()
            ):
                assert EVENTS.get(found.reason, "Warning") == found.type, found  # type: ignore[call-overload]
                assert found.reason in EVENTS or found.reason in OF_CODES, found
                seen.add(found.reason)
    # Not of one condition
    others = {
        Reason.RESTARTING,
        Reason.CHECKPOINT_BROKEN,
        Reason.NOTICE,
        Reason.SMALL_WORKSPACE,
        Reason.STATUS_REFUSED,
    }
    assert set(EVENTS) - others <= seen, "what the table names is said, too"


def test_every_state_is_in_the_table_or_a_reason_in_the_way() -> None:
    begun = {
        "Accepted": [],
        "Prepared": ["Accepted"],
        "Running": ["Accepted", "Prepared"],
        "Published": ["Accepted", "Prepared", "Trained"],
    }
    lost = JobStatus(completion_time=text(BEGIN))
    seen = {statuses.state(lost, ConditionType.TRAINED)}
    for shown, true in begun.items():
        for reason in [None, *sorted((set(REASONS) - ALWAYS_TRUE) | HOLDS[ConditionType(shown)])]:
            turns = {shown: ("True" if reason in HOLDS[ConditionType(shown)] else "False", reason)} if reason else {}
            given = status(*true)
            given = given.model_copy(
                update={
                    "conditions": given.conditions + [turned(ConditionType(t), v, r) for t, (v, r) in turns.items()]
                }
            )
            word = statuses.state(given, ConditionType.TRAINED)
            assert word in {*State} or turns.get(shown) == ("False", word), (shown, reason, word)
            seen.add(str(word))
    for end in ("Complete", "Failed", "Suspended"):
        seen.add(str(statuses.state(status(end), ConditionType.TRAINED)))
    assert {*State} <= seen
