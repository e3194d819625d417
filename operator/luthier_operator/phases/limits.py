"""What the user may say at any time: no longer than this, and stop for now. Both take the pods away; the workspace keeps the work.

Suspending deletes the phase's child: pods get SIGTERM, save and leave. Going on creates it again, and it resumes from the
checkpoint. This one mechanism also works under Kueue, whose `spec.suspend` we must not touch.
"""

from __future__ import annotations

from datetime import timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_operator.phases.step import Situation, Step
from luthier_operator.statuses import moment

SUSPENDED, RUNNING = ConditionType.SUSPENDED, ConditionType.RUNNING


def deadline(s: Situation) -> Step:
    """Counted from the start of the first phase, whatever happened since."""
    seconds = s.job.spec.active_deadline_seconds
    if not seconds or not s.status.start_time:
        return s.goes_on()
    left = (moment(s.status.start_time) + timedelta(seconds=seconds) - s.now).total_seconds()
    if left > 0:
        return s.goes_on(requeue_after=left)
    message = (
        f"spec.activeDeadlineSeconds: {seconds} seconds have passed since {s.status.start_time}. What was saved stays in the workspace"
    )
    if s.status.condition(RUNNING):
        s = s.say(RUNNING, "False", Reason.DEADLINE_EXCEEDED, message)
    return s.fails(Reason.DEADLINE_EXCEEDED, message, delete=s.unfinished())


def suspend(s: Situation) -> Step:
    if s.job.spec.suspend:
        s = s.say(SUSPENDED, "True", Reason.SUSPENDED, "spec.suspend: the pods are stopped after a checkpoint; false lets the job go on")
        if s.status.is_true(RUNNING):
            s = s.say(RUNNING, "False", Reason.SUSPENDED, "spec.suspend is true")
        return s.stops(delete=s.unfinished())
    if s.status.is_true(SUSPENDED):
        s = s.say(SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false: the job goes on where it stopped")
    return s.goes_on()
