"""One reconcile: what is written, and what is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fake_api import FakeApi, Refused, merged
from fake_cluster import FakeCluster, Outcome
from harness import condition, fine_tune, finished, running, until
from jsonpatch import apply_patch
from kubernetes.aio.client.configuration import Configuration

from luthier_api.kinds import JobKind, parse_job
from luthier_operator import reconcile
from luthier_operator.client import ApiError, Client, status_operations
from luthier_operator.events import Recorder
from luthier_operator.metrics import Metrics
from luthier_operator.model import Key
from luthier_operator.objects import objects
from luthier_operator.queue import Queue
from luthier_operator.rawstatus import kept_conditions, merge_patch
from luthier_operator.reconcile import CREATED_SECONDS, Reconciler
from luthier_operator.settings import Settings
from luthier_operator.store import Store


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
    PatchCase(
        name="names with the signs of a path",
        before={"a/b": {"c~1": 1, "d": 2}},
        after={"a/b": {"c~1": 3}},
        expect={"a/b": {"c~1": 3, "d": None}},
    ),
]


@pytest.mark.parametrize("case", PATCHES, ids=lambda case: case.name)
def test_merge_patch(case: PatchCase) -> None:
    assert merge_patch(case.before, case.after) == case.expect
    assert merged(case.before, case.expect) == case.after


@pytest.mark.parametrize("case", PATCHES, ids=lambda case: case.name)
def test_the_json_patch_does_what_the_merge_patch_does(case: PatchCase) -> None:
    job = {"metadata": {"resourceVersion": "7"}, "status": case.before}
    stored = {"metadata": {"resourceVersion": "8"}, "status": case.before | {"another": "writer's"}}
    assert apply_patch(stored, status_operations(job, case.expect)) == {
        "metadata": {"resourceVersion": "7"},
        "status": case.after | {"another": "writer's"},
    }


@dataclass(frozen=True)
class RaceCase:
    name: str
    change: Callable[[dict[str, Any]], object]
    """What somebody else does between the reading of a job and the write of its status."""
    patch: dict[str, Any]
    code: int = 409
    """Of the refusal."""


RACES = [
    RaceCase(
        name="they write another field",
        change=lambda job: job["status"].update(shape="9×9"),
        patch={"restarts": 1},
    ),
    RaceCase(
        name="they remove the field that is to be removed",
        change=lambda job: job["status"].pop("hub"),
        patch={"hub": None},
    ),
    RaceCase(
        name="they remove the object that is to be changed",
        change=lambda job: job["status"].pop("hub"),
        patch={"hub": {"files": 2}},
    ),
    RaceCase(
        name="they remove the status",
        change=lambda job: job.pop("status"),
        patch={"restarts": 1},
    ),
    RaceCase(
        name="they edit the spec",
        change=lambda job: job["spec"].update(suspend=True),
        patch={"restarts": 1},
    ),
    RaceCase(
        name="nothing, and the schema refuses the status",
        change=lambda job: None,
        patch={"restarts": "many"},
        code=422,
    ),
]


@pytest.mark.parametrize("case", RACES, ids=lambda case: case.name)
async def test_a_status_is_never_written_over_what_somebody_else_has_written(case: RaceCase) -> None:
    async with FakeApi() as api:
        client, made = Client(Configuration(host=api.url)), api.create(fine_tune())
        hub = {"repo": "org/result", "revision": "c", "url": "https://hub", "files": 1}
        read = api.change(made, lambda job: job.update(status={"restarts": 0, "hub": hub}))
        theirs = api.change(read, case.change)
        with pytest.raises(ApiError) as refused:
            await client.patch_status(read, case.patch)
        await client.close()
        assert (refused.value.status, api.get("FineTuneJob", "tune")) == (case.code, theirs)


async def test_the_first_status_is_not_written_over_one_that_came_first() -> None:
    async with FakeApi() as api:
        client, made = Client(Configuration(host=api.url)), api.create(fine_tune())
        theirs = api.change(made, lambda job: job.update(status={"state": "Running"}))
        with pytest.raises(ApiError, match="409"):
            await client.patch_status(made, {"restarts": 1})
        await client.patch_status(theirs, {"restarts": 1})
        await client.close()
        assert api.get("FineTuneJob", "tune")["status"] == {"state": "Running", "restarts": 1}


def condition_of(type: str, **fields: Any) -> dict[str, Any]:
    return {"type": type, "status": "True", "reason": "x"} | fields


@dataclass(frozen=True)
class KeptCase:
    name: str
    stored: list[dict[str, Any]]
    understood: list[dict[str, Any]]
    desired: list[dict[str, Any]]
    expect: list[dict[str, Any]]


KEPT = [
    KeptCase(
        name="one that was not understood stays",
        stored=[condition_of("Accepted"), {"type": "Odd"}],
        understood=[condition_of("Accepted")],
        desired=[condition_of("Accepted", status="False")],
        expect=[condition_of("Accepted", status="False"), {"type": "Odd"}],
    ),
    KeptCase(
        name="a field that was not understood stays where nothing else changes",
        stored=[condition_of("Accepted", later=1), condition_of("Prepared", later=2)],
        understood=[condition_of("Accepted"), condition_of("Prepared")],
        desired=[condition_of("Accepted"), condition_of("Prepared", status="False")],
        expect=[condition_of("Accepted", later=1), condition_of("Prepared", status="False")],
    ),
    KeptCase(
        name="one that is removed is not kept",
        stored=[condition_of("Accepted"), condition_of("Published")],
        understood=[condition_of("Accepted"), condition_of("Published")],
        desired=[condition_of("Accepted")],
        expect=[condition_of("Accepted")],
    ),
    KeptCase(
        name="one of an odd shape is replaced by one of its type",
        stored=[{"type": "Accepted"}],
        understood=[],
        desired=[condition_of("Accepted")],
        expect=[condition_of("Accepted")],
    ),
]


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_conditions_of_others_are_kept(case: KeptCase) -> None:
    assert kept_conditions(case.stored, case.understood, case.desired) == case.expect


async def test_a_job_that_is_gone_wants_nothing() -> None:
    async with FakeCluster() as cluster, running(cluster) as operator:
        assert await operator._reconciler.reconcile(Key(JobKind.FINE_TUNE, "default", "gone")) is None


async def test_each_write_of_a_status_is_counted() -> None:
    """The API server leaves the rules of the spec out where the number differs."""
    async with FakeCluster() as cluster:
        write, sent = cluster._write, []

        def counting(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            if sub == "status":
                sent.append(body["status"]["writes"])
            return write(request, kind, ns, name, sub, body)

        cluster._write = counting  # type: ignore[method-assign]
        async with running(cluster):
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert sent == list(range(1, len(sent) + 1))
        assert cluster.get("FineTuneJob", "tune")["status"]["writes"] == len(sent)


@pytest.mark.parametrize("dropped", ["shape", "writes"])
async def test_fields_that_an_older_crd_drops_are_not_written_for_ever(dropped: str) -> None:
    async with FakeCluster() as cluster:
        write = cluster._write

        def dropping(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            if sub == "status":
                body["status"].pop(dropped, None)
            return write(request, kind, ns, name, sub, body)

        cluster._write = dropping  # type: ignore[method-assign]
        async with running(cluster):
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
            await asyncio.sleep(0.1)
            before = cluster.writes
            await asyncio.sleep(0.3)
            assert cluster.writes == before
            assert dropped not in cluster.get("FineTuneJob", "tune")["status"]


@pytest.mark.parametrize("dropped", ["shape", "activeSince"])
async def test_what_an_older_crd_drops_is_remembered(dropped: str) -> None:
    """The time since when a job is at work is a new one in each decision that does not know it."""
    async with FakeCluster(lambda pod: Outcome(hold=True)) as cluster:
        write, sent = cluster._write, []

        def dropping(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            if sub == "status":
                sent.append(body["status"].pop(dropped, None))
            return write(request, kind, ns, name, sub, body)

        cluster._write = dropping  # type: ignore[method-assign]
        async with running(cluster):
            cluster.create(fine_tune())
            await until("at work", lambda: cluster.pods("tune", "prepare"))
            await asyncio.sleep(1.1)  # times have whole seconds
            before, found = len(sent), cluster.get("FineTuneJob", "tune")
            cluster.change(found, lambda o: o["metadata"].setdefault("annotations", {}).update(touched="once"))
            await asyncio.sleep(0.5)
        assert any(sent)
        assert len(sent) == before


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


@dataclass(frozen=True)
class OwnWritesCase:
    name: str
    child: dict[str, Any]
    """Status of a prepare Job that exists already and that the operator has not seen; empty: there is none."""
    decides_again: bool
    """Whether the operator's own writes are a reason to decide again."""


OWN_WRITES = [
    OwnWritesCase(
        name="nobody has begun with what was created",
        child={},
        decides_again=False,
    ),
    OwnWritesCase(
        name="what was to be created is there and at work",
        child={"active": 1},
        decides_again=True,
    ),
]


@pytest.mark.parametrize("case", OWN_WRITES, ids=lambda case: case.name)
async def test_what_was_just_created_is_no_news(case: OwnWritesCase) -> None:
    async with FakeApi() as api:
        settings = Settings(trainer_image="trainer:test")
        made = api.create(fine_tune())
        child = prepare_job(made, settings)
        if case.child:
            api.create(child | {"status": case.child})
        client, metrics = Client(Configuration(host=api.url)), Metrics("test", api.url, 1)
        store, queue = Store(), Queue()
        store.put(made)
        reconciler = Reconciler(store, client, queue, Recorder(client, metrics), metrics, settings)
        again = await reconciler.reconcile(Key(JobKind.FINE_TUNE, "default", "tune"))
        await client.close()
        assert api.get("Job", child["metadata"]["name"])
        assert again is None
        planned = queue.next_deadline() or 0.0
        assert (planned - time.monotonic() < CREATED_SECONDS / 2) == case.decides_again


async def test_a_write_that_is_seen_before_its_answer_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decided = asyncio.Event(), list[str]()
    async with FakeCluster(lambda pod: Outcome(hold=True)) as cluster:
        answer, is_edited, decide = cluster._resource, Store.is_edited, reconcile.decide

        async def late(request: Any, resource: Any, ns: str, name: str, sub: str, sender: str) -> Any:
            found = await answer(request, resource, ns, name, sub, sender)
            if sub == "status":
                await seen.wait()
            return found

        def noted(self: Store, job: dict[str, Any]) -> bool:
            seen.set()
            return is_edited(self, job)

        def counted(observed: Any, settings: Settings, now: Any) -> Any:
            decided.append(observed.job.metadata.name)
            return decide(observed, settings, now)

        cluster._resource = late  # type: ignore[method-assign]
        monkeypatch.setattr(Store, "is_edited", noted)
        monkeypatch.setattr(reconcile, "decide", counted)
        async with running(cluster) as operator:
            await until("kopf watches", lambda: "FineTuneJob" in cluster.watched)
            cluster.create(fine_tune())
            await until("the Job", lambda: cluster.get("Job", "ftj-tune-prepare") is not None)
            await until("at rest", lambda: not (operator.queue._working or len(operator.queue)))
        assert decided == ["tune"]


def prepare_job(made: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return next(o for o in objects(parse_job(made), settings) if o["kind"] == "Job")


def test_refused_is_what_the_real_one_answers() -> None:
    assert Refused(409, "Conflict", "x").body["code"] == 409
