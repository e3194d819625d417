"""What the operator does where only a real API server, a real Job controller and a real garbage collector can show it.

No pod runs: the tests write what a kubelet would report.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
from perf.operator_process import AuditLog, verb_and_resource

from cluster.operating import World, audit_log, connected, job, namespaces, operator, said, until
from luthier_operator.client import ApiError
from luthier_operator.model import Object

pytestmark = pytest.mark.cluster
NAMESPACE, CLOCKS = "test-operator", "test-operator-clocks"
FOREIGN = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ftj-taken"}, "data": {"theirs": "1"}}


@pytest.fixture(scope="module", autouse=True)
def running(cluster: None) -> Iterator[None]:
    """The operator, for one namespace."""
    with namespaces(NAMESPACE), operator(NAMESPACE):
        yield


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with connected() as client:
        yield World(client, NAMESPACE)


async def test_an_object_of_somebody_else_is_left_alone_and_named(world: World) -> None:
    await world.create(FOREIGN)
    await world.create(job("FineTuneJob", "taken"))
    found = await world.until_condition("FineTuneJob", "taken", "Prepared", "FailedCreate")
    assert found["message"] == (
        "ConfigMap ftj-taken: an object of this name exists and belongs to no job; it is left as it is. Rename or"
        " delete it, or create the job under another name"
    )
    assert await world.get("Job", "ftj-taken-prepare") is None
    await world.delete("FineTuneJob", "taken")
    await asyncio.sleep(3)  # the garbage collector looks at what the deleted job owns
    theirs = await world.get("ConfigMap", "ftj-taken")
    assert theirs is not None
    assert (theirs["data"], theirs["metadata"].get("ownerReferences")) == (FOREIGN["data"], None)
    # The remedy.
    await world.delete("ConfigMap", "ftj-taken")
    await world.create(job("FineTuneJob", "taken"))
    await world.pods_of("taken", "prepare")


async def test_a_config_map_that_is_lost_is_there_again_for_the_next_pod(world: World) -> None:
    await world.create(job("GenerateJob", "lost"))
    await world.pods_of("lost", "prepare")
    before = await world.get("ConfigMap", "gj-lost")
    assert before is not None
    # Before the next phase.
    await world.delete("ConfigMap", "gj-lost")
    await world.prepare("lost")
    (pod,) = await world.pods_of("lost", "run")
    after = await world.get("ConfigMap", "gj-lost")
    assert after is not None
    assert after["data"] == before["data"]
    # Of a pod that waits for it, as one that the cluster has started again.
    await world.delete("ConfigMap", "gj-lost")
    await world.has_node(pod, since=timedelta(minutes=1))
    after = await until("repaired", lambda: world.get("ConfigMap", "gj-lost"))
    assert after["data"] == before["data"]


async def test_jobs_that_wait_for_each_other_are_refused(world: World) -> None:
    for name, source in (("cycle-a", "cycle-b"), ("cycle-b", "cycle-c"), ("cycle-c", "cycle-a")):
        await world.create(job("FineTuneJob", name, model={"job": source}))
    found = [
        await until(n, lambda n=n: world.condition("FineTuneJob", n, "Failed"))
        for n in ("cycle-a", "cycle-b", "cycle-c")
    ]
    assert "InvalidSpec" in {c["reason"] for c in found}
    assert {c["reason"] for c in found} <= {"InvalidSpec", "SourceFailed"}
    (message, *_) = [c["message"] for c in found if c["reason"] == "InvalidSpec"]
    assert "wait for each other's results: cycle-" in message


async def test_an_internal_error_is_said_in_the_job_and_goes_away(world: World) -> None:
    await world.create(job("FineTuneJob", "odd"))
    await world.pods_of("odd", "prepare")
    note = {"metadata": {"annotations": {"luthier.dev/sources": "{"}}}
    await world.patch("Job", "ftj-odd-prepare", note)
    await world.prepare("odd")
    found = await world.until_condition("FineTuneJob", "odd", "InternalError", "InternalError")
    assert "JSONDecodeError" in found["message"]
    assert "Please report this message" in found["message"]
    note["metadata"]["annotations"]["luthier.dev/sources"] = None
    await world.patch("Job", "ftj-odd-prepare", note)
    await until("a JobSet", lambda: world.get("JobSet", "ftj-odd-run"))
    assert await world.condition("FineTuneJob", "odd", "InternalError") is None


async def test_the_deadline_stands_still_while_a_job_is_suspended_or_queued(world: World) -> None:
    limit = 8
    await world.create(job("GenerateJob", "late", activeDeadlineSeconds=limit))
    await world.prepare("late")
    await world.pods_of("late", "run")
    # A queue takes the run away, as Kueue does.
    await world.patch("Job", "gj-late-run", {"spec": {"suspend": True}})
    await world.until_condition("GenerateJob", "late", "Running", "WaitingForQueue")
    await asyncio.sleep(limit)
    assert await world.condition("GenerateJob", "late", "Failed") is None
    # And the user suspends it.
    await world.patch("GenerateJob", "late", {"spec": {"suspend": True}})
    await world.until_condition("GenerateJob", "late", "Suspended", "Suspended")
    await asyncio.sleep(limit)
    assert await world.condition("GenerateJob", "late", "Failed") is None
    await world.patch("GenerateJob", "late", {"spec": {"suspend": False}})
    found = await world.until_condition("GenerateJob", "late", "Failed", "DeadlineExceeded", seconds=limit + 20)
    assert f"the job was at work for {limit} seconds" in found["message"]
    late = await world.get("GenerateJob", "late")
    assert late is not None
    assert limit <= late["status"]["activeSeconds"] <= limit + 5


async def test_a_job_whose_time_is_over_is_read_before_it_is_deleted(world: World) -> None:
    audit = AuditLog(audit_log(), NAMESPACE)
    await world.create(job("FineTuneJob", "brief", ttlSecondsAfterFinished=1))
    (pod,) = await world.pods_of("brief", "prepare")
    await world.ends(pod, 66, said("prepare", 66, message="no such column"))
    await until("gone", lambda: is_gone(world, "FineTuneJob", "brief"))
    calls = [verb_and_resource(c) for c in audit.calls() if c["objectRef"].get("name") == "brief"]
    assert calls[-2:] == ["get/finetunejobs", "delete/finetunejobs"], calls


async def is_gone(world: World, kind: str, name: str) -> bool:
    return await world.get(kind, name) is None


@dataclass(frozen=True)
class PreconditionCase:
    name: str
    change: dict[str, str]
    """What is other than in the object that exists."""
    exact: bool
    refused: bool
    """Else nothing is deleted either: the object that was meant is gone already."""


PRECONDITIONS = [
    PreconditionCase(
        name="another version",
        change={"resourceVersion": "1"},
        exact=True,
        refused=True,
    ),
    PreconditionCase(
        name="another object of this name",
        change={"uid": "6e0d4bd4-94a3-4a5c-9a3a-0d6b1b4ef6a1"},
        exact=False,
        refused=False,
    ),
    PreconditionCase(
        name="another object of this name, of another version",
        change={"uid": "6e0d4bd4-94a3-4a5c-9a3a-0d6b1b4ef6a1", "resourceVersion": "1"},
        exact=True,
        refused=False,
    ),
]


@pytest.mark.parametrize("case", PRECONDITIONS, ids=lambda case: case.name)
async def test_only_the_object_that_was_meant_is_deleted(world: World, case: PreconditionCase) -> None:
    name = f"meant-{PRECONDITIONS.index(case)}"
    found = await world.create(job("FineTuneJob", name, suspend=True))
    changed = found | {"metadata": found["metadata"] | case.change}
    if case.refused:
        with pytest.raises(ApiError) as raised:
            await world.client.delete(changed, "Background", exact=case.exact)
        assert raised.value.status == 409
    else:
        assert await world.client.delete(changed, "Background", exact=case.exact) is None
    kept = await world.get("FineTuneJob", name)
    assert kept is not None
    assert "deletionTimestamp" not in kept["metadata"]


async def test_a_message_of_a_newer_image_is_read_as_far_as_it_is_understood(world: World) -> None:
    await world.create(job("FineTuneJob", "newer"))
    (pod,) = await world.pods_of("newer", "prepare")
    message = json.loads(said("prepare", 66, message="spec.dataset.columns.text: no column", last_lines="the log"))
    await world.ends(pod, 66, json.dumps(message | {"later": {"deep": [1]}}))
    found = await until("failed", lambda: world.condition("FineTuneJob", "newer", "Failed"))
    assert found["message"].startswith("spec.dataset.columns.text: no column")
    newer = await world.get("FineTuneJob", "newer")
    assert newer is not None
    assert newer["status"]["attempts"][0]["lastLines"] == "the log"


async def test_attempts_stand_in_the_order_of_the_shard_and_not_of_the_clocks(cluster: None) -> None:
    """Both pods end while no operator runs, so that only the nodes' clocks say when."""
    with namespaces(CLOCKS):
        async with connected() as client:
            world = World(client, CLOCKS)
            with operator(CLOCKS):
                await world.create(job("GenerateJob", "clocks"))
                await world.prepare("clocks")
                (pod,) = await world.pods_of("clocks", "run")
            await world.ends(pod, 71, said("run", 71, message="first"))
            await until("replaced", lambda: replaced(world, pod))
            (pod,) = await world.pods_of("clocks", "run")
            await world.ends(pod, 80, said("run", 80, message="second"), ahead=timedelta(minutes=-10))
            with operator(CLOCKS):
                await until("both", lambda: attempts(world, 2))
                found = await attempts(world, 2)
    assert [(a["attempt"], a["message"]) for a in found] == [(0, "first"), (1, "second")]


async def replaced(world: World, pod: Object) -> bool:
    return [p["metadata"]["uid"] for p in await world.pods("clocks", "run")] not in ([], [pod["metadata"]["uid"]])


async def attempts(world: World, count: int) -> list[Object]:
    found = await world.get("GenerateJob", "clocks") or {}
    known: list[Object] = found.get("status", {}).get("attempts", [])
    return known if len(known) == count else []
