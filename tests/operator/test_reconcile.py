"""One reconcile: what is written, and what is not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from fake_api import Refused, merged
from fake_cluster import FakeCluster
from harness import condition, condition_with, fine_tune, finished, running, until

from luthier_api.kinds import JobKind
from luthier_operator.model import Key
from luthier_operator.reconcile import InvalidSpec, invalid_status, merge_patch, read_job


@dataclass(frozen=True)
class PatchCase:
    name: str
    before: dict[str, Any]
    after: dict[str, Any]
    expect: dict[str, Any]


PATCHES = [
    PatchCase(
        name="nothing changed",
        before={"a": 1},
        after={"a": 1},
        expect={},
    ),
    PatchCase(
        name="a new field",
        before={},
        after={"a": 1},
        expect={"a": 1},
    ),
    PatchCase(
        name="another value",
        before={"a": 1, "b": 2},
        after={"a": 3, "b": 2},
        expect={"a": 3},
    ),
    PatchCase(
        name="gone",
        before={"a": 1, "b": 2},
        after={"b": 2},
        expect={"a": None},
    ),
    PatchCase(
        name="deep",
        before={"a": {"b": 1, "c": 2}},
        after={"a": {"b": 1, "c": 3}},
        expect={"a": {"c": 3}},
    ),
    PatchCase(
        name="deep and gone",
        before={"a": {"b": 1, "c": 2}},
        after={"a": {"b": 1}},
        expect={"a": {"c": None}},
    ),
    PatchCase(
        name="lists are replaced",
        before={"a": [1, 2]},
        after={"a": [1]},
        expect={"a": [1]},
    ),
    PatchCase(
        name="a map for a value",
        before={"a": 1},
        after={"a": {"b": 2}},
        expect={"a": {"b": 2}},
    ),
]


@pytest.mark.parametrize("case", PATCHES, ids=lambda case: case.name)
def test_merge_patch(case: PatchCase) -> None:
    assert merge_patch(case.before, case.after) == case.expect
    assert merged(case.before, case.expect) == case.after


def job(**parts: Any) -> dict[str, Any]:
    found = fine_tune() | parts
    return found | {"metadata": found["metadata"] | {"uid": "u"}}


def test_a_status_of_another_version_is_read_as_far_as_it_is_understood() -> None:
    found = read_job(job(status={"state": "Running", "restarts": 3, "plan": {"later": 1}, "progress": {"furlongs": 3}}))
    assert (found.status.state, found.status.restarts, found.status.progress) == ("Running", 3, None)


def test_a_spec_of_another_version_is_refused_with_the_path() -> None:
    with pytest.raises(InvalidSpec) as error:
        read_job(job(spec=fine_tune()["spec"] | {"fancy": 1, "task": "causal"}))
    assert "spec.fancy: extra inputs are not permitted" in str(error.value)
    assert "spec.task: input should be 'causal-lm'" in str(error.value)


async def test_a_job_that_cannot_be_understood_says_so_and_stops_nothing() -> None:
    async with FakeCluster() as cluster, running(cluster):
        broken = cluster.create(fine_tune("broken"))
        cluster.change(broken, lambda o: o["spec"].update(fancy=1))
        cluster.create(fine_tune("good"))
        found = await until(
            "said",
            lambda: condition_with(cluster, "FineTuneJob", "broken", "Accepted", "InvalidSpec"),
        )
        assert found["status"] == "False"
        assert found["message"].startswith("spec.fancy: extra inputs are not permitted\n")
        await until("complete", lambda: finished(cluster, "FineTuneJob", "good"))
        written = cluster.get("FineTuneJob", "broken")["metadata"]["resourceVersion"]
        await asyncio.sleep(0.3)
        assert cluster.get("FineTuneJob", "broken")["metadata"]["resourceVersion"] == written


BEFORE = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class TurnCase:
    name: str
    accepted_before: str | None
    time_kept: bool


TURNS = [
    TurnCase(
        name="it was accepted",
        accepted_before="True",
        time_kept=False,
    ),
    TurnCase(
        name="it was refused already",
        accepted_before="False",
        time_kept=True,
    ),
    TurnCase(
        name="nothing was said yet",
        accepted_before=None,
        time_kept=False,
    ),
]


@pytest.mark.parametrize("case", TURNS, ids=lambda case: case.name)
def test_what_cannot_be_understood_any_more_has_turned(case: TurnCase) -> None:
    others = [{"type": "Prepared", "status": "True", "reason": "Prepared", "lastTransitionTime": BEFORE}]
    accepted = (
        [{"type": "Accepted", "status": case.accepted_before, "reason": "x", "lastTransitionTime": BEFORE}]
        if case.accepted_before
        else []
    )
    status = invalid_status(
        {"metadata": {"generation": 2}, "status": {"conditions": accepted + others, "restarts": 3}}, "spec.fancy: no"
    )
    first, *rest = status["conditions"]
    assert (first["type"], first["status"], first["observedGeneration"], first["lastTransitionTime"] == BEFORE) == (
        "Accepted",
        "False",
        2,
        case.time_kept,
    )
    assert (rest, status["restarts"], status["state"], status["observedGeneration"]) == (others, 3, "Invalid", 2)


async def test_a_job_that_is_gone_wants_nothing() -> None:
    async with FakeCluster() as cluster, running(cluster) as operator:
        assert await operator._reconciler.reconcile(Key(JobKind.FINE_TUNE, "default", "gone")) is None


async def test_fields_that_an_older_crd_drops_are_not_written_for_ever() -> None:
    async with FakeCluster() as cluster:
        write = cluster._write

        def dropping(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            if sub == "status":
                body["status"].pop("shape", None)
            return write(request, kind, ns, name, sub, body)

        cluster._write = dropping  # type: ignore[method-assign]
        async with running(cluster):
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
            await asyncio.sleep(0.1)
            before = cluster.writes
            await asyncio.sleep(0.3)
            assert cluster.writes == before
            assert "shape" not in cluster.get("FineTuneJob", "tune")["status"]


async def test_somebody_else_writes_the_status_at_the_same_time() -> None:
    async with FakeCluster() as cluster:
        write, disturbed = cluster._write, set[str]()

        def racing(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            if sub == "status" and body["metadata"]["resourceVersion"] not in disturbed and len(disturbed) < 3:
                found = cluster.get(kind, name)
                cluster.change(
                    found, lambda o: o["metadata"].setdefault("annotations", {}).update(n=str(len(disturbed)))
                )
                disturbed.add(body["metadata"]["resourceVersion"])
            return write(request, kind, ns, name, sub, body)

        cluster._write = racing  # type: ignore[method-assign]
        async with running(cluster):
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert len(disturbed) == 3


async def test_a_job_that_is_deleted_and_made_again_in_between_is_not_touched_by_what_was_meant_for_the_old_one() -> (
    None
):
    async with FakeCluster() as cluster:
        old = cluster.create(fine_tune(ttlSecondsAfterFinished=0))
        write, swapped = cluster._write, False

        def swapping(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            nonlocal swapped
            if request.method == "DELETE" and kind == "FineTuneJob" and not swapped:
                swapped = True
                cluster.delete(old)
                cluster.create(fine_tune(suspend=True))
            return write(request, kind, ns, name, sub, body)

        cluster._write = swapping  # type: ignore[method-assign]
        async with running(cluster):
            await until("swapped", lambda: swapped)
            await until("the new one is looked at", lambda: condition(cluster, "FineTuneJob", "tune", "Suspended"))


def test_refused_is_what_the_real_one_answers() -> None:
    assert Refused(409, "Conflict", "x").body["code"] == 409
