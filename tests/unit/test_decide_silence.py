"""Pods that run without making progress: what the condition Running says, and when the status is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from cases.observed import BEGIN, NOW, RUNNING, at, child, decided, fine_tune, generate, pod, said, status

from luthier_api.status import JobStatus, Progress
from luthier_operator.model import Decision, Job, Object, Silence
from luthier_operator.phases.silence import NO_STEP_SECONDS
from luthier_operator.statuses import text

BEGUN = status("Accepted", "Prepared", start_time=text(BEGIN), progress=Progress(step=7, max_steps=40))
MAKING = status("Accepted", "Prepared", start_time=text(BEGIN), progress=Progress(rows=3, max_rows=40))
FRESH = status("Accepted", "Prepared", start_time=text(BEGIN), progress=Progress(step=0, max_steps=40))
SLOW = status("Accepted", "Prepared", start_time=text(BEGIN), progress=Progress(step=7, max_steps=17, eta_seconds=6000))
TUNE, SHARDS = fine_tune(BEGUN), generate(MAKING)
HUNG, WELL, UNREAD = (
    Silence(NO_STEP_SECONDS),
    Silence(NO_STEP_SECONDS - 1),
    Silence(NO_STEP_SECONDS, "no answer in time"),
)


def pods(job: Job, count: int = 2) -> list[Object]:
    return [pod(job, "run", index, state=RUNNING) for index in range(count)]


def at_work(job: Job, silences: Mapping[int, Silence]) -> Decision:
    """`silences`: by index of the pod."""
    running = pods(job)
    by_uid = {running[index]["metadata"]["uid"]: silence for index, silence in silences.items()}
    return decided(job, child(job, "run"), pods=running, silences=by_uid)


def left_by(job: Job, decision: Decision) -> Job:
    return job.model_copy(update={"status": decision.status})


@dataclass(frozen=True)
class Case:
    name: str
    job: Job
    expect: str
    """How the condition begins."""
    silences: Mapping[int, Silence] = field(default_factory=dict)
    state: str = "Running"
    event: str = "Normal Started"


CASES = [
    Case(
        name="no metrics have been read",
        job=TUNE,
        expect="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="steps come",
        job=TUNE,
        silences={0: WELL},
        expect="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="no step",
        job=TUNE,
        silences={0: HUNG},
        expect="True NoStep: pod ftj-bot-run-0-0 has made no progress for 300 s: no step, batch of an evaluation,"
        " output or growing checkpoint; the last step was 7 of 40. ",
        state="NoStep",
        event="Warning NoStep",
    ),
    Case(
        name="the first step, for which the model is compiled",
        job=fine_tune(FRESH),
        silences={0: Silence(899)},
        expect="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="no first step",
        job=fine_tune(FRESH),
        silences={0: Silence(900)},
        expect="True NoStep: pod ftj-bot-run-0-0 has made no progress for 900 s",
        state="NoStep",
        event="Warning NoStep",
    ),
    Case(
        name="steps that take ten minutes",
        job=fine_tune(SLOW),
        silences={0: Silence(1799)},
        expect="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="no step, where steps take ten minutes",
        job=fine_tune(SLOW),
        silences={0: Silence(1800)},
        expect="True NoStep: pod ftj-bot-run-0-0 has made no progress for 1800 s",
        state="NoStep",
        event="Warning NoStep",
    ),
    Case(
        name="a pod that does not answer",
        job=TUNE,
        silences={0: UNREAD},
        expect="True ProgressUnknown: the metrics of pod ftj-bot-run-0-0 could not be read for 300 s (no answer",
        event="Warning ProgressUnknown",
    ),
    Case(
        name="one shard hangs",
        job=SHARDS,
        silences={0: WELL, 1: HUNG},
        expect="True NoStep: pod gj-lutes-run-1-0 has made no progress",
        state="NoStep",
        event="Warning NoStep",
    ),
    Case(
        name="all shards hang",
        job=SHARDS,
        silences={0: HUNG, 1: HUNG},
        expect="True NoStep: pod gj-lutes-run-0-0 and 1 more has made no progress",
        state="NoStep",
        event="Warning NoStep",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pod_without_progress_is_reported(case: Case) -> None:
    decision = at_work(case.job, case.silences)
    assert said(decision, "Running").startswith(case.expect)
    assert decision.status.state == case.state
    assert f"{decision.events[-1].type} {decision.events[-1].reason}" == case.event


@pytest.mark.parametrize("later", [{0: Silence(900)}, {}], ids=["the silence grows", "the operator has just started"])
def test_it_is_written_once(later: Mapping[int, Silence]) -> None:
    first = at_work(TUNE, {0: HUNG})
    second = at_work(left_by(TUNE, first), later)
    assert (second.status, list(second.events)) == (first.status, [])


def test_a_pod_that_goes_on_runs_again() -> None:
    hung = at_work(TUNE, {0: HUNG})
    again = at_work(left_by(TUNE, hung), {0: Silence(2)})
    assert said(again, "Running") == "True Running: 2 pods on 16 GPUs"
    assert [(event.type, event.reason) for event in again.events] == [("Normal", "Running")]


def test_what_a_pod_that_is_gone_has_served_does_not_count() -> None:
    assert said(decided(TUNE, child(TUNE, "run"), pods=pods(TUNE), silences={"gone": HUNG}), "Running").startswith(
        "True Running"
    )


@dataclass(frozen=True)
class TimeCase:
    name: str
    read: Progress
    expect: Progress


KNOWN = Progress(step=7, max_steps=40, loss=2.5, time=text(at(-600)))
TIMES = [
    TimeCase(
        name="the same figures",
        read=Progress(step=7, max_steps=40, loss=2.5, time=text(NOW)),
        expect=KNOWN,
    ),
    TimeCase(
        name="another step",
        read=Progress(step=8, max_steps=40, loss=2.5, time=text(NOW)),
        expect=Progress(step=8, max_steps=40, loss=2.5, time=text(NOW)),
    ),
]


@pytest.mark.parametrize("case", TIMES, ids=lambda case: case.name)
def test_the_time_of_the_progress_is_that_of_its_figures(case: TimeCase) -> None:
    job = fine_tune(JobStatus(conditions=BEGUN.conditions, start_time=text(BEGIN), progress=KNOWN))
    assert decided(job, child(job, "run"), pods=pods(job), progress=case.read).status.progress == case.expect
