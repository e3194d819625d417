"""Prepare: one pod without a GPU that resolves the model, loads and tokenises the data and plans the run.

It fails early and cheaply, and is tried again as often as the infrastructure needs. `planOnly` ends here. Neighbours:
`render.job` draws the Job, `failure` judges its pods.
"""

from __future__ import annotations

from luthier_api.conditions import ConditionType, Reason
from luthier_operator import children, statuses
from luthier_operator.failure.cause import judge
from luthier_operator.phases import waiting
from luthier_operator.phases.step import Situation, Step
from luthier_operator.render.claim import claim
from luthier_operator.render.configmap import configmap
from luthier_operator.render.job import prepare as job_of_prepare

PREPARED = ConditionType.PREPARED
DOING = "resolving the model, loading the data, planning the run"
STARTING = "waiting for the pod that resolves the model, loads the data and plans the run"


def prepare(s: Situation) -> Step:
    if s.status.is_true(PREPARED):
        return go_on(s)
    job = s.child("prepare")
    s = s.note(start_time=s.status.start_time or statuses.text((job and children.created(job)) or s.now))
    if wait := waiting.for_old_pods(s, "prepare", PREPARED):
        return wait
    if job is None:
        places = s.places()
        drawn = (
            configmap(s.workload, s.settings, places),
            claim(s.workload, s.settings),
            job_of_prepare(s.workload, s.settings, places),
        )
        return s.creates(PREPARED, Reason.PREPARING, STARTING, *drawn)
    if children.succeeded(job):
        return waiting.for_last_words(s, job, s.status.prepared is not None) or go_on(s)
    if end := children.failed(job):
        if wait := waiting.for_evidence(s, "prepare", job):
            return wait
        found = judge(s.attempts("prepare"), "prepare", end)
        return s.say(PREPARED, "False", found.reason, found.message).fails(found.reason, found.message)
    return waiting.for_one_pod(s, "prepare", PREPARED, Reason.PREPARING, STARTING, DOING)


def go_on(s: Situation) -> Step:
    """Prepared; and on, unless the plan is all that was asked for."""
    only = s.last == "prepare"
    s = s.say(PREPARED, "True", Reason.PLAN_ONLY if only else Reason.PREPARED, summary(s))
    return s.stops() if only else s.goes_on()


def summary(s: Situation) -> str:
    found = s.status.prepared
    if found is None:
        return "prepared"
    revision = f"@{found.model.revision[:12]}" if found.model.revision else ""
    rows = f"{found.dataset.rows} rows" + (
        f" and {found.dataset.eval_rows} to evaluate" if found.dataset.eval_rows else ""
    )
    steps = f", {found.plan.steps} steps" if found.plan.steps else ""
    return f"{found.model.source}{revision}, {rows}, strategy {found.plan.strategy}{steps}"
