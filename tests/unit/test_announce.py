"""The event of a restart: it names the failure before it, also where that is seen later than the restart itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cases.observed import fine_tune, generate

from luthier_api.status import Attempt, JobStatus
from luthier_operator.announce import events
from luthier_operator.model import Job
from luthier_operator.workloads import workload

TUNE, SHARDS = fine_tune(), generate()


def failed(number: int, reason: str = "Preempted", rank: int = 0) -> Attempt:
    return Attempt(phase="run", attempt=number, reason=reason, message="stopped", pod=f"pod-{number}-{rank}", rank=rank)


def after(restarts: int, *attempts: Attempt) -> JobStatus:
    return JobStatus(restarts=restarts, restarts_charged=restarts, attempts=list(attempts))


@dataclass(frozen=True)
class Case:
    name: str
    job: Job
    old: JobStatus
    new: JobStatus
    expect: list[str]


FIRST, SECOND, OTHER = failed(0, "Preempted"), failed(1, "Hang"), failed(0, "PeerLost", rank=1)
OF_FIRST = "after Preempted: stopped (run, rank 0, pod pod-0-0)"
OF_SECOND = "after Hang: stopped (run, rank 0, pod pod-1-0)"
UNSEEN = "how the pod before it ended has not been seen"
CASES = [
    Case(
        name="a group, whose failure was seen before",
        job=TUNE,
        old=after(0, FIRST),
        new=after(1, FIRST),
        expect=[f"restart 1 {OF_FIRST}"],
    ),
    Case(
        name="a group, whose failure has not been seen",
        job=TUNE,
        old=after(1, FIRST),
        new=after(2, FIRST),
        expect=[f"restart 2; {UNSEEN}. The last known failure is Preempted: stopped (run, rank 0, pod pod-0-0)"],
    ),
    Case(
        name="a group, whose failure is seen after the restart",
        job=TUNE,
        old=after(2, FIRST),
        new=after(2, FIRST, SECOND),
        expect=[f"restart 2 {OF_SECOND}"],
    ),
    Case(
        name="a group that has failed and not been restarted yet",
        job=TUNE,
        old=after(1, FIRST),
        new=after(1, FIRST, SECOND),
        expect=[],
    ),
    Case(
        name="a shard, whose failure was seen before",
        job=SHARDS,
        old=after(1, FIRST, OTHER),
        new=after(2, FIRST, OTHER),
        expect=["restart 2 after PeerLost: stopped (run, rank 1, pod pod-0-1)"],
    ),
    Case(
        name="a shard, whose replacement is seen first",
        job=SHARDS,
        old=after(0),
        new=after(1),
        expect=[f"restart 1; {UNSEEN}"],
    ),
    Case(
        name="a shard, whose failure is seen after its replacement",
        job=SHARDS,
        old=after(1),
        new=after(1, FIRST),
        expect=[f"restart 1 {OF_FIRST}"],
    ),
    Case(
        name="nothing new",
        job=SHARDS,
        old=after(1, FIRST),
        new=after(1, FIRST),
        expect=[],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_restart_names_the_failure_before_it(case: Case) -> None:
    found = events(workload(case.job), case.old, case.new)
    assert [event.message for event in found if event.reason == "Restarting"] == case.expect
