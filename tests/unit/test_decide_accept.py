"""Accept, as a table: what must be there before anything is created."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cases.observed import NOW, child, decided, describe, fine_tune, generate, said, status

from luthier_operator.model import Decision

SOURCE = {"model": {"job": "base"}}
BASE = {"base": fine_tune(status("Trained", state="Publishing"), name="base")}
RUNNING_BASE = {"base": fine_tune(status(state="Running"), name="base")}
FAILED_BASE = {"base": fine_tune(status("Failed"), name="base")}
ADAPTER = {"adapters": [{"id": "org/style"}, {"job": "style"}]}
INPUTS = {"inputs": {"job": "lutes", "columns": {"prompt": "text"}}}
LUTES = {"GenerateJob/lutes": generate(status("Generated", state="Publishing"), name="lutes")}
RUNNING_LUTES = {"GenerateJob/lutes": generate(status("Trained", state="Running"), name="lutes")}
MANY_ROWS = {"inputs": {"rows": [{"prompt": "x" * 8000}] * 200}}


BEGUN = fine_tune(status("Accepted"))


@dataclass(frozen=True)
class Case:
    name: str
    given: Callable[[], Decision]
    expect: str
    state: str


CASES = [
    Case(
        name="nothing is missing",
        given=lambda: decided(fine_tune()),
        expect="True Accepted: The job can run",
        state="Preparing",
    ),
    Case(
        name="no JobSet",
        given=lambda: decided(fine_tune(), jobset_installed=False),
        expect=(
            "False JobSetMissing: FineTuneJobs need JobSet, which this cluster does not have. Install it: kubectl apply"
            " --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
        ),
        state="Pending",
    ),
    Case(
        name="no JobSet, but generation needs none",
        given=lambda: decided(generate(), jobset_installed=False),
        expect="True Accepted: The job can run",
        state="Preparing",
    ),
    Case(
        name="no JobSet any more, once begun",
        given=lambda: decided(BEGUN, child(BEGUN, "prepare", born=NOW), jobset_installed=False),
        expect="True Accepted: ",
        state="Preparing",
    ),
    Case(
        name="the named job does not exist",
        given=lambda: decided(fine_tune(**SOURCE)),
        expect=(
            'False WaitingForJob: spec.model.job: there is no FineTuneJob "base" in this namespace; waiting for its'
            " result"
        ),
        state="Waiting",
    ),
    Case(
        name="the named job still runs",
        given=lambda: decided(fine_tune(**SOURCE), sources=RUNNING_BASE),
        expect='False WaitingForJob: spec.model.job: FineTuneJob "base" is Running; waiting for its result',
        state="Waiting",
    ),
    Case(
        name="the named job has its result, and publishes it",
        given=lambda: decided(fine_tune(**SOURCE), sources=BASE),
        expect="True Accepted: The job can run",
        state="Preparing",
    ),
    Case(
        name="the named job has failed",
        given=lambda: decided(fine_tune(**SOURCE), sources=FAILED_BASE),
        expect=(
            'False SourceFailed: spec.model.job: FineTuneJob "base" has failed, so there is no result to start from. '
            "Repair that job first"
        ),
        state="Failed",
    ),
    Case(
        name="an adapter's job does not exist",
        given=lambda: decided(generate(**ADAPTER)),
        expect=(
            'False WaitingForJob: spec.adapters[1].job: there is no FineTuneJob "style" in this namespace; waiting for'
            " its result"
        ),
        state="Waiting",
    ),
    Case(
        name="the job with the inputs does not exist, and a FineTuneJob of its name counts for nothing",
        given=lambda: decided(generate(name="next", **INPUTS), sources={"lutes": fine_tune(status("Trained"))}),
        expect=(
            'False WaitingForJob: spec.inputs.job: there is no GenerateJob "lutes" in this namespace; waiting for its'
            " result"
        ),
        state="Waiting",
    ),
    Case(
        name="the job with the inputs still runs",
        given=lambda: decided(generate(name="next", **INPUTS), sources=RUNNING_LUTES),
        expect='False WaitingForJob: spec.inputs.job: GenerateJob "lutes" is Running; waiting for its result',
        state="Waiting",
    ),
    Case(
        name="the job with the inputs has its outputs, and publishes them",
        given=lambda: decided(generate(name="next", **INPUTS), sources=LUTES),
        expect="True Accepted: The job can run",
        state="Preparing",
    ),
    Case(
        name="jobs wait for each other's outputs",
        given=lambda: decided(
            generate(name="next", **INPUTS), cycle=("GenerateJob/next", "GenerateJob/lutes", "GenerateJob/next")
        ),
        expect=(
            "False InvalidSpec: spec.inputs.job: GenerateJobs wait for each other's results: next → lutes → next. One"
            " of them has to start from other inputs"
        ),
        state="Failed",
    ),
    Case(
        name="it names itself",
        given=lambda: decided(fine_tune(name="base", **SOURCE), sources=BASE),
        expect="False InvalidSpec: spec.model.job: base is this job itself; name the job whose result it starts from",
        state="Failed",
    ),
    Case(
        name="jobs wait for each other's results",
        given=lambda: decided(fine_tune(name="a", **SOURCE), cycle=("a", "base", "a")),
        expect=(
            "False InvalidSpec: spec.model.job: FineTuneJobs wait for each other's results: a → base → a. One of them"
            " has to start from another model"
        ),
        state="Failed",
    ),
    Case(
        name="the named job cannot be read",
        given=lambda: decided(fine_tune(**SOURCE), unreadable_sources={"base": "spec.task: no such task"}),
        expect=(
            'False SourceNotUnderstood: spec.model.job: FineTuneJob "base" exists, but this operator (0.1.0) does not'
            " understand it: spec.task: no such task. The CRDs and the operator have different versions: install both"
            " from the same chart"
        ),
        state="Waiting",
    ),
    Case(
        name="a GenerateJob may be called as its model",
        given=lambda: decided(generate(name="base", **SOURCE), sources=BASE),
        expect="True Accepted: The job can run",
        state="Preparing",
    ),
    Case(
        name="the names of a hundred pods would be too long",
        given=lambda: decided(fine_tune(name="n" * 40, resources={"nodes": 100}, training={"batchSize": 100})),
        expect=(
            "False InvalidSpec: metadata.name: with spec.resources.nodes: 100, at most 39 characters, so that the names"
            " of pods fit; choose a shorter one"
        ),
        state="Failed",
    ),
    Case(
        name="the longest name for ten nodes",
        given=lambda: decided(fine_tune(name="n" * 40, resources={"nodes": 10}, training={"batchSize": 80})),
        expect="True Accepted: The job can run",
        state="Preparing",
    ),
    Case(
        name="more rows than a ConfigMap holds",
        given=lambda: decided(generate(**MANY_ROWS)),
        expect="False InvalidSpec: spec: 16",
        state="Failed",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accept(case: Case) -> None:
    decision = case.given()
    assert said(decision, "Accepted")[: len(case.expect)] == case.expect
    assert decision.status.state == case.state


def test_a_status_that_was_not_written_is_caught_up_with() -> None:
    """The operator died between creating the Job and writing the status."""
    job = fine_tune()
    decision = decided(job, child(job, "prepare"))
    assert said(decision, "Accepted") == "True Accepted: The job can run"
    assert decision.status.start_time == "2026-03-01T11:00:00Z", "when the Job was created"


def test_only_a_job_that_had_to_wait_is_told_that_it_may_begin() -> None:
    waited = fine_tune(status(false={"Accepted": "JobSetMissing"}))
    assert [e.reason for e in decided(waited).events] == ["Accepted", "Preparing"]
    assert [e.reason for e in decided(fine_tune()).events] == ["Preparing"]


def test_a_job_that_waits_looks_again_without_any_event() -> None:
    assert describe(decided(fine_tune(**SOURCE))) == "again in 30 s"
    assert describe(decided(fine_tune(), jobset_installed=False)) == "again in 30 s"


def test_too_many_rows_are_sent_to_a_file() -> None:
    assert "spec.inputs.dataset.files" in said(decided(generate(**MANY_ROWS)), "Failed")
