"""Finish: exactly one end, the time to live, and what is written after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cases.observed import (
    BEGIN,
    NOW,
    SETTINGS,
    at,
    child,
    decided,
    describe,
    ended,
    fine_tune,
    hub_end,
    observed,
    prepared_end,
    said,
    status,
)

from luthier_api.status import JobStatus, Phase
from luthier_operator.decide import decide
from luthier_operator.model import Job, Object, PodEnd
from luthier_operator.statuses import text

TRAINED = status("Accepted", "Prepared", "Trained", start_time=text(BEGIN), metrics={"evalLoss": 1.5})
ENDED = {"completion_time": text(at(-60))}


@dataclass(frozen=True)
class TtlCase:
    name: str
    given: object
    spec: dict[str, int]
    expect: str


TTL = [
    TtlCase(
        name="none",
        given=status("Complete", **ENDED),
        spec={},
        expect="Complete Complete",
    ),
    TtlCase(
        name="not over",
        given=status("Complete", **ENDED),
        spec={"ttlSecondsAfterFinished": 100},
        expect="Complete Complete; again in 40 s",
    ),
    TtlCase(
        name="over",
        given=status("Complete", **ENDED),
        spec={"ttlSecondsAfterFinished": 60},
        expect="deletes the job; Complete Complete",
    ),
    TtlCase(
        name="over, of a failure",
        given=status("Failed", **ENDED),
        spec={"ttlSecondsAfterFinished": 0},
        expect="deletes the job; Failed Failed",
    ),
    TtlCase(
        name="not finished",
        given=status("Accepted", "Prepared"),
        spec={"ttlSecondsAfterFinished": 0},
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
    ),
]


@pytest.mark.parametrize("case", TTL, ids=lambda case: case.name)
def test_the_time_to_live(case: TtlCase) -> None:
    assert describe(decided(fine_tune(case.given, **case.spec))) == case.expect  # type: ignore[arg-type]


def test_complete_says_where_the_result_is() -> None:
    job = fine_tune(TRAINED)
    decision = decided(job, child(job, "run", "Complete"))
    assert said(decision, "Complete") == "True Completed: the result is in ftj-bot-f00dcafe/result of claim ftj-bot"
    assert (decision.status.completion_time, decision.status.state) == (text(NOW), "Complete")
    assert [(e.type, e.reason) for e in decision.events] == [("Normal", "Completed")]


def run_end(job: Job) -> PodEnd:
    return ended(job, "run", 0, metrics={"evalLoss": 1.5})


HUB = {"repo": "org/bot", "tokenSecretRef": {"name": "hf"}}
BEGUN = {"start_time": text(BEGIN)}


@dataclass(frozen=True)
class LastWordsCase:
    phase: Phase
    given: JobStatus
    spec: Object
    last_end: Callable[[Job], PodEnd]
    expect: str


LAST_WORDS = [
    LastWordsCase(
        phase="prepare",
        given=status("Accepted", **BEGUN),
        spec={"planOnly": True},
        last_end=prepared_end,
        expect="Planned",
    ),
    LastWordsCase(
        phase="run",
        given=status("Accepted", "Prepared", "Running", **BEGUN),
        spec={},
        last_end=run_end,
        expect="Complete",
    ),
    LastWordsCase(
        phase="publish",
        given=status("Accepted", "Prepared", "Trained", metrics={"evalLoss": 1.5}, **BEGUN),
        spec={"hub": HUB},
        last_end=hub_end,
        expect="Complete",
    ),
]


@pytest.mark.parametrize("case", LAST_WORDS, ids=lambda case: case.phase)
def test_the_last_words_of_a_phase_are_waited_for_but_not_for_ever(case: LastWordsCase) -> None:
    """A Job and its pod are watched apart: whoever reads Planned, Trained or Complete finds there what the pods have
    said.
    """
    job = fine_tune(case.given, **case.spec)
    just = child(job, case.phase, "Complete", since=at(-1))
    silent = decided(job, just)
    assert (describe(silent), [c.type for c in silent.status.conditions]) == (
        "again in 3 s",
        [*(c.type for c in case.given.conditions), "Reconciling"],
    )
    told = decided(job, just, ends=[case.last_end(job)])
    assert told.status.state == case.expect
    assert (told.status.prepared, told.status.metrics, told.status.hub)[
        ("prepare", "run", "publish").index(case.phase)
    ] is not None
    assert decided(job, child(job, case.phase, "Complete", since=at(-4))).status.state == case.expect


def test_what_comes_after_the_end_is_still_written() -> None:
    job = fine_tune(
        status("Accepted", "Prepared", "Trained", "Published", "Complete", **ENDED),
        hub={"repo": "org/bot", "tokenSecretRef": {"name": "hf"}},
    )
    decision = decided(job, ends=[ended(job, "run", 0, metrics={"evalLoss": 1.25}), hub_end(job)])
    assert decision.status.metrics == {"evalLoss": 1.25}
    assert decision.status.hub is not None
    assert decision.status.hub.revision == "abcdef0123456789"


DAY = 24 * 3600


@dataclass(frozen=True)
class ChildrenCase:
    name: str
    ended: float
    """Seconds ago."""
    phases: list[Phase]
    expect: str
    spec: dict[str, int] | None = None
    kept_seconds: int = DAY
    given: str = "Complete"


CHILDREN_OF_A_FINISHED_JOB = [
    ChildrenCase(
        name="their logs can be read for a day",
        ended=DAY - 60,
        phases=["prepare", "run"],
        expect="Complete Complete; again in 60 s",
    ),
    ChildrenCase(
        name="then they are deleted",
        ended=DAY,
        phases=["prepare", "run", "publish"],
        expect="deletes Job ftj-bot-prepare, JobSet ftj-bot-run, Job ftj-bot-publish; Complete Complete",
    ),
    ChildrenCase(
        name="also those of a job that failed",
        ended=DAY,
        phases=["prepare"],
        expect="deletes Job ftj-bot-prepare; Failed Failed",
        given="Failed",
    ),
    ChildrenCase(
        name="an administrator wants them deleted at once",
        ended=0,
        phases=["run"],
        expect="deletes JobSet ftj-bot-run; Complete Complete",
        kept_seconds=0,
    ),
    ChildrenCase(
        name="nothing is left, and nothing to be done",
        ended=2 * DAY,
        phases=[],
        expect="Complete Complete",
    ),
    ChildrenCase(
        name="the job itself goes later",
        ended=DAY,
        phases=["run"],
        expect="deletes JobSet ftj-bot-run; Complete Complete; again in 40 s",
        spec={"ttlSecondsAfterFinished": DAY + 40},
    ),
    ChildrenCase(
        name="the job itself goes sooner",
        ended=60,
        phases=["run"],
        expect="Complete Complete; again in 40 s",
        spec={"ttlSecondsAfterFinished": 100},
    ),
]


@pytest.mark.parametrize("end", ["Complete", "Failed"])
def test_of_a_finished_job_only_what_still_runs_is_stopped(end: str) -> None:
    job = fine_tune(status("Accepted", end, **ENDED), suspend=True, activeDeadlineSeconds=1)
    decision = decided(job, child(job, "prepare", "Complete"), child(job, "run"))
    assert describe(decision) == f"deletes JobSet ftj-bot-run; {end} {end}; again in 86340 s"
    assert not decision.status.is_true("Suspended")


@dataclass(frozen=True)
class LostCase:
    name: str
    state: str
    conditions: tuple[str, ...]
    expect: str
    shown: str


LOST = [
    LostCase(
        name="the end, and all else",
        state="Complete",
        conditions=(),
        expect="True ConditionsLost",
        shown="Complete",
    ),
    LostCase(
        name="the failure",
        state="Failed",
        conditions=("Accepted", "Prepared"),
        expect="absent",
        shown="Failed",
    ),
    LostCase(
        name="the end and the state",
        state="",
        conditions=("Accepted", "Prepared", "Trained"),
        expect="Unknown ConditionsLost",
        shown="Unknown",
    ),
]


@pytest.mark.parametrize("case", CHILDREN_OF_A_FINISHED_JOB, ids=lambda case: case.name)
def test_children_of_a_finished_job_are_deleted_after_a_time(case: ChildrenCase) -> None:
    job = fine_tune(status(case.given, completion_time=text(at(-case.ended))), **(case.spec or {}))
    given = observed(job, *(child(job, phase, "Complete") for phase in case.phases))
    decision = decide(given, SETTINGS.model_copy(update={"finished_pods_seconds": case.kept_seconds}), NOW)
    assert describe(decision) == case.expect


def test_a_child_that_is_being_deleted_is_not_deleted_again() -> None:
    job = fine_tune(status("Complete", completion_time=text(at(-DAY))))
    assert describe(decided(job, child(job, "run", "Complete", deleting=True))) == "Complete Complete"


@pytest.mark.parametrize("case", LOST, ids=lambda case: case.name)
def test_a_job_with_a_completion_time_never_runs_again_by_itself(case: LostCase) -> None:
    decision = decided(fine_tune(status(*case.conditions, state=case.state, **ENDED)))
    assert (decision.apply, decision.repair, decision.delete, decision.events) == ((), None, (), ())
    assert said(decision, "Complete").startswith(case.expect)
    assert decision.status.state == case.shown


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    job = fine_tune(TRAINED)
    going = job.model_copy(update={"metadata": job.metadata.model_copy(update={"deletion_timestamp": text(NOW)})})
    assert describe(decided(going)) == "waits"
    assert decided(going).status == TRAINED
