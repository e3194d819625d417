"""Reopen, as a table: a job that rests, planned or ended, goes on when its spec asks for more, and has its whole time
again.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    said,
    status,
)

from luthier_api.status import HubStatus, JobStatus
from luthier_operator.decide import decide
from luthier_operator.model import Object
from luthier_operator.statuses import text

LIMIT = {"activeDeadlineSeconds": 1800}  # over for half an hour, counted from BEGIN
SAID: dict[str, Any] = {"start_time": text(BEGIN), "metrics": {"evalLoss": 1.5}}
ENDED = SAID | {"completion_time": text(at(-1700))}
ELSEWHERE = HUB | {"repo": "org/other"}
TOKEN = HUB | {"tokenSecretRef": {"name": "another"}}
OLD = HubStatus(repo="org/bot", revision="0123", url="https://hub.example/org/bot")

PLANNED = status("Accepted", start_time=text(BEGIN), prepared=PREPARED).model_copy(
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


CASES = [
    Case(
        name="a plan that still rests",
        given=PLANNED,
        spec=LIMIT | {"planOnly": True},
        children=[("prepare", "Complete", None)],
        expect="waits",
        event="Planned",
    ),
    Case(
        name="a plan let go on after the deadline",
        given=PLANNED,
        spec=LIMIT,
        children=[("prepare", "Complete", None)],
        expect="applies JobSet ftj-bot-run; again in 1800 s",
        event="Starting",
    ),
    Case(
        name="the upload failed, another hub after the deadline",
        given=NO_TOKEN,
        spec=LIMIT | {"hub": ELSEWHERE},
        children=[RUN, ("publish", "Failed", HUB)],
        expect="deletes Job ftj-bot-publish; again in 1800 s",
        event="Publishing",
    ),
    Case(
        name="the upload failed, the hub is the same",
        given=NO_TOKEN,
        spec={"activeDeadlineSeconds": 99999, "hub": HUB},
        children=[RUN, ("publish", "Failed", HUB)],
        expect="Failed Unauthorized",
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
        expect="applies JobSet ftj-bot-run; again in 7200 s",
        event="Starting",
    ),
    Case(
        name="at its deadline, later, but that is over, too",
        given=AT_LIMIT,
        spec={"activeDeadlineSeconds": 2000},
        children=[],
        expect="applies JobSet ftj-bot-run; again in 2000 s",
        event="Starting",
    ),
    Case(
        name="at its deadline, now none",
        given=AT_LIMIT,
        spec={},
        children=[],
        expect="applies JobSet ftj-bot-run",
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
        children=[RUN],
        expect="applies ConfigMap ftj-bot, Job ftj-bot-publish; again in 7200 s",
        event="Publishing",
    ),
    Case(
        name="uploading at its deadline, only another hub",
        given=UPLOAD_AT_LIMIT,
        spec=LIMIT | {"hub": ELSEWHERE},
        children=[RUN],
        expect="Failed DeadlineExceeded",
        event="Failed",
    ),
    Case(
        name="complete, and nothing to publish",
        given=COMPLETE,
        spec=LIMIT,
        children=[RUN],
        expect="Complete Complete",
        event="Complete",
    ),
    Case(
        name="complete, and now to be published",
        given=COMPLETE,
        spec=LIMIT | {"hub": HUB},
        children=[RUN],
        expect="applies ConfigMap ftj-bot, Job ftj-bot-publish; again in 1800 s",
        event="Publishing",
    ),
    Case(
        name="complete, a token alone",
        given=COMPLETE,
        spec={"hub": {"tokenSecretRef": {"name": "hf"}}},
        children=[RUN],
        expect="Complete Complete",
        event="Complete",
    ),
    Case(
        name="published",
        given=PUBLISHED,
        spec=LIMIT | {"hub": HUB},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="Complete Complete",
        event="Complete",
    ),
    Case(
        name="published, its Job is gone",
        given=PUBLISHED,
        spec=LIMIT | {"hub": HUB},
        children=[RUN],
        expect="Complete Complete",
        event="Complete",
    ),
    Case(
        name="published, now wanted nowhere",
        given=PUBLISHED,
        spec=LIMIT,
        children=[RUN, ("publish", "Complete", HUB)],
        expect="Complete Complete",
        event="Complete",
    ),
    Case(
        name="published, another token alone",
        given=PUBLISHED,
        spec=LIMIT | {"hub": TOKEN},
        children=[RUN, ("publish", "Complete", HUB)],
        expect="Complete Complete",
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
    job, children = made(case.spec, case.given, case.children)
    decision = decided(job, *children)
    goes_on = case.event not in ("Failed", "Complete", "Planned")
    if goes_on:
        assert (describe(decision), decision.status.finished) == ("waits", False), (
            "the status first: what is deleted next was the reason"
        )
        assert decision.status.state in ("Starting", "Publishing")
        decision = decided(job.model_copy(update={"status": decision.status}), *children)
    assert (describe(decision), decision.status.state) == (case.expect, case.event)
    assert decision.status.deadline_start_time == (text(NOW) if goes_on else None)
    assert (decision.status.completion_time is None) == (goes_on or case.given is PLANNED)
    again = decided(job.model_copy(update={"status": decision.status}), *children)
    assert (again.status, again.events) == (decision.status, ()), "once is enough"


def test_the_clock_that_started_again_runs_out_too() -> None:
    job, children = made(LIMIT, PLANNED, [("prepare", "Complete", None)])
    for _ in range(2):
        job = fine_tune(decided(job, *children).status, **LIMIT)
    late = decide(observed(job, *children, child(job, "run")), SETTINGS, at(1800))
    assert describe(late) == "deletes JobSet ftj-bot-run; Failed DeadlineExceeded"
    assert said(late, "Running") == (
        "False DeadlineExceeded: spec.activeDeadlineSeconds: 1800 seconds have passed since 2026-03-01T12:00:00Z."
        " Checkpoints and outputs stay in the workspace; raise the limit to resume the job"
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
    assert (describe(gone), gone.status.hub) == ("applies ConfigMap ftj-bot, Job ftj-bot-publish", None)
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
