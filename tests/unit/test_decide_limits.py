"""Deadline and suspension: what takes the pods away, and how a job goes on."""

from __future__ import annotations

from datetime import datetime

import pytest
from cases.observed import BEGIN, NOW, RUNNING, at, child, decided, describe, ended, fine_tune, generate, pod, said, status

from luthier_api.status import JobStatus, Phase
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


TEN_MINUTES = {"activeDeadlineSeconds": 600}  # over for 50 minutes now
IN_TIME, LATE = at(-3500), at(-2000)
HUB = {"hub": {"repo": "org/bot", "tokenSecret": {"name": "hf"}}}
PREPARED = status("Accepted", "Prepared", **BEGUN)
TRAINED = status("Accepted", "Prepared", **BEGUN).model_copy(update={"conditions": [
    *PREPARED.conditions, *(c.model_copy(update={"last_transition_time": text(IN_TIME)}) for c in status("Trained").conditions)]})  # fmt: skip
FATAL = {"message": "Container trainer for pod ml/x failed with exit code 82 matching FailJob rule at index 0"}
DEADLINES = [
    # given                                                what is there                          expect
    ("trained in time, looked at late",                    AT_WORK,  {},                ("run", "Complete", IN_TIME),     "Complete Completed"),
    ("trained in time, and its JobSet is gone",            TRAINED,  {},                None,                             "Complete Completed"),
    ("trained too late",                                   AT_WORK,  {},                ("run", "Complete", LATE),        "Failed DeadlineExceeded"),
    ("trained in time, the upload is still to be created", AT_WORK,  HUB,               ("run", "Complete", IN_TIME),     "Failed DeadlineExceeded"),
    ("published in time, looked at late",                  TRAINED,  HUB,               ("publish", "Complete", IN_TIME), "Complete Completed"),
    ("published too late",                                 TRAINED,  HUB,               ("publish", "Complete", LATE),    "Failed DeadlineExceeded"),
    ("still uploading",                                    TRAINED,  HUB,               ("publish", "", IN_TIME),         "deletes Job ftj-bot-publish; Failed DeadlineExceeded"),
    ("failed in time, looked at late",                     AT_WORK,  {},                ("run", "Failed", IN_TIME),       "Failed Diverged"),
    ("failed too late",                                    AT_WORK,  {},                ("run", "Failed", LATE),          "Failed DeadlineExceeded"),
    ("planned in time: it rests",                          PREPARED, {"planOnly": True}, ("prepare", "Complete", IN_TIME), "waits"),
    ("planned too late",                                   status("Accepted", **BEGUN), {"planOnly": True}, ("prepare", "Complete", LATE), "Failed DeadlineExceeded"),
    ("prepared in time, the run is still to be created",   PREPARED, {},                ("prepare", "Complete", IN_TIME), "Failed DeadlineExceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "spec", "there", "expect"), [c[1:] for c in DEADLINES], ids=[c[0] for c in DEADLINES])
def test_the_deadline_counts_while_anything_is_left_to_do(given: JobStatus, spec: Object, there: tuple[Phase, str, datetime] | None, expect: str) -> None:
    job = fine_tune(given, **TEN_MINUTES, **spec)
    found = [child(job, there[0], there[1], since=there[2], **(FATAL if there[1] == "Failed" else {}))] if there else []
    assert describe(decided(job, *found)) == expect


SUSPENDED = [
    ("before anything", fine_tune(suspend=True), [], "waits"),
    ("while it prepares", fine_tune(status("Accepted", **BEGUN), suspend=True), ["prepare"], "deletes Job ftj-bot-prepare"),
    ("while it trains", fine_tune(AT_WORK, suspend=True), ["run"], "deletes JobSet ftj-bot-run"),
    ("while it generates", generate(AT_WORK, suspend=True), ["run"], "deletes Job gj-lutes-run"),
    ("while it publishes", fine_tune(status("Accepted", "Prepared", "Trained", **BEGUN), suspend=True, hub={"repo": "org/bot", "tokenSecret": {"name": "hf"}}),
     ["publish"], "deletes Job ftj-bot-publish"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "phases", "expect"), [c[1:] for c in SUSPENDED], ids=[c[0] for c in SUSPENDED])
def test_suspending_deletes_what_is_at_work(job: object, phases: list[str], expect: str) -> None:
    decision = decided(job, *(child(job, p) for p in phases))  # type: ignore[arg-type]
    assert describe(decision) == expect
    assert decision.status.state == "Suspended"
    assert said(decision, "Running") in ("absent", "False Suspended: spec.suspend is true")


def test_a_child_that_has_ended_or_is_going_is_left_alone() -> None:
    job = fine_tune(AT_WORK, suspend=True)
    assert describe(decided(job, child(job, "prepare", "Complete"), child(job, "run", deleting=True))) == "waits"


def test_the_stop_itself_is_no_failure() -> None:
    job = fine_tune(AT_WORK, suspend=True)
    assert decided(job, child(job, "run"), ends=[ended(job, "run", 75, when=-1)]).status.attempts == []


def test_going_on_waits_for_the_old_pods() -> None:
    job = fine_tune(status("Accepted", "Prepared", "Suspended", **BEGUN, restarts=2, restarts_charged=1))
    saving = decided(job, pods=[pod(job, "run", 1, state=RUNNING, deleting=True)])
    assert describe(saving) == "waits"
    assert said(saving, "Suspended") == "False Resumed: spec.suspend is false: the job goes on where it stopped"
    assert said(saving, "Running") == "False WaitingForPods: waiting for the pods that were stopped: ftj-bot-run-1-0 on node-a"
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


def test_what_may_be_suspended_twice_says_it_once() -> None:
    job = fine_tune(suspend=True)
    first = decided(job)
    assert [(e.type, e.reason) for e in first.events] == [("Normal", "Suspended")]
    again = decided(job.model_copy(update={"status": first.status}))
    assert (again.status, again.events) == (first.status, ())
    assert first.status.conditions[-1].last_transition_time == text(NOW)


def test_names_of_labels_are_those_of_the_contract() -> None:
    assert naming.labels(fine_tune(), "run") == {
        "app.kubernetes.io/managed-by": "luthier", "luthier.dev/kind": "FineTuneJob", "luthier.dev/job": "bot",
        "luthier.dev/job-uid": "f00dcafe-0000-4000-8000-000000000001", "luthier.dev/phase": "run",
    }  # fmt: skip
