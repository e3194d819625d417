"""What the user may say at any time: no longer than this, and stop for now. Both take the pods away; the workspace keeps the work.

Suspending deletes the phase's child: pods get SIGTERM, save and leave. Going on creates it again, and it resumes from the
checkpoint. This one mechanism also works under Kueue, whose `spec.suspend` we must not touch.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES
from luthier_operator import children
from luthier_operator.phases.step import Situation, Step
from luthier_operator.statuses import moment

SUSPENDED, RUNNING = ConditionType.SUSPENDED, ConditionType.RUNNING


def deadline(s: Situation) -> Step:
    """Counted from the start of the first phase, for as long as anything is left to do. When an end is looked at does not count."""
    seconds = s.job.spec.active_deadline_seconds
    if not seconds or not s.status.start_time:
        return s.goes_on()
    end = moment(s.status.start_time) + timedelta(seconds=seconds)
    if s.now < end:
        return s.goes_on(requeue_after=(end - s.now).total_seconds())
    if ended_by(s, end):
        return s.goes_on()
    message = (
        f"spec.activeDeadlineSeconds: {seconds} seconds have passed since {s.status.start_time}. What was saved stays in the workspace"
    )
    if s.status.condition(RUNNING):
        s = s.say(RUNNING, "False", Reason.DEADLINE_EXCEEDED, message)
    return s.fails(Reason.DEADLINE_EXCEEDED, message, delete=s.unfinished())


def ended_by(s: Situation, end: datetime) -> bool:
    """Whether the work was over by then: the last phase had ended well, or any of them had failed."""
    conditions = {"prepare": ConditionType.PREPARED, "run": s.done, "publish": ConditionType.PUBLISHED}
    known = s.status.condition(conditions[s.last])
    if known and known.status == "True" and moment(known.last_transition_time) <= end:
        return True
    over = (c for p in PHASES if (c := s.child(p)) and (children.failed(c) or (p == s.last and children.succeeded(c))))
    return any((at := children.ended_at(child)) is not None and at <= end for child in over)


def suspend(s: Situation) -> Step:
    if s.job.spec.suspend:
        s = s.say(SUSPENDED, "True", Reason.SUSPENDED, "spec.suspend: the pods are stopped after a checkpoint; false lets the job go on")
        if s.status.is_true(RUNNING):
            s = s.say(RUNNING, "False", Reason.SUSPENDED, "spec.suspend is true")
        return s.stops(delete=s.unfinished())
    if s.status.is_true(SUSPENDED):
        s = s.say(SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false: the job goes on where it stopped")
    return s.goes_on()
