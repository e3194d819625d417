"""A namespace with jobs at work is deleted: pods first, by the real namespace controller.

No pod runs: the tests write what a kubelet would report.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from perf.operator_process import AuditLog, verb_and_resource

from cluster.operating import (
    World,
    audit_log,
    connected,
    job,
    kubectl,
    namespaces,
    operator,
    said,
    until,
)
from luthier_operator.model import Object

pytestmark = pytest.mark.cluster
DELETED, KEPT = "test-namespaces-deleted", "test-namespaces-kept"


async def shard_at_work(world: World, name: str) -> Object:
    """A GenerateJob whose shard runs. Returns the pod."""
    await world.create(job("GenerateJob", name))
    await world.prepare(name)
    (pod,) = await world.pods_of(name, "run")
    await world.runs(pod, "127.0.0.1")
    return pod


async def is_terminating(world: World, pod: Object) -> bool:
    found = await world.get("Pod", pod["metadata"]["name"])
    return found is not None and "deletionTimestamp" in found["metadata"]


async def namespace_is_gone() -> bool:
    return not kubectl("get", "namespace", DELETED, "--ignore-not-found", "-o", "name").strip()


async def test_a_namespace_with_jobs_at_work_goes_by_itself(cluster: None) -> None:
    """And a job in another one, whose pod was deleted, too, goes on."""
    with namespaces(DELETED, KEPT), operator(DELETED, KEPT):
        async with connected() as client:
            goes, stays = World(client, DELETED), World(client, KEPT)
            shards = [await shard_at_work(goes, name) for name in ("first", "second")]
            await goes.create(job("FineTuneJob", "tune"))
            await goes.pods_of("tune", "prepare")
            kept = await shard_at_work(stays, "kept")
            child = await stays.get("Job", "gj-kept-run")
            assert child is not None
            calls, others = AuditLog(audit_log(), DELETED), AuditLog(audit_log(), KEPT)

            kubectl("delete", "namespace", DELETED, "--wait=false")
            await stays.delete("Pod", kept["metadata"]["name"])
            for world, pod in [(stays, kept), *((goes, pod) for pod in shards)]:
                await until("stopped", lambda world=world, pod=pod: is_terminating(world, pod))  # type: ignore[misc]
                await world.ends(pod, 75, said("run", 75, message="stopped", saved=True), ahead=timedelta())
            await until("gone", namespace_is_gone, seconds=120)

            made = [verb_and_resource(call) for call in calls.calls()]
            assert made.count("delete/jobs") == len(shards)
            assert made.count("create/configmaps") <= 2 * len(shards), "asked by each before it deletes"
            await until("another pod", lambda: replaced(stays, kept))
            await asyncio.sleep(1)
            after = await stays.get("Job", "gj-kept-run")
            assert after is not None
            assert after["metadata"]["uid"] == child["metadata"]["uid"]
            assert "deletionTimestamp" not in after["metadata"]
            assert "delete/jobs" not in [verb_and_resource(call) for call in others.calls()]


async def replaced(world: World, pod: Object) -> bool:
    return [p["metadata"]["uid"] for p in await world.pods("kept", "run")] not in ([], [pod["metadata"]["uid"]])
