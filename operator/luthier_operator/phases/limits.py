"""What the user may say at any time: no longer than this, and stop for now. Both take the pods away; the workspace
keeps the work.

Suspending deletes the phase's child: pods get SIGTERM, save and leave. Going on creates it again, and it resumes from
the checkpoint. This one mechanism also works under Kueue, whose `spec.suspend` we must not touch.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from luthier_api.conditions import ConditionType, Reason
from luthier_api.status import PHASES
from luthier_operator import children
from luthier_operator.phases.step import Situation, Step
from luthier_operator.statuses import moment, text

SUSPENDED = ConditionType.SUSPENDED


def deadline(s: Situation) -> Step:
    """Counted from the start of the first phase, for as long as anything is left to do. When an end is looked at does
    not count.

    A suspended job does not come here: its time is the user's, as that of every rest (`counted_from`).
    """
    end = expires(s)
    if end is None:
        return s.goes_on()
    if s.now < end:
        return s.goes_on(requeue_after=(end - s.now).total_seconds())
    if ended_by(s, end):
        return s.goes_on()
    message = (
        f"spec.activeDeadlineSeconds: {s.job.spec.active_deadline_seconds} seconds have passed since {counted_from(s)}."
        " What was saved stays in the workspace; a higher limit lets the job go on"
    )
    return halted(s, Reason.DEADLINE_EXCEEDED, message).fails(Reason.DEADLINE_EXCEEDED, message, delete=s.unfinished())


def counted_from(s: Situation) -> str | None:
    """A rest, planned, suspended or ended, is the user's time: whoever lets the job go on gives it the whole limit
    again, as Kubernetes' Jobs do.
    """
    return s.status.deadline_start_time or s.status.start_time


def expires(s: Situation) -> datetime | None:
    """When the time that the user gives is over; None without a limit, and before the first phase."""
    seconds, since = s.job.spec.active_deadline_seconds, counted_from(s)
    return moment(since) + timedelta(seconds=seconds) if seconds and since else None


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
        s = s.say(
            SUSPENDED,
            "True",
            Reason.SUSPENDED,
            "spec.suspend: the pods are stopped after a checkpoint; false lets the job go on",
        )
        return halted(s, Reason.SUSPENDED, "spec.suspend is true").stops(delete=s.unfinished())
    if s.status.is_true(SUSPENDED):
        s = s.say(SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false: the job goes on where it stopped")
        s = s.note(deadline_start_time=text(s.now)) if s.status.start_time else s
    return s.goes_on()


def halted(s: Situation, reason: Reason, message: str) -> Situation:
    """What was said of the phase at work holds no longer: its pods are gone."""
    told = at_work(s)
    return s.say(told, "False", reason, message) if told and s.status.condition(told) else s


def at_work(s: Situation) -> ConditionType | None:
    """The condition that tells of the phase at work; None after the last one."""
    if not s.status.is_true(ConditionType.PREPARED):
        return ConditionType.PREPARED
    if not s.status.is_true(s.done):
        return ConditionType.RUNNING
    return None if s.status.is_true(ConditionType.PUBLISHED) else ConditionType.PUBLISHED
