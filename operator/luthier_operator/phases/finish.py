"""Finish: the one good end, and what comes after any end: the time to live."""

from __future__ import annotations

from datetime import timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children
from luthier_operator.phases.record import complete_record
from luthier_operator.phases.step import Situation, Step
from luthier_operator.statuses import moment, text

LAST_WORDS_SECONDS = 3.0  # between the end of a Job and its pod's message: they are watched apart


def finish(s: Situation) -> Step:
    """Complete: everything that was asked for is done."""
    last = s.child(s.last)
    at = children.ended_at(last) if last else None
    if not complete_record(s.status, s.publishes) and at and s.now < at + timedelta(seconds=LAST_WORDS_SECONDS):
        return s.stops(requeue_after=LAST_WORDS_SECONDS)
    hub = f" and {s.status.hub.url}" if s.status.hub else ""
    place = s.status.workspace
    message = f"the result is in {place.folder}/result of claim {place.claim}{hub}" if place else "done"
    return s.say(ConditionType.COMPLETE, "True", Reason.COMPLETED, message).note(completion_time=text(s.now)).stops()


def retire(s: Situation) -> Step:
    """What is left to do for a job that has ended."""
    seconds = s.job.spec.ttl_seconds_after_finished
    if seconds is None or not s.status.completion_time:
        return s.stops()
    left = (moment(s.status.completion_time) + timedelta(seconds=seconds) - s.now).total_seconds()
    return s.stops(requeue_after=left) if left > 0 else s.stops(delete_job=True)
