"""Finish: the one good end, and what comes after any end: the time to live."""

from __future__ import annotations

from datetime import timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_operator.phases.step import Situation, Step
from luthier_operator.statuses import moment, text


def finish(s: Situation) -> Step:
    """Complete: everything that was asked for is done."""
    hub = f" and {s.status.hub.url}" if s.status.hub else ""
    place = s.status.workspace
    message = f"the result is in {place.folder}/result of claim {place.claim_name}{hub}" if place else "done"
    return s.say(ConditionType.COMPLETE, "True", Reason.COMPLETED, message).note(completion_time=text(s.now)).stops()


def retire(s: Situation) -> Step:
    """What is left to do for a job that has ended."""
    seconds = s.job.spec.ttl_seconds_after_finished
    if seconds is None or not s.status.completion_time:
        return s.stops()
    left = (moment(s.status.completion_time) + timedelta(seconds=seconds) - s.now).total_seconds()
    return s.stops(requeue_after=left) if left > 0 else s.stops(delete_job=True)
