"""Reopen, as a table: a job that rests, planned or ended, goes on when its spec asks for more, and has its whole time
again.
"""

from __future__ import annotations

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
CASES: list[tuple[str, JobStatus, dict[str, Any], list[Child], str, str]] = [
    (
        "a plan that still rests",
        PLANNED,
        LIMIT | {"planOnly": True},
        [("prepare", "Complete", None)],
        "waits",
        "Planned",
    ),
    (
        "a plan let go on after the deadline",
        PLANNED,
        LIMIT,
        [("prepare", "Complete", None)],
        "applies JobSet ftj-bot-run; again in 1800 s",
        "Starting",
    ),
    (
        "the upload failed, another hub after the deadline",
        NO_TOKEN,
        LIMIT | {"hub": ELSEWHERE},
        [RUN, ("publish", "Failed", HUB)],
        "deletes Job ftj-bot-publish; again in 1800 s",
        "Publishing",
    ),
    (
        "the upload failed, the hub is the same",
        NO_TOKEN,
        {"activeDeadlineSeconds": 99999, "hub": HUB},
        [RUN, ("publish", "Failed", HUB)],
        "Failed Unauthorized",
        "Failed",
    ),
    ("at its deadline, the same", AT_LIMIT, LIMIT, [], "Failed DeadlineExceeded", "Failed"),
    (
        "at its deadline, now an earlier one",
        AT_LIMIT,
        {"activeDeadlineSeconds": 60},
        [],
        "Failed DeadlineExceeded",
        "Failed",
    ),
    (
        "at its deadline, now a later one",
        AT_LIMIT,
        {"activeDeadlineSeconds": 7200},
        [],
        "applies JobSet ftj-bot-run; again in 7200 s",
        "Starting",
    ),
    (
        "at its deadline, later, but that is over, too",
        AT_LIMIT,
        {"activeDeadlineSeconds": 2000},
        [],
        "applies JobSet ftj-bot-run; again in 2000 s",
        "Starting",
    ),
    ("at its deadline, now none", AT_LIMIT, {}, [], "applies JobSet ftj-bot-run", "Starting"),
    ("diverged, and a later deadline", TOO_LONG, {"activeDeadlineSeconds": 7200}, [], "Failed Diverged", "Failed"),
    (
        "uploading at its deadline, a later one",
        UPLOAD_AT_LIMIT,
        {"activeDeadlineSeconds": 7200, "hub": HUB},
        [RUN],
        "applies ConfigMap ftj-bot, Job ftj-bot-publish; again in 7200 s",
        "Publishing",
    ),
    (
        "uploading at its deadline, only another hub",
        UPLOAD_AT_LIMIT,
        LIMIT | {"hub": ELSEWHERE},
        [RUN],
        "Failed DeadlineExceeded",
        "Failed",
    ),
    ("complete, and nothing to publish", COMPLETE, LIMIT, [RUN], "Complete Complete", "Complete"),
    (
        "complete, and now to be published",
        COMPLETE,
        LIMIT | {"hub": HUB},
        [RUN],
        "applies ConfigMap ftj-bot, Job ftj-bot-publish; again in 1800 s",
        "Publishing",
    ),
    (
        "complete, a token alone",
        COMPLETE,
        {"hub": {"tokenSecretRef": {"name": "hf"}}},
        [RUN],
        "Complete Complete",
        "Complete",
    ),
    (
        "published",
        PUBLISHED,
        LIMIT | {"hub": HUB},
        [RUN, ("publish", "Complete", HUB)],
        "Complete Complete",
        "Complete",
    ),
    ("published, its Job is gone", PUBLISHED, LIMIT | {"hub": HUB}, [RUN], "Complete Complete", "Complete"),
    (
        "published, now wanted nowhere",
        PUBLISHED,
        LIMIT,
        [RUN, ("publish", "Complete", HUB)],
        "Complete Complete",
        "Complete",
    ),
    (
        "published, another token alone",
        PUBLISHED,
        LIMIT | {"hub": TOKEN},
        [RUN, ("publish", "Complete", HUB)],
        "Complete Complete",
        "Complete",
    ),
    (
        "published, now wanted elsewhere",
        PUBLISHED,
        LIMIT | {"hub": ELSEWHERE},
        [RUN, ("publish", "Complete", HUB)],
        "deletes Job ftj-bot-publish; again in 1800 s",
        "Publishing",
    ),
    (
        "wanted elsewhere, but to be deleted first",
        PUBLISHED,
        {"ttlSecondsAfterFinished": 0, "hub": ELSEWHERE},
        [RUN, ("publish", "Complete", HUB)],
        "deletes Job ftj-bot-publish",
        "Publishing",
    ),
    (
        "wanted elsewhere, and suspended",
        PUBLISHED,
        {"suspend": True, "hub": ELSEWHERE},
        [RUN, ("publish", "Complete", HUB)],
        "waits",
        "Suspended",
    ),
]


def made(spec: dict[str, Any], given: JobStatus, there: list[Child]) -> tuple[Any, list[Object]]:
    """The job, and its children: the publish Job as it was made from the spec.hub of that time."""
    job = fine_tune(given, **spec)
    return job, [
        child(fine_tune(hub=hub) if hub else job, phase, state, since=at(-1750)) for phase, state, hub in there
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "spec", "there", "expect", "word"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_what_lets_a_job_go_on(
    given: JobStatus, spec: dict[str, Any], there: list[Child], expect: str, word: str
) -> None:
    job, children = made(spec, given, there)
    decision = decided(job, *children)
    goes_on = word not in ("Failed", "Complete", "Planned")
    if goes_on:
        assert (describe(decision), decision.status.finished) == ("waits", False), (
            "the status first: what is deleted next was the reason"
        )
        assert decision.status.state in ("Starting", "Publishing")
        decision = decided(job.model_copy(update={"status": decision.status}), *children)
    assert (describe(decision), decision.status.state) == (expect, word)
    assert decision.status.deadline_start_time == (text(NOW) if goes_on else None)
    assert (decision.status.completion_time is None) == (goes_on or given is PLANNED)
    again = decided(job.model_copy(update={"status": decision.status}), *children)
    assert (again.status, again.events) == (decision.status, ()), "once is enough"


def test_the_clock_that_started_again_runs_out_too() -> None:
    job, children = made(LIMIT, PLANNED, [("prepare", "Complete", None)])
    for _ in range(2):
        job = fine_tune(decided(job, *children).status, **LIMIT)
    late = decide(observed(job, *children, child(job, "run")), SETTINGS, at(1800))
    assert describe(late) == "deletes JobSet ftj-bot-run; Failed DeadlineExceeded"
    assert said(late, "Running") == (
        "False DeadlineExceeded: spec.activeDeadlineSeconds: 1800 seconds have passed since 2026-03-01T12:00:00Z. "
        "What was saved stays in the workspace; a higher limit lets the job go on"
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
        ("Normal", "Resumed", "spec.activeDeadlineSeconds leaves more time: the job goes on where it stopped")
    ]
