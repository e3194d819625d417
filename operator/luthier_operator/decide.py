"""decide: from what is observed of a job to what is to be done. Pure: no clock, no I/O, nothing remembered between two calls.

Level-triggered: it may be called at any time, any number of times, after any event or none. The steps are in `phases`; `reconcile`
carries the decision out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from luthier_api.kinds import KINDS
from luthier_operator import naming, statuses
from luthier_operator.announce import events
from luthier_operator.model import ChildRef, Decision, Object, Observed
from luthier_operator.phases.accept import accept
from luthier_operator.phases.finish import finish, retire
from luthier_operator.phases.limits import deadline, suspend
from luthier_operator.phases.prepare import prepare
from luthier_operator.phases.publish import publish, reopen
from luthier_operator.phases.record import record
from luthier_operator.phases.run import run
from luthier_operator.phases.step import Situation, Step
from luthier_operator.settings import Settings

STEPS: tuple[Callable[[Situation], Step], ...] = (accept, deadline, suspend, prepare, run, publish, finish)


def decide(observed: Observed, settings: Settings, now: datetime) -> Decision:
    """What to do now. Its status equals the observed one when nothing has changed."""
    old = observed.job.status
    if observed.job.metadata.deletion_timestamp:
        return Decision(status=old)  # the garbage collector takes the children
    s = reopen(record(Situation(observed, settings, now, old)))
    apply: list[Object] = []
    delete: list[ChildRef] = []
    requeue: list[float] = []
    delete_job = False
    for step in (retire,) if s.status.finished else STEPS:
        outcome = step(s)
        s = replace(s, status=outcome.status)
        apply += outcome.apply
        delete += outcome.delete
        requeue += [] if outcome.requeue_after is None else [outcome.requeue_after]
        delete_job = outcome.delete_job
        if not outcome.goes_on:
            break
    status = s.status.model_copy(update={"state": statuses.state(s.status, KINDS[naming.kind(observed.job)].done)})
    return Decision(status, tuple(apply), tuple(delete), tuple(events(old, status)), min(requeue, default=None), delete_job)
