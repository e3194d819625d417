"""A leader that loses its Lease sends nothing any more, by the audit log of a real API server.

The old leader is stopped with SIGSTOP until another replica leads, as a machine that sleeps or swaps. When it goes on,
all that it was about to do is still in its memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import choice
from cluster.operating import Object, World, connected, job, kubectl, namespaces, operator, until
from luthier_operator.client import RESOURCES

pytestmark = pytest.mark.cluster
NAMESPACE, SYSTEM = "test-lease", "test-lease-system"
LEASE = f"{SYSTEM}/luthier"
OLD, NEW = "old-leader", "new-leader"
JOBS = 40


@pytest.fixture(autouse=True)
def world(cluster: None) -> Iterator[None]:
    """Two accounts, so that the audit log tells the replicas apart."""
    if choice.cluster().audit("nobody", "") is None:
        pytest.skip("the audit log of this cluster is out of reach")
    with namespaces(NAMESPACE, SYSTEM):
        for name in (OLD, NEW):
            kubectl("-n", SYSTEM, "create", "serviceaccount", name)
            account = f"--serviceaccount={SYSTEM}:{name}"
            kubectl("create", "clusterrolebinding", f"test-{name}", "--clusterrole=cluster-admin", account)
        yield
        kubectl("delete", "clusterrolebinding", *(f"test-{name}" for name in (OLD, NEW)))


def kubeconfig(folder: Path, account: str) -> str:
    """Of this cluster, as a service account."""
    token = kubectl("-n", SYSTEM, "create", "token", account).strip()
    found = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    found["users"][0]["user"] = {"token": token}
    path = folder / account
    path.write_text(json.dumps(found))
    return str(path)


async def holder(world: World) -> Object:
    found: Object = (await world.client.get(RESOURCES["Lease"].path(SYSTEM, "luthier")))["spec"]
    return found


async def test_no_request_leaves_after_the_loss(tmp_path: Path) -> None:
    configs = {name: kubeconfig(tmp_path, name) for name in (OLD, NEW)}
    replicas = {
        name: operator(
            NAMESPACE,
            KUBECONFIG=configs[name],
            LUTHIER_LEASE=LEASE,
            LUTHIER_IDENTITY=name,
        )
        for name in (OLD, NEW)
    }
    async with connected() as client:
        world = World(client, NAMESPACE)
        with replicas[OLD] as old:
            await asyncio.gather(*(world.create(job("FineTuneJob", f"job-{i}")) for i in range(JOBS)))
            await world.until_condition("FineTuneJob", f"job-{JOBS // 2}", "Accepted", "Accepted")
            os.kill(old.pid, signal.SIGSTOP)  # amid its work
            with replicas[NEW]:
                # The user goes on, and the watches of the old leader fill.
                for number in range(JOBS):
                    await world.patch("FineTuneJob", f"job-{number}", {"spec": {"suspend": True}})
                await until("the new leader", lambda: leads(world, NEW), seconds=60)
                began = (await holder(world))["acquireTime"]
                os.kill(old.pid, signal.SIGCONT)
                await until("ended", lambda: asyncio.to_thread(lambda: not old.alive()), seconds=30)
                await until("suspended", lambda: suspended(world), seconds=120)
                await asyncio.sleep(1)
    audit = choice.cluster().audit
    after = audit(f"system:serviceaccount:{SYSTEM}:{OLD}", began)
    assert after is not None
    assert [describe(call) for call in after] == []
    before = audit(f"system:serviceaccount:{SYSTEM}:{OLD}", "")
    assert before, "the audit log knows the old leader"


async def leads(world: World, name: str) -> bool:
    return bool((await holder(world))["holderIdentity"] == name)


async def suspended(world: World) -> bool:
    states = [found.get("status", {}).get("state") for found in await world.all("FineTuneJob")]
    return states == ["Suspended"] * JOBS


def describe(call: Any) -> str:
    return f"{call['requestReceivedTimestamp']} {call['verb']} {call['requestURI']} {call['responseStatus']['code']}"
