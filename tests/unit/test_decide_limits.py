"""Deadline and suspension: what takes the pods away, and how a job goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import pytest
from cases.observed import (
    BEGIN,
    NOW,
    RUNNING,
    at,
    child,
    decided,
    describe,
    ended,
    fine_tune,
    generate,
    pod,
    said,
    status,
)

from luthier_api.conditions import ConditionType
from luthier_api.status import Attempt, JobStatus, Phase
from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.statuses import text

BEGUN = {"start_time": text(BEGIN), "active_since": text(BEGIN)}
AT_WORK = status("Accepted", "Prepared", "Running", **BEGUN)


def test_the_deadline_counts_from_the_first_phase() -> None:
    job = fine_tune(AT_WORK, activeDeadlineSeconds=3600)
    late = decided(job, child(job, "prepare", "Complete"), child(job, "run"))
    assert describe(late) == "deletes JobSet ftj-bot-run; Failed DeadlineExceeded"
    assert said(late, "Running").startswith(
        "False DeadlineExceeded: spec.activeDeadlineSeconds: the job was at work for 3600 seconds."
    )
    early = fine_tune(AT_WORK, activeDeadlineSeconds=3700)
    assert describe(decided(early, child(early, "prepare", "Complete"), child(early, "run"))) == "again in 100 s"


@dataclass(frozen=True)
class NearestCase:
    name: str
    deadline_seconds: int
    expect: str


NEAREST = [
    NearestCase(
        name="evidence before the deadline",
        deadline_seconds=7200,
        expect="again in 3 s",
    ),
    NearestCase(
        name="the deadline before evidence",
        deadline_seconds=3601,
        expect="again in 1 s",
    ),
]


@pytest.mark.parametrize("case", NEAREST, ids=lambda case: case.name)
def test_of_several_reasons_to_look_again_the_nearest_counts(case: NearestCase) -> None:
    job = fine_tune(AT_WORK, activeDeadlineSeconds=case.deadline_seconds)
    assert (
        describe(decided(job, child(job, "prepare", "Complete"), child(job, "run", "Failed", since=NOW))) == case.expect
    )


def test_a_job_that_goes_on_gets_no_new_deadline() -> None:
    """Its prepare Job was deleted for the suspension, and is a new one."""
    job = fine_tune(status("Accepted", **BEGUN), activeDeadlineSeconds=3700)
    decision = decided(job, child(job, "prepare", born=at(-10)), pods=[pod(job, "prepare", state=RUNNING)])
    assert (decision.status.start_time, describe(decision)) == (text(BEGIN), "again in 100 s")


TEN_MINUTES = {"activeDeadlineSeconds": 600}  # over for 50 minutes now
IN_TIME, LATE = at(-3500), at(-2000)
HUB = {"hub": {"repo": "org/bot", "tokenSecretRef": {"name": "hf"}}}
PREPARED = status("Accepted", "Prepared", **BEGUN)
TRAINED = status("Accepted", "Prepared", **BEGUN).model_copy(
    update={
        "conditions": [
            *PREPARED.conditions,
            *(c.model_copy(update={"last_transition_time": text(IN_TIME)}) for c in status("Trained").conditions),
        ]
    }
)
FATAL = {"message": "Container trainer for pod ml/x failed with exit code 82 matching FailJob rule at index 0"}


@dataclass(frozen=True)
class DeadlineCase:
    name: str
    given: JobStatus
    child: tuple[Phase, str, datetime] | None  # phase, condition, since
    expect: str
    spec: Object = field(default_factory=dict)


DEADLINES = [
    DeadlineCase(
        name="trained in time, looked at late",
        given=AT_WORK,
        child=("run", "Complete", IN_TIME),
        expect="Complete Completed",
    ),
    DeadlineCase(
        name="trained in time, and its JobSet is gone",
        given=TRAINED,
        child=None,
        expect="Complete Completed",
    ),
    DeadlineCase(
        name="trained too late",
        given=AT_WORK,
        child=("run", "Complete", LATE),
        expect="Failed DeadlineExceeded",
    ),
    DeadlineCase(
        name="trained in time, the upload is still to be created",
        given=AT_WORK,
        spec=HUB,
        child=("run", "Complete", IN_TIME),
        expect="Failed DeadlineExceeded",
    ),
    DeadlineCase(
        name="published in time, looked at late",
        given=TRAINED,
        spec=HUB,
        child=("publish", "Complete", IN_TIME),
        expect="Complete Completed",
    ),
    DeadlineCase(
        name="published too late",
        given=TRAINED,
        spec=HUB,
        child=("publish", "Complete", LATE),
        expect="Failed DeadlineExceeded",
    ),
    DeadlineCase(
        name="still uploading",
        given=TRAINED,
        spec=HUB,
        child=("publish", "", IN_TIME),
        expect="deletes Job ftj-bot-publish; Failed DeadlineExceeded",
    ),
    DeadlineCase(
        name="failed in time, looked at late",
        given=AT_WORK,
        child=("run", "Failed", IN_TIME),
        expect="Failed Diverged",
    ),
    DeadlineCase(
        name="failed too late",
        given=AT_WORK,
        child=("run", "Failed", LATE),
        expect="Failed DeadlineExceeded",
    ),
    DeadlineCase(
        name="planned in time: it rests",
        given=PREPARED,
        spec={"planOnly": True},
        child=("prepare", "Complete", IN_TIME),
        expect="waits",
    ),
    DeadlineCase(
        name="planned too late",
        given=status("Accepted", **BEGUN),
        spec={"planOnly": True},
        child=("prepare", "Complete", LATE),
        expect="Failed DeadlineExceeded",
    ),
    DeadlineCase(
        name="prepared in time, the run is still to be created",
        given=PREPARED,
        child=("prepare", "Complete", IN_TIME),
        expect="Failed DeadlineExceeded",
    ),
]


@pytest.mark.parametrize("case", DEADLINES, ids=lambda case: case.name)
def test_the_deadline_counts_while_anything_is_left_to_do(case: DeadlineCase) -> None:
    job = fine_tune(case.given, **TEN_MINUTES, **case.spec)
    children = []
    if case.child:
        phase, condition, since = case.child
        children.append(child(job, phase, condition, since=since, **(FATAL if condition == "Failed" else {})))
    assert describe(decided(job, *children)) == case.expect


@dataclass(frozen=True)
class SuspendedCase:
    name: str
    job: object
    phases: list[str]
    expect: str


SUSPENDED = [
    SuspendedCase(
        name="before anything",
        job=fine_tune(suspend=True),
        phases=[],
        expect="waits",
    ),
    SuspendedCase(
        name="while it prepares",
        job=fine_tune(status("Accepted", **BEGUN), suspend=True),
        phases=["prepare"],
        expect="deletes Job ftj-bot-prepare",
    ),
    SuspendedCase(
        name="while it trains",
        job=fine_tune(AT_WORK, suspend=True),
        phases=["run"],
        expect="deletes JobSet ftj-bot-run",
    ),
    SuspendedCase(
        name="while it generates",
        job=generate(AT_WORK, suspend=True),
        phases=["run"],
        expect="deletes Job gj-lutes-run",
    ),
    SuspendedCase(
        name="while it publishes",
        job=fine_tune(
            status("Accepted", "Prepared", "Trained", **BEGUN),
            suspend=True,
            hub={"repo": "org/bot", "tokenSecretRef": {"name": "hf"}},
        ),
        phases=["publish"],
        expect="deletes Job ftj-bot-publish",
    ),
]


@pytest.mark.parametrize("case", SUSPENDED, ids=lambda case: case.name)
def test_suspending_deletes_what_is_at_work(case: SuspendedCase) -> None:
    decision = decided(case.job, *(child(case.job, p) for p in case.phases))  # type: ignore[arg-type]
    assert describe(decision) == case.expect
    assert decision.status.state == "Suspended"
    assert said(decision, "Running") in ("absent", "False Suspended: spec.suspend is true")


HUB_SET: Object = {"hub": {"repo": "org/bot", "tokenSecretRef": {"name": "hf"}}}
DONE = status("Accepted", "Prepared", "Trained", **BEGUN)


@dataclass(frozen=True)
class HaltedCase:
    name: str
    given: JobStatus
    condition: str
    expect: str


HALTED = [
    HaltedCase(
        name="preparing",
        given=status("Accepted", false={"Prepared": "Preparing"}, **BEGUN),
        condition="Prepared",
        expect="False",
    ),
    HaltedCase(
        name="waiting for its image to prepare",
        given=status("Accepted", false={"Prepared": "ImagePullFailed"}, **BEGUN),
        condition="Prepared",
        expect="False",
    ),
    HaltedCase(
        name="running",
        given=AT_WORK,
        condition="Running",
        expect="False",
    ),
    HaltedCase(
        name="starting",
        given=status("Accepted", "Prepared", false={"Running": "Starting"}, **BEGUN),
        condition="Running",
        expect="False",
    ),
    HaltedCase(
        name="publishing",
        given=status(
            "Accepted", "Prepared", "Trained", false={"Running": "Trained", "Published": "Publishing"}, **BEGUN
        ),
        condition="Published",
        expect="False",
    ),
    HaltedCase(
        name="publishing: the run is over, and stays so",
        given=status(
            "Accepted", "Prepared", "Trained", false={"Running": "Trained", "Published": "Publishing"}, **BEGUN
        ),
        condition="Running",
        expect="False Trained",
    ),
    HaltedCase(
        name="not yet publishing",
        given=DONE,
        condition="Published",
        expect="absent",
    ),
    HaltedCase(
        name="not yet running",
        given=status("Accepted", "Prepared", **BEGUN),
        condition="Running",
        expect="absent",
    ),
    HaltedCase(
        name="published, its last words under way",
        given=status("Accepted", "Prepared", "Trained", "Published", **BEGUN),
        condition="Published",
        expect="True Published",
    ),
]


@pytest.mark.parametrize("case", HALTED, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("spec", "reason"),
    [({"suspend": True}, "Suspended"), (TEN_MINUTES, "DeadlineExceeded")],
    ids=["suspended", "at the deadline"],
)
def test_no_condition_tells_of_pods_that_were_taken_away(case: HaltedCase, spec: Object, reason: str) -> None:
    decision = decided(fine_tune(case.given, **HUB_SET, **spec))
    expect = f"False {reason}" if case.expect == "False" else case.expect
    assert said(decision, case.condition).split(":")[0] == expect
    end = "Completed" if case.given.is_true(ConditionType.PUBLISHED) else "Failed"
    if "suspend" in spec:
        end = "Suspended"
    assert [e.reason for e in decision.events] == [end], "one line tells it all"


def test_a_child_that_has_ended_or_is_going_is_left_alone() -> None:
    job = fine_tune(AT_WORK, suspend=True)
    assert describe(decided(job, child(job, "prepare", "Complete"), child(job, "run", deleting=True))) == "waits"


def test_the_stop_itself_is_no_failure() -> None:
    job = fine_tune(AT_WORK, suspend=True)
    assert decided(job, child(job, "run"), ends=[ended(job, "run", 75, when=-1)]).status.attempts == []


@dataclass(frozen=True)
class ClockCase:
    name: str
    given: JobStatus
    """After an hour at work since BEGIN, unless it says something else."""
    spec: Object
    child: Object
    """Arguments of the child of `run`. Without any, there is none."""
    expect: str
    active: tuple[datetime | None, int]
    """Since when the job is at work afterwards, and the seconds before."""


STOPPED = {"start_time": text(BEGIN), "active_seconds": 500}
ASLEEP = status("Accepted", "Prepared", "Suspended", **STOPPED)
QUEUED = status("Accepted", "Prepared", false={"Running": "WaitingForQueue"}, **STOPPED)
CLOCKS = [
    ClockCase(
        name="suspended after an hour",
        given=AT_WORK,
        spec={"suspend": True, "activeDeadlineSeconds": 600},
        child={},
        expect="waits",
        active=(None, 3600),
    ),
    ClockCase(
        name="suspended for longer than it has",
        given=ASLEEP,
        spec={"suspend": True, "activeDeadlineSeconds": 600},
        child={},
        expect="waits",
        active=(None, 500),
    ),
    ClockCase(
        name="goes on after a suspension with what is left",
        given=ASLEEP,
        spec={"activeDeadlineSeconds": 600},
        child={},
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run; again in 100 s",
        active=(NOW, 500),
    ),
    ClockCase(
        name="goes on after a suspension with nothing left",
        given=ASLEEP,
        spec={"activeDeadlineSeconds": 500},
        child={},
        expect="Failed DeadlineExceeded",
        active=(None, 500),
    ),
    ClockCase(
        name="goes on before it ever began",
        given=status("Accepted", "Prepared", "Suspended"),
        spec={"activeDeadlineSeconds": 600},
        child={},
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
        active=(None, 0),
    ),
    ClockCase(
        name="in a queue for longer than it has",
        given=QUEUED,
        spec={"activeDeadlineSeconds": 600},
        child={"suspend": True},
        expect="waits",
        active=(None, 500),
    ),
    ClockCase(
        name="a queue took its quota a while ago, and the operator sees it now",
        given=AT_WORK,
        spec={"activeDeadlineSeconds": 600},
        child={"suspend": True},
        expect="waits",
        active=(None, 0),
    ),
    ClockCase(
        name="admitted with what is left",
        given=QUEUED,
        spec={"activeDeadlineSeconds": 600},
        child={"resumed": NOW},
        expect="again in 30.2 s",
        active=(NOW, 500),
    ),
    ClockCase(
        name="without a limit the time is counted, too",
        given=AT_WORK,
        spec={"suspend": True},
        child={},
        expect="waits",
        active=(None, 3600),
    ),
    ClockCase(
        name="at work",
        given=AT_WORK,
        spec={},
        child={"restarts": 0},
        expect="waits",
        active=(BEGIN, 0),
    ),
    ClockCase(
        name="at its end",
        given=AT_WORK,
        spec={},
        child={"state": "Complete"},
        expect="Complete Completed",
        active=(None, 3600),
    ),
]


@pytest.mark.parametrize("case", CLOCKS, ids=lambda case: case.name)
def test_only_the_time_of_work_counts(case: ClockCase) -> None:
    job = fine_tune(case.given, scheduling={"queueName": "team-a"}, **case.spec)
    children = [child(job, "run", **case.child)] if case.child else []
    decision = decided(job, *children)
    since, seconds = case.active
    assert describe(decision) == case.expect
    assert (decision.status.active_since, decision.status.active_seconds) == (since and text(since), seconds)


def test_going_on_waits_for_the_old_pods() -> None:
    job = fine_tune(status("Accepted", "Prepared", "Suspended", **BEGUN, restarts=2, restarts_charged=1))
    saving = decided(job, pods=[pod(job, "run", 1, state=RUNNING, deleting=True)])
    assert describe(saving) == "waits"
    assert said(saving, "Suspended") == "False Resumed: spec.suspend is false: the job resumes where it stopped"
    assert (
        said(saving, "Running")
        == "False WaitingForPods: waiting for the stopped pods to end: ftj-bot-run-1-0 on node-a"
    )
    assert describe(decided(job, child(job, "run", deleting=True))) == "waits"
    gone = decided(job, pods=[pod(job, "run", 1, state={"terminated": {"exitCode": 75}}, over="Failed")])
    assert describe(gone) == "repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run"


def test_going_on_keeps_the_restarts_of_shards() -> None:
    job = generate(status("Accepted", "Prepared", "Suspended", **BEGUN, restarts=5, restarts_charged=3))
    (again,) = decided(job).apply
    seen = child(job, "run", born=at(-10), notes=again["metadata"]["annotations"])
    decision = decided(job, seen, pods=[pod(job, "run", 0, 2, RUNNING, free=1)])
    assert (decision.status.restarts, decision.status.restarts_charged) == (7, 4)


def test_going_on_keeps_the_budget() -> None:
    """A suspension must not give back restarts that were charged, nor number the attempts from the beginning."""
    job = fine_tune(status("Accepted", "Prepared", "Suspended", **BEGUN, restarts=2, restarts_charged=1))
    (again,) = decided(job).apply
    assert again["spec"]["failurePolicy"]["maxRestarts"] == 2
    seen = child(job, "run", born=at(-10), notes=again["metadata"]["annotations"])
    old, new = ended(job, "run", 75, when=-30), ended(job, "run", 71, when=-5, suffix="-b")
    decision = decided(job, seen, ends=[old, new])
    assert (decision.status.restarts, decision.status.restarts_charged) == (2, 1)
    assert [(a.attempt, a.reason) for a in decision.status.attempts] == [(2, "InfrastructureError")]


BUDGETS = [
    # restarts.max, charged before    expect
    (3, 0, 3),
    (3, 3, 0),
    (0, 0, 0),
    (2, 3, 0),  # lowered meanwhile
]


@pytest.mark.parametrize(("most", "charged", "expect"), BUDGETS)
def test_what_is_left_of_the_budget(most: int, charged: int, expect: int) -> None:
    job = fine_tune(
        status("Accepted", "Prepared", "Suspended", **BEGUN, restarts=charged, restarts_charged=charged),
        restarts={"max": most},
    )
    (again,) = decided(job).apply
    assert again["spec"]["failurePolicy"]["maxRestarts"] == expect


def test_failures_before_a_suspension_are_not_those_of_the_run_after_it() -> None:
    old = [
        Attempt(phase="run", attempt=n, reason="Preempted", exit_code=75, pod=f"p{n}", step=10, time=text(at(n - 100)))
        for n in range(4)
    ]
    job = fine_tune(status("Accepted", "Prepared", **BEGUN, restarts=4, attempts=old))
    decision = decided(job, child(job, "run", born=at(-10), notes={naming.BEFORE_ANNOTATION: "4,0"}))
    assert describe(decision) == "again in 20.2 s"
    assert said(decision, "Running") == "False Starting: waiting for 2 pods on 16 GPUs to start"
    assert decision.status.attempts == old


def test_what_may_be_suspended_twice_says_it_once() -> None:
    job = fine_tune(suspend=True)
    first = decided(job)
    assert [(e.type, e.reason) for e in first.events] == [("Normal", "Suspended")]
    again = decided(job.model_copy(update={"status": first.status}))
    assert (again.status, again.events) == (first.status, ())
    assert first.status.conditions[-1].last_transition_time == text(NOW)


def test_names_of_labels_are_those_of_the_contract() -> None:
    assert naming.labels(fine_tune(), "run") == {
        "app.kubernetes.io/managed-by": "luthier",
        "luthier.dev/kind": "FineTuneJob",
        "luthier.dev/job": "bot",
        "luthier.dev/job-uid": "f00dcafe-0000-4000-8000-000000000001",
        "luthier.dev/phase": "run",
    }
