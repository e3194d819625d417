"""Deadline and suspension: what takes the pods away, and how a job goes on."""

from __future__ import annotations

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

from luthier_api.status import Attempt, JobStatus, Phase
from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.statuses import text

BEGUN = {"start_time": text(BEGIN)}
AT_WORK = status("Accepted", "Prepared", "Running", **BEGUN)


def test_the_deadline_counts_from_the_first_phase() -> None:
    job = fine_tune(AT_WORK, activeDeadlineSeconds=3600)
    late = decided(job, child(job, "prepare", "Complete"), child(job, "run"))
    assert describe(late) == "deletes JobSet ftj-bot-run; Failed DeadlineExceeded"
    assert said(late, "Running").startswith(
        "False DeadlineExceeded: spec.activeDeadlineSeconds: 3600 seconds have passed since 2026-03-01T11:00:00Z"
    )
    early = fine_tune(AT_WORK, activeDeadlineSeconds=3700)
    assert describe(decided(early, child(early, "prepare", "Complete"), child(early, "run"))) == "again in 100 s"


NEAREST = [
    # given                                 seconds of the deadline     expect
    ("evidence before the deadline", 7200, "again in 3 s"),
    ("the deadline before evidence", 3601, "again in 1 s"),
]


@pytest.mark.parametrize(("seconds", "expect"), [c[1:] for c in NEAREST], ids=[c[0] for c in NEAREST])
def test_of_several_reasons_to_look_again_the_nearest_counts(seconds: int, expect: str) -> None:
    job = fine_tune(AT_WORK, activeDeadlineSeconds=seconds)
    assert describe(decided(job, child(job, "prepare", "Complete"), child(job, "run", "Failed", since=NOW))) == expect


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
DEADLINES = [
    # given                                                what is there                          expect
    ("trained in time, looked at late", AT_WORK, {}, ("run", "Complete", IN_TIME), "Complete Completed"),
    ("trained in time, and its JobSet is gone", TRAINED, {}, None, "Complete Completed"),
    ("trained too late", AT_WORK, {}, ("run", "Complete", LATE), "Failed DeadlineExceeded"),
    (
        "trained in time, the upload is still to be created",
        AT_WORK,
        HUB,
        ("run", "Complete", IN_TIME),
        "Failed DeadlineExceeded",
    ),
    ("published in time, looked at late", TRAINED, HUB, ("publish", "Complete", IN_TIME), "Complete Completed"),
    ("published too late", TRAINED, HUB, ("publish", "Complete", LATE), "Failed DeadlineExceeded"),
    ("still uploading", TRAINED, HUB, ("publish", "", IN_TIME), "deletes Job ftj-bot-publish; Failed DeadlineExceeded"),
    ("failed in time, looked at late", AT_WORK, {}, ("run", "Failed", IN_TIME), "Failed Diverged"),
    ("failed too late", AT_WORK, {}, ("run", "Failed", LATE), "Failed DeadlineExceeded"),
    ("planned in time: it rests", PREPARED, {"planOnly": True}, ("prepare", "Complete", IN_TIME), "waits"),
    (
        "planned too late",
        status("Accepted", **BEGUN),
        {"planOnly": True},
        ("prepare", "Complete", LATE),
        "Failed DeadlineExceeded",
    ),
    (
        "prepared in time, the run is still to be created",
        PREPARED,
        {},
        ("prepare", "Complete", IN_TIME),
        "Failed DeadlineExceeded",
    ),
]


@pytest.mark.parametrize(
    ("given", "spec", "there", "expect"), [c[1:] for c in DEADLINES], ids=[c[0] for c in DEADLINES]
)
def test_the_deadline_counts_while_anything_is_left_to_do(
    given: JobStatus, spec: Object, there: tuple[Phase, str, datetime] | None, expect: str
) -> None:
    job = fine_tune(given, **TEN_MINUTES, **spec)
    found = [child(job, there[0], there[1], since=there[2], **(FATAL if there[1] == "Failed" else {}))] if there else []
    assert describe(decided(job, *found)) == expect


SUSPENDED = [
    ("before anything", fine_tune(suspend=True), [], "waits"),
    (
        "while it prepares",
        fine_tune(status("Accepted", **BEGUN), suspend=True),
        ["prepare"],
        "deletes Job ftj-bot-prepare",
    ),
    ("while it trains", fine_tune(AT_WORK, suspend=True), ["run"], "deletes JobSet ftj-bot-run"),
    ("while it generates", generate(AT_WORK, suspend=True), ["run"], "deletes Job gj-lutes-run"),
    (
        "while it publishes",
        fine_tune(
            status("Accepted", "Prepared", "Trained", **BEGUN),
            suspend=True,
            hub={"repo": "org/bot", "tokenSecretRef": {"name": "hf"}},
        ),
        ["publish"],
        "deletes Job ftj-bot-publish",
    ),
]


@pytest.mark.parametrize(("job", "phases", "expect"), [c[1:] for c in SUSPENDED], ids=[c[0] for c in SUSPENDED])
def test_suspending_deletes_what_is_at_work(job: object, phases: list[str], expect: str) -> None:
    decision = decided(job, *(child(job, p) for p in phases))  # type: ignore[arg-type]
    assert describe(decision) == expect
    assert decision.status.state == "Suspended"
    assert said(decision, "Running") in ("absent", "False Suspended: spec.suspend is true")


HUB_SET: Object = {"hub": {"repo": "org/bot", "tokenSecretRef": {"name": "hf"}}}
DONE = status("Accepted", "Prepared", "Trained", **BEGUN)
HALTED = [
    ("preparing", status("Accepted", false={"Prepared": "Preparing"}, **BEGUN), "Prepared", "False"),
    (
        "waiting for its image to prepare",
        status("Accepted", false={"Prepared": "ImagePullFailed"}, **BEGUN),
        "Prepared",
        "False",
    ),
    ("running", AT_WORK, "Running", "False"),
    ("starting", status("Accepted", "Prepared", false={"Running": "Starting"}, **BEGUN), "Running", "False"),
    (
        "publishing",
        status("Accepted", "Prepared", "Trained", false={"Running": "Trained", "Published": "Publishing"}, **BEGUN),
        "Published",
        "False",
    ),
    (
        "publishing: the run is over, and stays so",
        status("Accepted", "Prepared", "Trained", false={"Running": "Trained", "Published": "Publishing"}, **BEGUN),
        "Running",
        "False Trained",
    ),
    ("not yet publishing", DONE, "Published", "absent"),
    ("not yet running", status("Accepted", "Prepared", **BEGUN), "Running", "absent"),
    (
        "published, its last words under way",
        status("Accepted", "Prepared", "Trained", "Published", **BEGUN),
        "Published",
        "True Published",
    ),
]


@pytest.mark.parametrize(("given", "condition", "expect"), [c[1:] for c in HALTED], ids=[c[0] for c in HALTED])
@pytest.mark.parametrize(
    ("spec", "reason"),
    [({"suspend": True}, "Suspended"), (TEN_MINUTES, "DeadlineExceeded")],
    ids=["suspended", "at the deadline"],
)
def test_no_condition_tells_of_pods_that_were_taken_away(
    given: JobStatus, condition: str, expect: str, spec: Object, reason: str
) -> None:
    decision = decided(fine_tune(given, **HUB_SET, **spec))
    assert said(decision, condition).split(":")[0] == (f"False {reason}" if expect == "False" else expect)
    end = "Suspended" if "suspend" in spec else "Completed" if given.is_true("Published") else "Failed"  # type: ignore[arg-type]
    assert [e.reason for e in decision.events] == [end], "one line tells it all"


def test_a_child_that_has_ended_or_is_going_is_left_alone() -> None:
    job = fine_tune(AT_WORK, suspend=True)
    assert describe(decided(job, child(job, "prepare", "Complete"), child(job, "run", deleting=True))) == "waits"


def test_the_stop_itself_is_no_failure() -> None:
    job = fine_tune(AT_WORK, suspend=True)
    assert decided(job, child(job, "run"), ends=[ended(job, "run", 75, when=-1)]).status.attempts == []


ASLEEP = status("Accepted", "Prepared", "Suspended", **BEGUN)
RESTS = [
    ("asleep for longer than it has", ASLEEP, True, "waits", None),
    ("goes on after that", ASLEEP, False, "applies JobSet ftj-bot-run; again in 600 s", NOW),
    (
        "goes on before it ever began",
        status("Accepted", "Suspended"),
        False,
        "applies ConfigMap ftj-bot, PersistentVolumeClaim ftj-bot, Job ftj-bot-prepare",
        None,
    ),
]


@pytest.mark.parametrize(("given", "suspend", "expect", "start"), [c[1:] for c in RESTS], ids=[c[0] for c in RESTS])
def test_the_deadline_stands_while_a_job_is_suspended_and_counts_anew_when_it_goes_on(
    given: JobStatus, suspend: bool, expect: str, start: datetime | None
) -> None:
    job = fine_tune(given, suspend=suspend, **TEN_MINUTES)
    decision = decided(job, child(job, "prepare", "Complete")) if given.is_true("Prepared") else decided(job)  # type: ignore[arg-type]
    assert describe(decision) == expect
    assert decision.status.deadline_start_time == (text(start) if start else None)


def test_going_on_waits_for_the_old_pods() -> None:
    job = fine_tune(status("Accepted", "Prepared", "Suspended", **BEGUN, restarts=2, restarts_charged=1))
    saving = decided(job, pods=[pod(job, "run", 1, state=RUNNING, deleting=True)])
    assert describe(saving) == "waits"
    assert said(saving, "Suspended") == "False Resumed: spec.suspend is false: the job goes on where it stopped"
    assert (
        said(saving, "Running")
        == "False WaitingForPods: waiting for the pods that were stopped: ftj-bot-run-1-0 on node-a"
    )
    assert describe(decided(job, child(job, "run", deleting=True))) == "waits"
    gone = decided(job, pods=[pod(job, "run", 1, state={"terminated": {"exitCode": 75}}, over="Failed")])
    assert describe(gone) == "applies JobSet ftj-bot-run"


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
