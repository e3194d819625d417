"""decide: from what was observed of a job to what is to be done. Pure: no clock, no I/O, no memory between two calls.

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
from luthier_operator.phases import waiting
from luthier_operator.phases.accept import accept
from luthier_operator.phases.context import Context, Step
from luthier_operator.phases.finish import finish, retire
from luthier_operator.phases.limits import clock, deadline, suspend
from luthier_operator.phases.prepare import prepare
from luthier_operator.phases.publish import publish
from luthier_operator.phases.record import record
from luthier_operator.phases.reopen import reopen, with_spec
from luthier_operator.phases.run import run
from luthier_operator.settings import Settings
from luthier_operator.workloads import workload

STEPS: tuple[Callable[[Context], Step], ...] = (accept, suspend, deadline, prepare, run, publish, finish)
AFTER_THE_END: tuple[Callable[[Context], Step], ...] = (retire,)


def decide(observed: Observed, settings: Settings, now: datetime) -> Decision:
    """What to do now. Its status equals the observed one when nothing has changed."""
    before = observed.job.status
    if observed.job.metadata.deletion_timestamp:
        return Decision(status=before)  # the garbage collector deletes the children

    ctx = record(Context(observed, settings, now, before))
    reopened = reopen(ctx)
    if reopened:
        return with_events(observed, Decision(clock(reopened)), now)
    if not (ctx.status.finished or ctx.job.spec.suspend):
        ctx = with_spec(ctx)

    apply: list[Object] = []
    delete: list[ChildRef] = []
    requeue_after: list[float] = []
    creating, repair, delete_job = None, None, False
    for step in AFTER_THE_END if ctx.status.finished else STEPS:
        outcome = step(ctx)
        ctx = ctx.having(outcome.status)
        apply += outcome.apply
        delete += outcome.delete
        if outcome.requeue_after is not None:
            requeue_after.append(outcome.requeue_after)
        creating, repair, delete_job = outcome.creating, outcome.repair, outcome.delete_job
        if not outcome.goes_on:
            break
    if lost := waiting.for_container(ctx):
        # Without its config map a pod waits for ever, and one that a cluster starts again needs it, too.
        creating, repair = lost, ctx.configmap()
    decision = Decision(
        status=clock(ctx),
        apply=tuple(apply),
        repair=repair,
        creating=creating,
        delete=tuple(delete),
        ask=tuple(waiting.unexplained(ctx)),
        requeue_after=min(requeue_after, default=None),
        delete_job=delete_job,
    )
    return with_events(observed, decision, now)


def held(observed: Observed, decision: Decision, now: datetime) -> Decision:
    """`decision` before its children are created. If the API server has refused one before, the condition that reports
    on them stays as it is, so that a child that is refused again causes no write.
    """
    if decision.creating is None:
        return decision
    before = observed.job.status.condition(decision.creating)
    if before is None or before.reason != Reason.FAILED_CREATE:
        return decision
    conditions = [before if c.type == before.type else c for c in decision.status.conditions]
    status = decision.status.model_copy(update={"conditions": conditions})
    return with_events(observed, replace(decision, status=status), now)


def refused(observed: Observed, decision: Decision, message: str, now: datetime) -> Decision:
    """`decision` after the API server has refused to create a child. The condition that waits for the child says so;
    everything else holds.
    """
    assert decision.creating, "only a decision that applies children can be refused"
    generation = observed.job.metadata.generation
    status = statuses.with_condition(
        decision.status, decision.creating, "False", Reason.FAILED_CREATE, message, now, generation
    )
    return with_events(observed, replace(decision, status=status), now)


def with_events(observed: Observed, decision: Decision, now: datetime) -> Decision:
    """`decision` with what follows from its conditions: the column STATE of kubectl, the conditions of kstatus, and the
    events about the change of the status.
    """
    work = workload(observed.job)
    state = statuses.state(decision.status, work.done)
    status = decision.status.model_copy(update={"state": state})
    status = statuses.with_kstatus(status, now, observed.job.metadata.generation)
    return replace(decision, status=status, events=tuple(events(work, observed.job.status, status)))
