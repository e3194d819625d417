"""A job's whole life, step by step; and what must hold at every step of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from cases.observed import (
    BEGIN,
    HUB,
    NOW,
    RUNNING,
    SETTINGS,
    child,
    describe,
    ended,
    fine_tune,
    generate,
    hub_end,
    observed,
    pod,
    prepared_end,
    said,
)

from luthier_api.kinds import FineTuneJob
from luthier_operator.decide import STEPS, decide, refused
from luthier_operator.model import Job, Observed


def life(job: Job) -> list[tuple[str, Observed]]:
    """What is seen of a job that is published in the end, after one restart."""
    run = [pod(job, "run", i, 1, RUNNING) for i in (0, 1)]
    ends = [prepared_end(job)]
    lost = [*ends, ended(job, "run", 81, 0, message="peer 1 is gone")]
    last = [
        *lost,
        ended(job, "run", 0, 0, 1, metrics={"evalLoss": 1.5}, when=-10),
        ended(job, "run", 0, 1, 1, metrics={"evalLoss": 0.5}, when=-9),
    ]
    prepared, trained = child(job, "prepare", "Complete"), child(job, "run", "Complete", restarts=1, charged=1)
    return [
        ("applied", observed(job)),
        ("its pod runs", observed(job, child(job, "prepare"), pods=[pod(job, "prepare", state=RUNNING)])),
        ("prepared", observed(job, prepared, ends=ends)),
        (
            "pods run",
            observed(
                job, prepared, child(job, "run"), pods=[pod(job, "run", i, 0, RUNNING) for i in (0, 1)], ends=ends
            ),
        ),
        ("a pod is lost", observed(job, prepared, child(job, "run"), ends=lost)),
        ("restarted", observed(job, prepared, child(job, "run", restarts=1, charged=1), pods=run, ends=lost)),
        ("trained", observed(job, prepared, trained, ends=last)),
        (
            "uploads",
            observed(
                job, prepared, trained, child(job, "publish"), pods=[pod(job, "publish", state=RUNNING)], ends=last
            ),
        ),
        ("published", observed(job, prepared, trained, child(job, "publish", "Complete"), ends=[*last, hub_end(job)])),
        ("ended", observed(job, prepared, trained, child(job, "publish", "Complete"), ends=[*last, hub_end(job)])),
    ]


def walk(job: Job) -> list[tuple[str, str, str, list[str]]]:
    """Moment, state, what is done, events. At each moment the decision is made twice: the second time nothing may
    change.
    """
    seen = []
    for moment, given in life(job):
        here = replace(given, job=given.job.model_copy(update={"status": job.status}))
        decision = decide(here, SETTINGS, NOW)
        again = decide(replace(here, job=here.job.model_copy(update={"status": decision.status})), SETTINGS, NOW)
        assert (again.status, again.events) == (decision.status, ()), moment
        seen.append((moment, decision.status.state, describe(decision), [e.reason for e in decision.events]))
        job = job.model_copy(update={"status": decision.status})
    return seen


def test_the_life_of_a_fine_tune_job() -> None:
    assert walk(fine_tune(hub=HUB)) == [
        (
            "applied",
            "Preparing",
            "applies ConfigMap ftj-bot, PersistentVolumeClaim ftj-bot, Job ftj-bot-prepare",
            ["Preparing"],
        ),
        ("its pod runs", "Preparing", "waits", []),
        ("prepared", "Starting", "repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run", ["Prepared"]),
        ("pods run", "Running", "waits", ["Started"]),
        ("a pod is lost", "Restarting", "waits", []),
        ("restarted", "Running", "waits", ["Restarting", "Running"]),
        ("trained", "Publishing", "repairs ConfigMap ftj-bot; applies Job ftj-bot-publish", ["Trained", "Publishing"]),
        ("uploads", "Publishing", "waits", []),
        ("published", "Complete", "Complete Completed", ["Published", "Completed"]),
        ("ended", "Complete", "Complete Completed; again in 86400 s", []),
    ]


def test_the_life_of_a_generate_job() -> None:
    assert [(state, events) for _, state, _, events in walk(generate(hub=HUB))] == [
        ("Preparing", ["Preparing"]),
        ("Preparing", []),
        ("Starting", ["Prepared"]),
        ("Running", ["Started"]),
        ("Restarting", []),
        ("Running", ["Restarting", "Running"]),
        ("Publishing", ["Generated", "Publishing"]),
        ("Publishing", []),
        ("Complete", ["Published", "Completed"]),
        ("Complete", []),
    ]


def test_an_operator_that_was_away_all_the_time_comes_to_the_same_end() -> None:
    """Only the last picture, no memory of any pod: what is lost is what pods have said, nothing else."""
    job = fine_tune(hub=HUB)
    prepared, trained, published = (
        child(job, "prepare", "Complete"),
        child(job, "run", "Complete", restarts=1, charged=1),
        child(job, "publish", "Complete"),
    )
    decision = decide(observed(job, prepared, trained, published), SETTINGS, NOW)
    assert describe(decision) == "Complete Completed"
    assert (decision.status.restarts, decision.status.prepared, decision.status.metrics) == (1, None, None)


def test_conditions_keep_the_time_of_their_last_turn() -> None:
    job: Any = fine_tune()
    turned = {}
    for moment, given in life(job):
        status = decide(replace(given, job=given.job.model_copy(update={"status": job.status})), SETTINGS, NOW).status
        assert all(c.observed_generation == 1 for c in status.conditions)
        old = {c.type: c for c in job.status.conditions}
        turned[moment] = [c.type for c in status.conditions if c.type in old and c.status != old[c.type].status]
        backdated = [c.model_copy(update={"last_transition_time": "2026-03-01T00:00:00Z"}) for c in status.conditions]
        for c in status.conditions:
            kept = c.last_transition_time == (old[c.type].last_transition_time if c.type in old else None)
            assert kept == (c.type in old and c.status == old[c.type].status), (moment, c.type)
        job = job.model_copy(update={"status": status.model_copy(update={"conditions": backdated})})
    assert {m: t for m, t in turned.items() if t} == {
        "prepared": ["Prepared"],
        "pods run": ["Running"],
        "a pod is lost": ["Running"],
        "restarted": ["Running"],
        "trained": ["Running"],
    }


@dataclass(frozen=True)
class Case:
    name: str
    phases: list[Any]  # that are complete
    expect: tuple[str, str, list[str]]  # condition, state, events


REFUSED = [
    Case(
        name="prepare is refused",
        phases=[],
        expect=("Prepared", "FailedCreate", ["FailedCreate"]),
    ),
    Case(
        name="run is refused",
        phases=["prepare"],
        expect=("Running", "FailedCreate", ["Prepared", "FailedCreate"]),
    ),
    Case(
        name="publish is refused",
        phases=["prepare", "run"],
        expect=("Published", "FailedCreate", ["Prepared", "Trained", "FailedCreate"]),
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused_says_so_and_the_rest_of_the_decision_stands(case: Case) -> None:
    job = fine_tune(hub=HUB)
    given = observed(job, *(child(job, phase, "Complete") for phase in case.phases))
    decision = decide(given, SETTINGS, NOW)
    answer = refused(given, decision, "Job x: exceeded quota", NOW)
    condition, state, events = case.expect
    assert said(answer, condition) == "False FailedCreate: Job x: exceeded quota"
    assert (answer.status.state, [e.reason for e in answer.events]) == (state, events)
    assert (answer.apply, answer.status.start_time, said(answer, "Accepted")) == (
        decision.apply,
        decision.status.start_time,
        said(decision, "Accepted"),
    )
    again = replace(given, job=job.model_copy(update={"status": answer.status}))
    second = refused(again, decide(again, SETTINGS, NOW), "Job x: exceeded quota", NOW)
    assert (second.status, second.events) == (answer.status, ())


def test_the_order_of_the_steps_is_the_story_of_a_job() -> None:
    assert [s.__name__ for s in STEPS] == ["accept", "suspend", "deadline", "prepare", "run", "publish", "finish"]


def test_a_decision_is_made_without_changing_what_was_observed() -> None:
    job = fine_tune(hub=HUB)
    for _, given in life(job):
        before = repr(given)
        decide(given, SETTINGS, NOW)
        assert repr(given) == before
    assert isinstance(job, FineTuneJob)
    assert BEGIN < NOW
