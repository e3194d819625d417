"""Reopen, as a table: a job that rests, planned or ended, resumes when its spec asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from cases.observed import (
    BEGIN,
    HUB,
    NOW,
    PREPARED,
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

from luthier_api.marks import digests
from luthier_api.status import AppliedSpec, Attempt, Checkpoint, HubRequest, HubStatus, JobStatus
from luthier_operator import naming
from luthier_operator.decide import decide
from luthier_operator.model import Object
from luthier_operator.render.job import hub_hash, hub_target
from luthier_operator.statuses import text
from luthier_operator.versions import RELEASE

LIMIT = {"activeDeadlineSeconds": 1800}
SAID: dict[str, Any] = {"start_time": text(BEGIN), "active_seconds": 1800, "metrics": {"evalLoss": 1.5}}
ENDED = SAID | {"completion_time": text(at(-1700)), "restarts": 3, "restarts_charged": 3}
ELSEWHERE = HUB | {"repo": "org/other"}
TOKEN = HUB | {"tokenSecretRef": {"name": "another"}}
OLD = HubStatus(repo="org/bot", revision="0123", url="https://hub.example/org/bot")

PLANNED = status("Accepted", start_time=text(BEGIN), active_seconds=600, prepared=PREPARED).model_copy(
    update={
        "conditions": [
            c.model_copy(update={"reason": "PlanOnly"} if c.type == "Prepared" else {})
            for c in status("Accepted", "Prepared").conditions
        ]
    }
)
AT_LIMIT = status("Accepted", "Prepared", "Failed", false={"Running": "DeadlineExceeded"}, **ENDED)
UPLOAD_AT_LIMIT = status("Accepted", "Prepared", "Trained", "Failed", false={"Published": "DeadlineExceeded"}, **ENDED)
NO_TOKEN = status("Accepted", "Prepared", "Trained", "Failed", false={"Published": "Unauthorized"}, **ENDED)
MISTAKE = status("Accepted", "Failed", false={"Prepared": "InvalidDataset"}, **ENDED)
COMPLETE = status("Accepted", "Prepared", "Trained", "Complete", **ENDED)
PUBLISHED = status("Accepted", "Prepared", "Trained", "Published", "Complete", **ENDED, hub=OLD)


def failed(reason: str, given: JobStatus) -> JobStatus:
    """With this reason on the condition Failed."""
    return given.model_copy(
        update={
            "conditions": [
                c.model_copy(update={"reason": reason} if c.type == "Failed" else {}) for c in given.conditions
            ]
        }
    )


AT_LIMIT, UPLOAD_AT_LIMIT = (failed("DeadlineExceeded", s) for s in (AT_LIMIT, UPLOAD_AT_LIMIT))
NO_TOKEN = failed("Unauthorized", NO_TOKEN)
TOO_LONG = failed("Diverged", AT_LIMIT)
OUT_OF_MEMORY = failed("HostOutOfMemory", AT_LIMIT)
MISTAKE = failed("InvalidDataset", MISTAKE)

MADE_FROM = fine_tune(hub=HUB)
REQUEST = HubRequest(target=hub_target(MADE_FROM), hash=hub_hash(MADE_FROM))

# A child: phase, its end, and the spec.hub that it was made from.
Child = tuple[str, str, Object | None]
RUN: Child = ("run", "Complete", None)


@dataclass(frozen=True)
class Case:
    name: str
    given: JobStatus
    spec: dict[str, Any]
    children: list[Child]
    expect: str
    event: str
    before: dict[str, Any] = field(default_factory=dict)
    """The part of the spec with which the job was last at work, as far as it differs from `spec`."""


MEMORY = {"resources": {"nodes": 2, "gpusPerNode": 8, "memory": "64Gi"}}
AGAIN = "repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run"
PREPARE_AGAIN = "applies ConfigMap ftj-bot, PersistentVolumeClaim ftj-bot, Job ftj-bot-prepare"
CASES = [
    Case(
        name="out of memory, and now there is more",
        given=OUT_OF_MEMORY,
        spec=MEMORY,
        children=[("run", "Failed", None)],
        expect="deletes JobSet ftj-bot-run",
        event="Pending",
    ),
    Case(
        name="out of memory, and now there is more; its JobSet is gone",
        given=OUT_OF_MEMORY,
        spec=MEMORY,
        children=[],
        expect=AGAIN,
        event="Starting",
    ),
    Case(
        name="to be tried again as it is",
        given=TOO_LONG,
        spec={"retry": 1},
        children=[],
        expect=AGAIN,
        event="Starting",
    ),
    Case(
        name="more restarts",
        given=TOO_LONG,
        spec={"restarts": {"max": 9}},
        children=[],
        expect=AGAIN,
        event="Starting",
    ),
    Case(
        name="other nodes",
        given=TOO_LONG,
        spec={"scheduling": {"nodeSelector": {"gpu": "h100"}}},
        children=[],
        expect=AGAIN,
        event="Starting",
    ),
    Case(
        name="other nodes no longer asked for",
        given=TOO_LONG,
        spec={},
        before={"scheduling": {"nodeSelector": {"gpu": "h100"}}},
        children=[],
        expect=AGAIN,
        event="Starting",
    ),
    Case(
        name="smaller batches have to be planned",
        given=TOO_LONG,
        spec={"training": {"microBatchSize": 1, "batchSize": 16}},
        before={"training": {"batchSize": 16}},
        children=[("prepare", "Complete", None)],
        expect="deletes Job ftj-bot-prepare",
        event="Pending",
    ),
    Case(
        name="another strategy has to be planned; the Job of prepare is gone",
        given=TOO_LONG,
        spec={"strategy": "zero3"},
        children=[],
        expect=PREPARE_AGAIN,
        event="Preparing",
    ),
    Case(
        name="the data were repaired",
        given=MISTAKE,
        spec={"retry": 1},
        children=[("prepare", "Failed", None)],
        expect="deletes Job ftj-bot-prepare",
        event="Pending",
    ),
    Case(
        name="the token to read with was repaired",
        given=failed("Unauthorized", MISTAKE),
        spec={"hub": TOKEN},
        before={"hub": HUB},
        children=[],
        expect=PREPARE_AGAIN,
        event="Preparing",
    ),
    Case(
        name="the training diverged, and only the Hub is another",
        given=TOO_LONG,
        spec={"hub": ELSEWHERE},
        before={"hub": HUB},
        children=[],
        expect="Failed Diverged",
        event="Failed",
    ),
    Case(
        name="a field of the life cycle alone",
        given=TOO_LONG,
        spec={"ttlSecondsAfterFinished": 99999},
        children=[],
        expect="Failed Diverged; again in 98299 s",
        event="Failed",
    ),
    Case(
        name="failed, changed, and suspended",
        given=OUT_OF_MEMORY,
        spec=MEMORY | {"suspend": True},
        children=[],
        expect="waits",
        event="Suspended",
    ),
    Case(
        name="a plan, and another strategy",
        given=PLANNED,
        spec={"planOnly": True, "strategy": "zero3"},
        children=[],
        expect=PREPARE_AGAIN,
        event="Preparing",
    ),
    Case(
        name="complete, and a field of the circumstances",
        given=COMPLETE,
        spec=MEMORY,
        children=[RUN],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="a plan that still rests",
        given=PLANNED,
        spec=LIMIT | {"planOnly": True},
        children=[("prepare", "Complete", None)],
        expect="waits",
        event="Planned",
    ),
    Case(
        name="a plan let go on has what is left of its time",
        given=PLANNED,
        spec=LIMIT,
        children=[("prepare", "Complete", None)],
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run; again in 1200 s",
        event="Starting",
    ),
    Case(
        name="the upload failed, another hub after the deadline",
        given=NO_TOKEN,
        spec=LIMIT | {"hub": ELSEWHERE},
        before={"hub": HUB},
        children=[RUN, ("publish", "Failed", HUB)],
        expect="deletes Job ftj-bot-publish; again in 1800 s",
        event="Pending",
    ),
    Case(
        name="the upload failed, the hub is the same",
        given=NO_TOKEN,
        spec={"activeDeadlineSeconds": 99999, "hub": HUB},
        before={"hub": HUB},
        children=[RUN, ("publish", "Failed", HUB)],
        expect="Failed Unauthorized; again in 84700 s",
        event="Failed",
    ),
    Case(
        name="at its deadline, the same",
        given=AT_LIMIT,
        spec=LIMIT,
        children=[],
        expect="Failed DeadlineExceeded",
        event="Failed",
    ),
    Case(
        name="at its deadline, now an earlier one",
        given=AT_LIMIT,
        spec={"activeDeadlineSeconds": 60},
        children=[],
        expect="Failed DeadlineExceeded",
        event="Failed",
    ),
    Case(
        name="at its deadline, now a later one",
        given=AT_LIMIT,
        spec={"activeDeadlineSeconds": 7200},
        children=[],
        expect=f"{AGAIN}; again in 5400 s",
        event="Starting",
    ),
    Case(
        name="at its deadline, now a little later",
        given=AT_LIMIT,
        spec={"activeDeadlineSeconds": 2000},
        children=[],
        expect=f"{AGAIN}; again in 200 s",
        event="Starting",
    ),
    Case(
        name="at its deadline, now none",
        given=AT_LIMIT,
        spec={},
        children=[],
        expect=AGAIN,
        event="Starting",
    ),
    Case(
        name="diverged, and a later deadline",
        given=TOO_LONG,
        spec={"activeDeadlineSeconds": 7200},
        children=[],
        expect="Failed Diverged",
        event="Failed",
    ),
    Case(
        name="uploading at its deadline, a later one",
        given=UPLOAD_AT_LIMIT,
        spec={"activeDeadlineSeconds": 7200, "hub": HUB},
        before={"hub": HUB},
        children=[RUN],
        expect="repairs ConfigMap ftj-bot; applies Job ftj-bot-publish; again in 5400 s",
        event="Publishing",
    ),
    Case(
        name="uploading at its deadline, only another hub",
        given=UPLOAD_AT_LIMIT,
        spec=LIMIT | {"hub": ELSEWHERE},
        before={"hub": HUB},
        children=[RUN],
        expect="Failed DeadlineExceeded; again in 84700 s",
        event="Failed",
    ),
    Case(
        name="complete, and nothing to publish",
        given=COMPLETE,
        spec=LIMIT,
        children=[RUN],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="complete, and now to be published",
        given=COMPLETE,
        spec=LIMIT | {"hub": HUB},
        children=[RUN],
        expect="repairs ConfigMap ftj-bot; applies Job ftj-bot-publish; again in 1800 s",
        event="Publishing",
    ),
    Case(
        name="complete, a token alone",
        given=COMPLETE,
        spec={"hub": {"tokenSecretRef": {"name": "hf"}}},
        children=[RUN],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="published",
        given=PUBLISHED,
        spec=LIMIT | {"hub": HUB},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="published, its Job is gone",
        given=PUBLISHED,
        spec=LIMIT | {"hub": HUB},
        children=[RUN],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="published long ago, now wanted elsewhere",
        given=PUBLISHED.model_copy(update={"hub_request": REQUEST}),
        spec={"hub": ELSEWHERE},
        children=[],
        expect="repairs ConfigMap ftj-bot; applies Job ftj-bot-publish",
        event="Publishing",
    ),
    Case(
        name="published long ago, and nothing has changed",
        given=PUBLISHED.model_copy(update={"hub_request": REQUEST}),
        spec={"hub": HUB},
        children=[],
        expect="Complete Complete",
        event="Complete",
    ),
    Case(
        name="published long ago, now only to be planned",
        given=PUBLISHED.model_copy(update={"hub_request": REQUEST}),
        spec={"hub": ELSEWHERE, "planOnly": True},
        children=[],
        expect="repairs ConfigMap ftj-bot; applies Job ftj-bot-publish",
        event="Publishing",
    ),
    Case(
        name="published, now wanted nowhere",
        given=PUBLISHED,
        spec=LIMIT,
        children=[RUN, ("publish", "Complete", HUB)],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="published, another token alone",
        given=PUBLISHED,
        spec=LIMIT | {"hub": TOKEN},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="Complete Complete; again in 84700 s",
        event="Complete",
    ),
    Case(
        name="published, now wanted elsewhere",
        given=PUBLISHED,
        spec=LIMIT | {"hub": ELSEWHERE},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="deletes Job ftj-bot-publish; again in 1800 s",
        event="Publishing",
    ),
    Case(
        name="wanted elsewhere, but to be deleted first",
        given=PUBLISHED,
        spec={"ttlSecondsAfterFinished": 0, "hub": ELSEWHERE},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="deletes Job ftj-bot-publish",
        event="Publishing",
    ),
    Case(
        name="wanted elsewhere, and suspended",
        given=PUBLISHED,
        spec={"suspend": True, "hub": ELSEWHERE},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="waits",
        event="Suspended",
    ),
]


def made(spec: dict[str, Any], given: JobStatus, there: list[Child]) -> tuple[Any, list[Object]]:
    """The job, and its children: the publish Job as it was made from the spec.hub of that time."""
    job = fine_tune(given, **spec)
    return job, [
        child(fine_tune(hub=hub) if hub else job, phase, state, since=at(-1750)) for phase, state, hub in there
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_lets_a_job_go_on(case: Case) -> None:
    before = AppliedSpec(generation=0, fields=digests(fine_tune(**case.before).spec))
    given = case.given.model_copy(update={"applied_spec": before})
    job, children = made(case.spec, given, case.children)
    decision = decided(job, *children)
    goes_on = case.event not in ("Failed", "Complete", "Planned")
    if goes_on:
        assert (describe(decision), decision.status.finished) == ("waits", False), (
            "the status first: what is deleted next was the reason"
        )
        decision = decided(job.model_copy(update={"status": decision.status}), *children)
    assert (describe(decision), decision.status.state) == (case.expect, case.event)
    assert decision.status.active_since == (text(NOW) if goes_on and not job.spec.suspend else None)
    assert (decision.status.completion_time is None) == (goes_on or case.given is PLANNED)
    again = decided(job.model_copy(update={"status": decision.status}), *children)
    assert (again.status, again.events) == (decision.status, ()), "once is enough"


def test_another_version_of_the_operator_takes_no_failure_back() -> None:
    """It may have other defaults, and then other hashes, of a spec that nobody has changed."""
    before = AppliedSpec(generation=1, fields={"scheduling": "0123"})
    assert describe(decided(fine_tune(TOO_LONG.model_copy(update={"applied_spec": before})))) == "Failed Diverged"


def test_hashes_of_another_version_of_the_operator_are_made_anew() -> None:
    """Else they would be compared with those of this version when the spec changes."""
    before = AppliedSpec(generation=1, fields={"scheduling": "0123"}, written_by="0.0.1")
    running = status("Accepted", "Prepared", "Running", start_time=text(BEGIN), applied_spec=before)
    applied = decided(fine_tune(running), child(fine_tune(), "run")).status.applied_spec
    assert applied == AppliedSpec(generation=1, fields=digests(fine_tune().spec), written_by=RELEASE)


def test_a_resumed_run_has_new_numbers_and_a_new_budget() -> None:
    """The JobSet had used up its restarts, and its last attempt had the number of the last restart."""
    attempts = [
        Attempt(phase="run", attempt=n, reason="TrainingError", pod=f"p{n}", step=350, time=text(at(n - 100)))
        for n in range(4)
    ]
    failed_run = OUT_OF_MEMORY.model_copy(
        update={"attempts": attempts, "applied_spec": AppliedSpec(generation=0), "checkpoint": Checkpoint(step=350)}
    )
    old = child(fine_tune(), "run", "Failed", restarts=3, charged=3)
    resumed = decided(fine_tune(failed_run, **MEMORY), old)
    assert [(e.reason, e.message) for e in resumed.events] == [
        ("Resumed", "spec.resources.memory has changed: the job resumes where it stopped")
    ]
    assert describe(decided(fine_tune(resumed.status, **MEMORY), old)) == "deletes JobSet ftj-bot-run"
    again = decided(fine_tune(resumed.status, **MEMORY))
    config, (made_again,) = again.repair, again.apply
    assert config["kind"] == "ConfigMap"
    assert made_again["metadata"]["annotations"] == {naming.BEFORE_ANNOTATION: "4,0", naming.RESUMES_ANNOTATION: "1"}
    assert made_again["spec"]["failurePolicy"]["maxRestarts"] == 3
    job = fine_tune(resumed.status, **MEMORY)
    notes = made_again["metadata"]["annotations"]
    ends = [ended(job, "run", 71, when=-5, suffix="-b")]
    decision = decided(job, child(job, "run", born=at(-10), notes=notes), ends=ends)
    assert [a.attempt for a in decision.status.attempts] == [0, 1, 2, 3, 4]
    assert (decision.status.restarts, decision.status.restarts_charged, decision.status.resumes) == (4, 0, 1)


def test_another_plan_is_not_taken_for_the_one_that_was_asked_for() -> None:
    """The pod of the earlier `prepare` is still known; its plan had another strategy."""
    planned = PLANNED.model_copy(update={"applied_spec": AppliedSpec(generation=0)})
    spec = {"strategy": "zero3", "planOnly": True}
    job = fine_tune(planned, **spec)
    old = prepared_end(job)
    first = decided(job, child(job, "prepare", "Complete"), ends=[old])
    assert (first.status.prepared, first.status.resumes) == (None, 1)
    going = decided(fine_tune(first.status, **spec), child(job, "prepare", "Complete"), ends=[old])
    gone = decided(fine_tune(going.status, **spec), ends=[old])
    assert (describe(gone), gone.status.prepared) == (PREPARE_AGAIN, None)
    notes = gone.apply[-1]["metadata"]["annotations"]
    again = decided(fine_tune(gone.status, **spec), child(job, "prepare", "Complete", notes=notes), ends=[old])
    assert said(again, "Prepared").startswith("True PlanOnly")


@dataclass(frozen=True)
class AtWorkCase:
    name: str
    spec: dict[str, Any]
    expect: str


AT_WORK = [
    AtWorkCase(
        name="a change that the operator sees only after the suspension is over",
        spec=MEMORY,
        expect="deletes JobSet ftj-bot-run",
    ),
    AtWorkCase(
        name="a budget is read when the next run is created",
        spec={"restarts": {"max": 9}},
        expect="waits",
    ),
    AtWorkCase(
        name="another Hub is for the upload",
        spec={"hub": HUB},
        expect="waits",
    ),
]


@pytest.mark.parametrize("case", AT_WORK, ids=lambda case: case.name)
def test_pods_never_go_on_with_other_fields_than_the_spec_has(case: AtWorkCase) -> None:
    running = status("Accepted", "Prepared", "Running", start_time=text(BEGIN), applied_spec=AppliedSpec(generation=0))
    at_work = child(fine_tune(), "run")
    first = decided(fine_tune(running, **case.spec), at_work)
    assert first.status.applied_spec == AppliedSpec(
        generation=1, fields=digests(fine_tune(**case.spec).spec), written_by=RELEASE
    )
    assert describe(decided(fine_tune(first.status, **case.spec), at_work)) == case.expect


def test_the_clock_that_started_again_runs_out_too() -> None:
    job, children = made(LIMIT, PLANNED, [("prepare", "Complete", None)])
    for _ in range(2):
        job = fine_tune(decided(job, *children).status, **LIMIT)
    late = decide(observed(job, *children, child(job, "run")), SETTINGS, at(1200))
    assert describe(late) == "deletes JobSet ftj-bot-run; Failed DeadlineExceeded"
    assert said(late, "Running") == (
        "False DeadlineExceeded: spec.activeDeadlineSeconds: the job was at work for 1800 seconds. Checkpoints and"
        " outputs stay in the workspace; raise the limit to resume the job"
    )


def test_another_place_is_published_to_and_told_of() -> None:
    """What the first upload had said must not stand for the second."""
    job, children = made({"hub": ELSEWHERE}, PUBLISHED, [RUN, ("publish", "Complete", HUB)])
    old = ended(job, "publish", 0, hub=OLD, when=-3000)
    opened = decided(job, *children, ends=[old])
    assert (said(opened, "Complete"), said(opened, "Published"), opened.status.hub) == (
        "False Publishing: spec.hub has changed: publishing again",
        "False Publishing: spec.hub has changed: publishing again",
        None,
    )
    assert [(e.type, e.reason) for e in opened.events] == [("Normal", "Publishing")]
    assert (
        describe(decided(fine_tune(opened.status, hub=ELSEWHERE), *children, ends=[old]))
        == "deletes Job ftj-bot-publish"
    )
    leaving = decided(
        fine_tune(opened.status, hub=ELSEWHERE),
        children[0],
        children[1] | {"metadata": children[1]["metadata"] | {"deletionTimestamp": text(NOW)}},
        ends=[old],
    )
    assert (describe(leaving), leaving.status.hub) == ("waits", None)
    gone = decided(fine_tune(leaving.status, hub=ELSEWHERE), children[0], ends=[old])
    assert (describe(gone), gone.status.hub) == ("repairs ConfigMap ftj-bot; applies Job ftj-bot-publish", None)
    job = fine_tune(gone.status, hub=ELSEWHERE)
    there = hub_end(job)
    assert there.message is not None
    assert there.message.hub is not None
    new = decided(job, children[0], child(job, "publish", "Complete", born=at(-600)), ends=[there])
    assert (describe(new), new.status.hub, new.status.state) == ("Complete Completed", there.message.hub, "Complete")


def test_an_upload_to_the_old_place_is_none_to_the_new_one() -> None:
    """spec.hub changed in the moment in which the upload ended."""
    given = status("Accepted", "Prepared", "Trained", false={"Published": "Publishing"}, **SAID)
    job, children = made({"hub": ELSEWHERE}, given, [RUN, ("publish", "Complete", HUB)])
    decision = decided(job, *children, ends=[ended(job, "publish", 0, hub=OLD)])
    assert (describe(decision), decision.status.hub) == ("deletes Job ftj-bot-publish", None)


def test_more_time_is_told_of() -> None:
    decision = decided(fine_tune(AT_LIMIT))
    assert [(e.type, e.reason, e.message) for e in decision.events][-1:] == [
        ("Normal", "Resumed", "spec.activeDeadlineSeconds was raised: the job resumes where it stopped")
    ]
