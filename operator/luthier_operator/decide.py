"""decide: from what is observed of a job to what is to be done. Pure: no clock, no I/O, nothing remembered between two
calls.

Level-triggered: it may be called at any time, any number of times, after any event or none. The steps are in `phases`;
`reconcile` carries the decision out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from luthier_api.conditions import Reason
from luthier_operator import statuses
from luthier_operator.announce import events
from luthier_operator.model import ChildRef, Decision, Object, Observed
from luthier_operator.phases.accept import accept
from luthier_operator.phases.finish import finish, retire
from luthier_operator.phases.limits import deadline, suspend
from luthier_operator.phases.prepare import prepare
from luthier_operator.phases.publish import publish
from luthier_operator.phases.record import record
from luthier_operator.phases.reopen import reopen
from luthier_operator.phases.run import run
from luthier_operator.phases.step import Situation, Step
from luthier_operator.settings import Settings
from luthier_operator.workloads import workload

STEPS: tuple[Callable[[Situation], Step], ...] = (accept, suspend, deadline, prepare, run, publish, finish)


def decide(observed: Observed, settings: Settings, now: datetime) -> Decision:
    """What to do now. Its status equals the observed one when nothing has changed."""
    old = observed.job.status
    if observed.job.metadata.deletion_timestamp:
        return Decision(status=old)  # the garbage collector takes the children
    s = record(Situation(observed, settings, now, old))
    if reopened := reopen(s):
        return told(observed, Decision(reopened.status))
    apply: list[Object] = []
    delete: list[ChildRef] = []
    requeue: list[float] = []
    creating, delete_job = None, False
    for step in (retire,) if s.status.finished else STEPS:
        outcome = step(s)
        s = replace(s, status=outcome.status)
        apply += outcome.apply
        delete += outcome.delete
        requeue += [] if outcome.requeue_after is None else [outcome.requeue_after]
        creating, delete_job = outcome.creating, outcome.delete_job
        if not outcome.goes_on:
            break
    decision = Decision(s.status, tuple(apply), creating, tuple(delete), (), min(requeue, default=None), delete_job)
    return told(observed, decision)


def refused(observed: Observed, decision: Decision, message: str, now: datetime) -> Decision:
    """`decision`, of which the API server has refused a child: what waits for that child says so, all else holds."""
    assert decision.creating, "nothing else applies children"
    generation = observed.job.metadata.generation
    status = statuses.with_condition(
        decision.status, decision.creating, "False", Reason.FAILED_CREATE, message, now, generation
    )
    return told(observed, replace(decision, status=status))


def told(observed: Observed, decision: Decision) -> Decision:
    """With the word for people, and the events that follow from how the status changes."""
    status = decision.status.model_copy(update={"state": statuses.state(decision.status, workload(observed.job).done)})
    return replace(decision, status=status, events=tuple(events(observed.job.status, status)))
