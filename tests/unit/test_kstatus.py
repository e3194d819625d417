"""The conditions of kstatus, by which Flux and others tell a job at work from one at rest and one that has failed.

`rules` is what kstatus does with a kind that it does not know
(https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cases.observed import at, child, decided, ended, fine_tune, pod, prepared_end, status, text

from luthier_api.status import JobStatus
from luthier_operator.model import Decision, Job
from luthier_operator.rawstatus import not_understood_status


def rules(found: JobStatus, generation: int) -> str:
    if found.observed_generation is not None and found.observed_generation != generation:
        return "InProgress"
    if found.is_true("Reconciling"):  # type: ignore[arg-type]
        return "InProgress"
    if found.is_true("Stalled"):  # type: ignore[arg-type]
        return "Failed"
    return "Current"


@dataclass(frozen=True)
class Case:
    name: str
    decision: Decision
    expect: str


WAITING = fine_tune(model={"job": "base"})
PREPARED = fine_tune(status("Accepted", "Prepared"))
PLAN = fine_tune(status("Accepted", false={"Prepared": "Preparing"}), planOnly=True)
STOPPED = fine_tune(status("Accepted"), suspend=True)
ENDED = {"completion_time": text(at(-5))}


def lost(job: Job) -> Decision:
    """A run that ended with a mistake, after which nothing is tried again."""
    return decided(job, child(job, "run", "Failed", since=at(-60)), ends=[ended(job, "run", 0, 64)])


CASES = [
    Case(
        name="waits for another job",
        decision=decided(WAITING),
        expect="InProgress",
    ),
    Case(
        name="at work",
        decision=decided(PREPARED, child(PREPARED, "run"), pods=[pod(PREPARED, "run", i) for i in (0, 1)]),
        expect="InProgress",
    ),
    Case(
        name="planned, and that was all",
        decision=decided(PLAN, child(PLAN, "prepare", "Complete"), ends=[prepared_end(PLAN)]),
        expect="Current",
    ),
    Case(
        name="suspended",
        decision=decided(STOPPED),
        expect="Current",
    ),
    Case(
        name="failed",
        decision=lost(PREPARED),
        expect="Failed",
    ),
    Case(
        name="complete",
        decision=decided(fine_tune(status("Accepted", "Prepared", "Trained", "Complete", **ENDED))),
        expect="Current",
    ),
    Case(
        name="it has lost how it ended",
        decision=decided(fine_tune(JobStatus(**ENDED))),
        expect="Failed",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kstatus(case: Case) -> None:
    assert rules(case.decision.status, generation=1) == case.expect


def test_a_job_that_goes_on_is_stalled_no_more() -> None:
    failed = lost(PREPARED).status
    assert rules(failed, generation=1) == "Failed"
    retried = fine_tune(failed, retry=1)
    retried = retried.model_copy(update={"metadata": retried.metadata.model_copy(update={"generation": 2})})
    assert rules(decided(retried).status, generation=2) == "InProgress"


def test_a_job_that_is_not_understood_is_stalled() -> None:
    job = {"metadata": {"generation": 1}, "spec": {}, "status": {}}
    found = not_understood_status(job, "spec.task: what is that?")
    assert [c["type"] for c in found["conditions"] if c["status"] == "True"] == ["Stalled"]
