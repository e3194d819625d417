"""Reopen: what lets a job that rests go on. Its plan was seen, it gets more time, or its result is wanted somewhere
else.

A job rests when its plan is all that was asked for, and when it has ended. All that may change then are fields that
steer it, so a change of them is a wish; and the deadline counts anew, or it would be over before the wish is fulfilled.
Neighbours: `prepare`, `limits`, `publish` and `finish`, which say what is taken back here.
"""

from __future__ import annotations

from dataclasses import replace

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children
from luthier_operator.phases.limits import at_work, expires
from luthier_operator.phases.step import Situation
from luthier_operator.statuses import moment, text, without_condition

PREPARED, PUBLISHED, COMPLETE, FAILED = (
    ConditionType.PREPARED,
    ConditionType.PUBLISHED,
    ConditionType.COMPLETE,
    ConditionType.FAILED,
)
HUB_CHANGED, HUB_SET = "spec.hub has changed: publishing again", "spec.hub.repo is set: publishing"
MORE_TIME = "spec.activeDeadlineSeconds leaves more time: the job goes on where it stopped"


def reopen(s: Situation) -> Situation | None:
    """A job that rests as one that goes on; None where there is nothing to go on with.

    This is a look of its own, after which the status is written: the next one may delete what gave the reason.
    """
    if more_time(s):
        s = s.say(FAILED, "False", Reason.RESUMED, MORE_TIME)
        halted = at_work(s)
        return again(replace(s, status=without_condition(s.status, halted)) if halted else s)
    if failed_to_publish(s) and s.hub_changed:
        return publishing(again(s.say(FAILED, "False", Reason.PUBLISHING, HUB_CHANGED)), HUB_CHANGED)
    if published_elsewhere(s):
        why = HUB_CHANGED if s.status.condition(PUBLISHED) else HUB_SET
        return publishing(again(s.say(COMPLETE, "False", Reason.PUBLISHING, why)).note(hub=None), why)
    plan = s.status.condition(PREPARED)
    if plan and plan.reason == Reason.PLAN_ONLY and s.last != "prepare" and not s.status.finished:
        return again(s.say(PREPARED, "True", Reason.PREPARED, plan.message))
    return None


def publishing(s: Situation, why: str) -> Situation:
    if s.publishes:
        return s.say(PUBLISHED, "False", Reason.PUBLISHING, why)
    return replace(s, status=without_condition(s.status, PUBLISHED))


def again(s: Situation) -> Situation:
    return s.note(completion_time=None, deadline_start_time=text(s.now))


def more_time(s: Situation) -> bool:
    """Whether the deadline, at which it ended, is a later one now, or none."""
    end, at = s.status.condition(FAILED), s.status.completion_time
    if not (end and end.status == "True" and end.reason == Reason.DEADLINE_EXCEEDED and at):
        return False
    return (later := expires(s)) is None or later > moment(at)


def failed_to_publish(s: Situation) -> bool:
    """Whether it has failed over `publish`, and nothing else."""
    job, end, known = s.child("publish"), s.status.condition(FAILED), s.status.condition(PUBLISHED)
    if not (end and end.status == "True" and end.reason != Reason.DEADLINE_EXCEEDED):
        return False
    return s.status.is_true(s.done) and bool(known and known.status != "True" and job and children.failed(job))


def published_elsewhere(s: Situation) -> bool:
    """Whether it is complete, and its result is not where spec.hub says now."""
    if not (s.status.is_true(COMPLETE) and s.status.is_true(s.done) and s.last == "publish"):
        return False
    return s.target_changed or not s.status.is_true(PUBLISHED)  # another token alone brings nothing anywhere
