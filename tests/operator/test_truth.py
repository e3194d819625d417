"""What the operator does not own it leaves alone, what has changed it looks at again, and what fails it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from aiohttp import web
from fake_api import Object
from fake_cluster import FakeCluster, Outcome, all_well
from harness import condition, condition_with, fine_tune, finished, generate, holds, running, start, until

from luthier_operator import naming, reconcile

CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ftj-tune"}, "data": {"mine": "1"}}
JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "ftj-tune-prepare"},
    "spec": {"suspend": True, "template": {"spec": {}, "metadata": {"labels": {}}}},
}


@dataclass(frozen=True)
class ForeignCase:
    name: str
    found: Object
    owner: list[Object]
    message: str


REMEDY = "it is left as it is. Rename or delete it, or create the job under another name"
OTHER = [{"apiVersion": "v1", "kind": "Deployment", "name": "web", "uid": "u"}]
FOREIGN = [
    ForeignCase(
        name="a config map of nobody",
        found=CONFIG_MAP,
        owner=[],
        message=f"ConfigMap ftj-tune: an object of this name exists and belongs to no job; {REMEDY}",
    ),
    ForeignCase(
        name="a config map of something else",
        found=CONFIG_MAP,
        owner=OTHER,
        message=f"ConfigMap ftj-tune: an object of this name exists and belongs to Deployment web; {REMEDY}",
    ),
    ForeignCase(
        name="a Job of something else",
        found=JOB,
        owner=OTHER,
        message=f"Job ftj-tune-prepare: an object of this name exists and belongs to Deployment web; {REMEDY}",
    ),
]


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.name)
async def test_an_object_of_somebody_else_is_never_taken_over(case: ForeignCase) -> None:
    async with FakeCluster() as cluster:
        if case.owner:  # so that the garbage collector leaves it alone
            owner = cluster.create({"apiVersion": "v1", "kind": "Deployment", "metadata": {"name": "web"}})
            case = replace(case, owner=[{**case.owner[0], "uid": owner["metadata"]["uid"]}])
        meta = {**case.found["metadata"], "ownerReferences": case.owner}
        theirs = cluster.create({**case.found, "metadata": meta})
        name = theirs["metadata"]["name"]
        async with running(cluster):
            mine = cluster.create(fine_tune())
            said = await until(
                "said", lambda: condition_with(cluster, "FineTuneJob", "tune", "Prepared", "FailedCreate")
            )
            assert said["message"] == case.message
            found = cluster.get(theirs["kind"], name)
            assert (found.get("data"), found["metadata"].get("ownerReferences")) == (
                theirs.get("data"),
                theirs["metadata"]["ownerReferences"],
            )
            cluster.delete(mine)
            await asyncio.sleep(0.2)
            assert cluster.get(theirs["kind"], name) is not None
            # The remedy.
            cluster.delete(cluster.get(theirs["kind"], name))
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


@dataclass(frozen=True)
class RepairCase:
    name: str
    phase: str
    """While it runs, the config map is lost."""
    child: tuple[str, str]
    """What is created next, and needs it."""
    lose: Callable[[FakeCluster, Object], Any]


REPAIRS = [
    RepairCase(
        name="deleted before the run",
        phase="prepare",
        child=("JobSet", "ftj-tune-run"),
        lose=lambda cluster, found: cluster.delete(found),
    ),
    RepairCase(
        name="changed before the run",
        phase="prepare",
        child=("JobSet", "ftj-tune-run"),
        lose=lambda cluster, found: cluster.change(found, lambda o: o.update(data={"run.json": "{}", "more": "1"})),
    ),
    RepairCase(
        name="deleted before the upload",
        phase="run",
        child=("Job", "ftj-tune-publish"),
        lose=lambda cluster, found: cluster.delete(found),
    ),
]


@pytest.mark.parametrize("case", REPAIRS, ids=lambda case: case.name)
async def test_a_lost_config_map_is_repaired_before_the_next_phase(case: RepairCase) -> None:
    script = lambda pod: Outcome(hold=True) if pod.phase == case.phase else all_well(pod)  # noqa: E731
    async with FakeCluster(script) as cluster, running(cluster):
        cluster.create(fine_tune(hub={"repo": "org/result", "tokenSecretRef": {"name": "hf"}}))
        pods = await until("the phase", lambda: cluster.pods("tune", case.phase))
        await until("all", lambda: len(cluster.pods("tune", case.phase)) == (2 if case.phase == "run" else 1))
        before = cluster.get("ConfigMap", "ftj-tune")
        case.lose(cluster, before)
        cluster.script = all_well
        for pod in cluster.pods("tune", case.phase):
            cluster.release(pod, all_well(replace(cluster.started[0], phase=case.phase)))
        assert pods
        await until("the next phase", lambda: cluster.get(*case.child))
        assert cluster.get("ConfigMap", "ftj-tune")["data"] == before["data"]
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


async def test_the_time_to_live_is_read_again_before_results_are_deleted() -> None:
    async with FakeCluster() as cluster, running(cluster) as operator:
        cluster.create(fine_tune(ttlSecondsAfterFinished=2))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        # The watch is away, and the user wishes to keep the job.
        cluster.lost = lambda event, found: found["kind"] == "FineTuneJob"
        found = cluster.get("FineTuneJob", "tune")
        cluster.change(found, lambda o: o["spec"].pop("ttlSecondsAfterFinished"))
        await asyncio.sleep(3.5)
        assert cluster.get("FineTuneJob", "tune") is not None
        assert not [c for c in cluster.calls if c.verb == "DELETE" and c.kind == "FineTuneJob"]
        known = operator.store.job(next(iter(operator.store.keys())))
        assert "ttlSecondsAfterFinished" not in known["spec"], "it was read again"


async def test_a_job_that_changes_just_before_it_is_deleted_is_not_deleted() -> None:
    async with FakeCluster() as cluster:
        write, kept = cluster._write, False

        def racing(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            nonlocal kept
            if request.method == "DELETE" and kind == "FineTuneJob" and not kept:
                kept = True
                cluster.change(cluster.get(kind, name), lambda o: o["spec"].pop("ttlSecondsAfterFinished"))
            return write(request, kind, ns, name, sub, body)

        cluster._write = racing  # type: ignore[method-assign]
        async with running(cluster):
            cluster.create(fine_tune(ttlSecondsAfterFinished=0))
            await until("tried", lambda: kept)
            await asyncio.sleep(0.5)
            assert cluster.get("FineTuneJob", "tune") is not None


async def test_an_error_of_the_operator_is_said_in_the_job_and_goes_away_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide = reconcile.decide

    def broken(observed: Any, *rest: Any) -> Any:
        if observed.job.metadata.name == "tune":
            raise KeyError("revision")
        return decide(observed, *rest)

    async with FakeCluster() as cluster, running(cluster):
        monkeypatch.setattr(reconcile, "decide", broken)
        cluster.create(fine_tune())
        cluster.create(generate())
        said = await until("said", lambda: condition(cluster, "FineTuneJob", "tune", "InternalError"))
        assert (said["status"], said["reason"]) == ("True", "InternalError")
        assert said["message"].startswith("KeyError: 'revision' (reconcile.py:")
        assert "Please report this message" in said["message"]
        await until("the other goes on", lambda: finished(cluster, "GenerateJob", "gen"))
        written = len([c for c in cluster.calls if c.subresource and c.kind == "FineTuneJob"])
        assert written == 1
        assert [e["type"] for e in cluster.all("Event") if e["reason"] == "InternalError"] == ["Warning"]
        monkeypatch.setattr(reconcile, "decide", decide)
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert condition(cluster, "FineTuneJob", "tune", "InternalError") is None


async def test_a_child_that_nobody_could_have_written_is_an_internal_error_and_ends_nothing() -> None:
    async with FakeCluster(lambda pod: Outcome(hold=True)) as cluster, running(cluster) as operator:
        cluster.create(fine_tune())
        pods = await until("begun", lambda: cluster.pods("tune", "prepare"))
        odd = {naming.SOURCES_ANNOTATION: "{"}
        cluster.change(cluster.get("Job", "ftj-tune-prepare"), lambda o: o["metadata"].update(annotations=odd))
        cluster.script = all_well
        cluster.release(pods[0], all_well(cluster.started[0]))
        said = await until("said", lambda: condition(cluster, "FineTuneJob", "tune", "InternalError"))
        assert "JSONDecodeError" in said["message"]
        assert operator.alive()
        cluster.change(cluster.get("Job", "ftj-tune-prepare"), lambda o: o["metadata"].update(annotations={}))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


@pytest.mark.parametrize("kind", ["Event", "ConfigMap"])
@pytest.mark.parametrize("answer", ["null", "[]", "7"])
async def test_an_answer_that_is_no_object_ends_nothing(kind: str, answer: str) -> None:
    async with FakeCluster() as cluster:
        serve, odd = cluster._resource, True

        async def resource(request: web.Request, resource: Any, *rest: Any) -> web.StreamResponse:
            if resource.kind == kind and odd:
                return web.Response(status=502, text=answer, content_type="application/json")
            return await serve(request, resource, *rest)

        cluster._resource = resource  # type: ignore[method-assign]
        started = start(cluster)
        cluster.create(fine_tune())
        await asyncio.sleep(0.5)
        assert started.operator.alive()
        odd = False
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        started.operator.stop()
        await started.task
        await started.client.close()


async def test_jobs_that_wait_for_each_other_are_refused_with_the_way() -> None:
    async with FakeCluster() as cluster, running(cluster):
        for name, source in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
            cluster.create(fine_tune(name, model={"job": source}))
        for name in "abcd":
            await until(name, lambda name=name: holds(cluster, "FineTuneJob", name, "Failed"))
        reasons = {n: condition(cluster, "FineTuneJob", n, "Failed") for n in "abcd"}
        cycles = [c["message"] for c in reasons.values() if c["reason"] == "InvalidSpec"]
        assert cycles
        assert all(" → " in message for message in cycles)
        assert {c["reason"] for c in reasons.values()} <= {"InvalidSpec", "SourceFailed"}
        assert reasons["d"]["reason"] == "SourceFailed"


async def test_a_source_that_cannot_be_read_is_not_called_missing() -> None:
    async with FakeCluster(lambda pod: Outcome(hold=True)) as cluster, running(cluster):
        base = cluster.create(fine_tune("base"))
        cluster.change(base, lambda o: o["spec"].update(task="telepathy"))
        cluster.create(fine_tune(model={"job": "base"}))
        said = await until(
            "said", lambda: condition_with(cluster, "FineTuneJob", "tune", "Accepted", "SourceNotUnderstood")
        )
        assert said["message"].startswith('spec.model.job: FineTuneJob "base" exists, but this operator')
