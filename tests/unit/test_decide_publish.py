"""Publish, as a table: a Hub that is away costs time, a wrong token costs a change of spec.hub, neither costs the
result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from cases.observed import (
    BEGIN,
    HUB,
    NOW,
    RUNNING,
    SETTINGS,
    at,
    child,
    decided,
    describe,
    ended,
    fine_tune,
    generate,
    hub_end,
    observed,
    pod,
    run_document,
    said,
    status,
    waiting,
)

from luthier_api.marks import digests
from luthier_api.status import AppliedSpec
from luthier_operator.decide import decide
from luthier_operator.model import Object
from luthier_operator.render.job import hub_hash
from luthier_operator.statuses import text

TRAINED = status("Accepted", "Prepared", "Trained", start_time=text(BEGIN), metrics={"evalLoss": 1.5})
OTHER_HUB = HUB | {"tokenSecretRef": {"name": "better"}}
JOB = fine_tune(TRAINED, hub=HUB)
RUN = child(JOB, "run", "Complete")
TOKEN = "401 from hub.example. Check the token in hub.tokenSecretRef"
KEPT = "The result stays in ftj-bot-f00dcafe/result of claim ftj-bot; change spec.hub to publish it again"


def situation(*children: Object, **more: Any) -> Any:
    return (more.pop("job", JOB), (RUN, *children), more)


@dataclass(frozen=True)
class Case:
    name: str
    given: Any
    expect: str
    condition: str


CASES = [
    Case(
        name="no repository",
        given=situation(job=fine_tune(TRAINED)),
        expect="Complete Completed",
        condition="absent",
    ),
    Case(
        name="a token alone",
        given=situation(job=fine_tune(TRAINED, hub={"tokenSecretRef": {"name": "hf"}})),
        expect="Complete Completed",
        condition="absent",
    ),
    Case(
        name="trained",
        given=situation(),
        expect="repairs ConfigMap ftj-bot; applies Job ftj-bot-publish",
        condition="False Publishing: a pod uploads to org/bot",
    ),
    Case(
        name="its pod runs",
        given=situation(child(JOB, "publish"), pods=[pod(JOB, "publish", state=RUNNING)]),
        expect="waits",
        condition="False Publishing: a pod uploads to org/bot",
    ),
    Case(
        name="the secret is missing",
        given=situation(
            child(JOB, "publish"),
            pods=[pod(JOB, "publish", state=waiting("CreateContainerConfigError", 'secret "hf" not found'))],
        ),
        expect="waits",
        condition='False Misconfigured: spec.hub.tokenSecretRef: secret "hf" not found (pod ftj-bot-publish-0-0)',
    ),
    Case(
        name="the Hub is away",
        given=situation(child(JOB, "publish"), ends=[ended(JOB, "publish", 69, message="503 from hub.example")]),
        expect="waits",
        condition=(
            "False HubUnavailable: 503 from hub.example (publish, pod ftj-bot-publish-0-0 on node-a, exit code 69)."
            " It will be retried"
        ),
    ),
    Case(
        name="the token is wrong",
        given=situation(child(JOB, "publish", "Failed"), ends=[ended(JOB, "publish", 77, message=TOKEN)]),
        expect="Failed Unauthorized",
        condition=f"False Unauthorized: {TOKEN} (publish, pod ftj-bot-publish-0-0 on node-a, exit code 77). {KEPT}",
    ),
    Case(
        name="failed a moment ago",
        given=situation(child(JOB, "publish", "Failed", since=at(-1))),
        expect="again in 3 s",
        condition="absent",
    ),
    Case(
        name="published",
        given=situation(child(JOB, "publish", "Complete"), ends=[hub_end(JOB)]),
        expect="Complete Completed",
        condition="True Published: org/bot@abcdef012345",
    ),
    Case(
        name="published a moment ago, its pod has not been heard of",
        given=situation(child(JOB, "publish", "Complete", since=at(-1))),
        expect="again in 3 s",
        condition="absent",
    ),
    Case(
        name="published, and what it said is lost",
        given=situation(child(JOB, "publish", "Complete")),
        expect="Complete Completed",
        condition="True Published: org/bot",
    ),
    Case(
        name="spec.hub changes while it tries",
        given=situation(child(JOB, "publish"), job=fine_tune(TRAINED, hub=OTHER_HUB)),
        expect="deletes Job ftj-bot-publish",
        condition="False Publishing: spec.hub has changed: publishing again",
    ),
    Case(
        name="spec.hub goes while it tries",
        given=situation(child(JOB, "publish"), job=fine_tune(TRAINED)),
        expect="deletes Job ftj-bot-publish; Complete Completed",
        condition="absent",
    ),
    Case(
        name="the old upload still leaves",
        given=situation(child(JOB, "publish", deleting=True)),
        expect="waits",
        condition="False WaitingForPods: waiting for the stopped pods to end",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_publish(case: Case) -> None:
    job, children, more = case.given
    decision = decided(job, *children, **more)
    assert describe(decision) == case.expect
    assert said(decision, "Published") == case.condition


FAILED = decided(JOB, RUN, child(JOB, "publish", "Failed"), ends=[ended(JOB, "publish", 77, message=TOKEN)]).status


@dataclass(frozen=True)
class HashCase:
    name: str
    hub: Object
    expect: str


HASHES = [
    HashCase(
        name="what was set",
        hub=HUB,
        expect="22fb2f809da21f47",
    ),
    HashCase(
        name="the same, with what is the default",
        hub=HUB | {"private": True, "branch": "main", "tokenSecretRef": {"name": "hf", "key": "token"}},
        expect="22fb2f809da21f47",
    ),
    HashCase(
        name="another branch",
        hub=HUB | {"branch": "next"},
        expect="c82b589ab075fae8",
    ),
    HashCase(
        name="another token",
        hub=OTHER_HUB,
        expect="7ef9f8bb05935980",
    ),
]


@pytest.mark.parametrize("case", HASHES, ids=lambda case: case.name)
def test_the_hash_of_the_hub_is_of_what_the_user_has_set(case: HashCase) -> None:
    """Written down, because it lies in clusters: a version with one field more must not take every old failure back."""
    assert hub_hash(fine_tune(hub=case.hub)) == case.expect


def test_a_failed_upload_stays_failed() -> None:
    assert FAILED.completion_time == text(NOW)
    job = fine_tune(FAILED, hub=HUB)
    later = decide(observed(job, RUN, child(JOB, "publish", "Failed")), SETTINGS, at(60))
    assert (describe(later), later.events) == ("Failed Unauthorized; again in 86340 s", ())
    assert later.status == FAILED


APPLIED = AppliedSpec(generation=0, fields=digests(JOB.spec))
TO_BE_REPAIRED = FAILED.model_copy(update={"applied_spec": APPLIED})


@pytest.mark.parametrize("kept", [True, False], ids=["its Job is still there", "its Job is gone"])
def test_a_change_of_the_hub_takes_the_failure_back(kept: bool) -> None:
    before = [RUN, *([child(JOB, "publish", "Failed")] if kept else [])]
    decision = decided(fine_tune(TO_BE_REPAIRED, hub=OTHER_HUB), *before)
    assert said(decision, "Failed") == "False Resumed: spec.hub has changed: the job resumes where it stopped"
    assert (decision.status.completion_time, decision.status.state) == (None, "Publishing")
    job = fine_tune(decision.status, hub=OTHER_HUB)
    if kept:
        assert describe(decided(job, *before)) == "deletes Job ftj-bot-publish"
        assert describe(decided(job, RUN, child(JOB, "publish", "Failed", deleting=True))) == "waits"
    gone = decided(job, RUN)
    assert describe(gone) == "repairs ConfigMap ftj-bot; applies Job ftj-bot-publish"
    assert run_document(gone.repair)["spec"]["hub"]["tokenSecretRef"]["name"] == "better"


def test_without_a_hub_the_failure_is_taken_back_too() -> None:
    job = fine_tune(decided(fine_tune(TO_BE_REPAIRED), RUN, child(JOB, "publish", "Failed")).status)
    decision = decided(job, RUN, child(JOB, "publish", "Failed"))
    assert (describe(decision), decision.status.state) == (
        "deletes Job ftj-bot-publish; Complete Completed",
        "Complete",
    )
    assert said(decision, "Published") == "absent"


def test_a_hub_that_is_away_warns_once() -> None:
    ends = [ended(JOB, "publish", 69, message="503", when=-90, suffix="-a")]
    first = decided(JOB, RUN, child(JOB, "publish"), ends=ends)
    assert [(e.type, e.reason) for e in first.events] == [("Warning", "PublishFailed")]
    ends.append(ended(JOB, "publish", 69, message="503", when=-30, suffix="-b"))
    assert decided(fine_tune(first.status, hub=HUB), RUN, child(JOB, "publish"), ends=ends).events == ()
    assert first.status.state == "HubUnavailable"


def test_images_are_published_by_their_shards_manifests() -> None:
    job = generate(status("Accepted", "Prepared", "Generated"), hub=HUB)
    assert (
        describe(decided(job, child(job, "run", "Complete")))
        == "repairs ConfigMap gj-lutes; applies Job gj-lutes-publish"
    )
