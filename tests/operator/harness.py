"""Starts the whole operator against the API server in memory, and kills it as SIGKILL would: nothing it says afterwards
is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kopf
from fake_cluster import FakeCluster, Object
from kubernetes.aio.client.configuration import Configuration

from luthier_operator import naming
from luthier_operator.app import Operator, Pace
from luthier_operator.client import Client
from luthier_operator.election import Election
from luthier_operator.metrics import Metrics
from luthier_operator.settings import Settings

# Every client reads the authorities of the whole internet otherwise: a third of a test's time, for servers without TLS.
os.environ.setdefault("SSL_CERT_FILE", os.devnull)
FAST = Pace(relist=600, settle=0.3, discovery=0.05, restart=0.05, backoff=0.02, flush=0.2)
PATIENCE = 60.0  # of a wait that a loaded machine makes long; no test that passes waits for its end
_numbers = itertools.count(1)


def settings(**changes: Any) -> Settings:
    return Settings(trainer_image="trainer:test", workers=4, **changes)


def fine_tune(name: str = "tune", **spec: Any) -> Object:
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"id": "org/data"},
            "resources": {"nodes": 2, "gpusPerNode": 0},
        }
        | spec,
    }


def generate(name: str = "gen", **spec: Any) -> Object:
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "GenerateJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "task": "text-generation",
            "model": {"id": "org/model"},
            "inputs": {"rows": [{"prompt": "a"}, {"prompt": "b"}]},
            "shards": 2,
            "resources": {"gpus": 0},
        }
        | spec,
    }


HUB = {"repo": "org/result", "tokenSecretRef": {"name": "hf"}}


@dataclass(frozen=True)
class Renew:
    """How a candidate renews its Lease. In seconds."""

    within: float = 30
    attempt: float = 10
    pause: float = 0.4


@dataclass
class Running:
    operator: Operator
    task: asyncio.Task[None]
    client: Client
    sender: str
    election: Election | None

    async def kill(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.client.close()


def start(
    cluster: FakeCluster,
    given: Settings | None = None,
    pace: Pace = FAST,
    identity: str = "",
    lasts: float = 60,
    renew: Renew = Renew(),
    lost: Callable[[str], None] = lambda reason: None,
    **parts: Any,
) -> Running:
    """`identity`: of a candidate for the Lease `system/luthier`, which lasts so many seconds; one without is alone.
    `lost`: what its process does when it has lost the Lease.
    """
    sender = f"operator-{next(_numbers)}"
    configuration = Configuration(host=cluster.url, api_key={"BearerToken": f"Bearer {sender}"})
    given = given or settings()
    metrics = Metrics("test", cluster.url, given.workers)

    async def connect() -> Client:
        return Client(configuration, metrics.requested)

    def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(server=cluster.url, token=sender)

    election = (
        Election(connect, "system/luthier", identity, lost, lasts, renew.within, renew.attempt, renew.pause)
        if identity
        else None
    )
    client = Client(configuration, metrics.requested, may_send=election.holds if election else lambda: True)
    operator = Operator(given, client, metrics, login, pace, **{"signals": False, "election": election} | parts)
    return Running(operator, asyncio.create_task(operator.serve()), client, sender, election)


@contextlib.asynccontextmanager
async def running(
    cluster: FakeCluster, given: Settings | None = None, pace: Pace = FAST, **parts: Any
) -> AsyncIterator[Operator]:
    """An operator that is stopped in the end as by SIGTERM."""
    started = start(cluster, given, pace, **parts)
    try:
        yield started.operator
    finally:
        started.operator.stop()
        try:
            await asyncio.wait_for(started.task, PATIENCE)
        finally:
            await started.client.close()


async def outlive(cluster: FakeCluster, done: Callable[[], bool]) -> int:
    """Run operators, a fresh one whenever one is killed, until `done()`. Returns how many there were."""
    dead: set[str] = set()
    cluster.on_kill = dead.add
    for number in itertools.count(1):
        operator = start(cluster)
        try:
            await until("the end, or the operator's", lambda sender=operator.sender: done() or sender in dead)
        finally:
            await operator.kill()
        if done():
            return number
    raise AssertionError("unreachable")


async def until(what: str, true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `true()` is; fails with `what`."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.005)
    return value


def condition(cluster: FakeCluster, kind: str, name: str, type: str) -> Object | None:
    job = cluster.get(kind, name) or {}
    return next((c for c in job.get("status", {}).get("conditions", []) if c["type"] == type), None)


def condition_with(cluster: FakeCluster, kind: str, name: str, type: str, reason: str) -> Object | None:
    found = condition(cluster, kind, name, type)
    return found if found is not None and found["reason"] == reason else None


def holds(cluster: FakeCluster, kind: str, name: str, type: str) -> bool:
    found = condition(cluster, kind, name, type)
    return found is not None and found["status"] == "True"


def finished(cluster: FakeCluster, kind: str, name: str) -> bool:
    return holds(cluster, kind, name, "Complete") or holds(cluster, kind, name, "Failed")


def summary(cluster: FakeCluster) -> Object:
    """What counts in the end: the jobs' conditions and results, every child and every pod that there ever was."""
    jobs = {}
    for kind in ("FineTuneJob", "GenerateJob"):
        for job in cluster.all(kind):
            status = job.get("status", {})
            conditions = {c["type"]: (c["status"], c["reason"]) for c in status.get("conditions", [])}
            jobs[job["metadata"]["name"]] = {"conditions": conditions} | {
                k: status.get(k) for k in ("state", "restarts", "metrics", "hub", "prepared")
            }
    return {"jobs": jobs, "children": sorted(children(cluster)), "pods": sorted(map(str, cluster.started))}


def children(cluster: FakeCluster) -> Iterator[str]:
    """Each child that was ever created, once for each time."""
    for _, event, found in cluster.history:
        mine = naming.JOB_LABEL in found["metadata"].get("labels", {}) and found["kind"] != "Pod"
        if event == "ADDED" and mine:
            yield f"{found['kind']} {found['metadata']['name']}"
