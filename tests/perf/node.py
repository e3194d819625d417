"""A node of the benchmark: it has no kubelet, the benchmark writes what one would.

On the clusters of users the claim of a job exists, and the pod of `prepare` gets its node and runs within seconds.
Without the claim the scheduler reports it as missing, and the operator says so for each job whose pod waits longer
than 15 s: a status and an Event that no healthy job has. A real kubelet would pull images and start containers on the
machine that is measured. So the claim exists, and its volume can only be used on this node: the scheduler chooses it
for all pods that name no other scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from luthier_operator.client import RESOURCES, ApiError, Client
from luthier_operator.model import Object

NODE = VOLUME = "luthier-bench"
CLAIM = "bench"
TAINT = {"key": "luthier.dev/bench", "effect": "NoSchedule"}
"""Keeps the pods of others away."""
HEARTBEAT_SECONDS = 5.0  # after 20 s without, the local cluster takes the pods away
AT_ONCE = 8  # requests
ALLOCATABLE = {"cpu": "100k", "memory": "1Pi", "pods": "100k", "ephemeral-storage": "1Pi"}


def objects(namespace: str) -> list[Object]:
    """The node, and a claim in `namespace` that is bound to a volume of the node."""
    hostname = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    size, modes = "1Ti", ["ReadWriteMany"]
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}},
            "spec": {"taints": [TAINT]},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": VOLUME},
            "spec": {
                "capacity": {"storage": size},
                "accessModes": modes,
                "hostPath": {"path": "/nonexistent"},
                "claimRef": {"namespace": namespace, "name": CLAIM},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [hostname]}]}},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM, "namespace": namespace},
            "spec": {
                "storageClassName": "",
                "volumeName": VOLUME,
                "accessModes": modes,
                "resources": {"requests": {"storage": size}},
            },
        },
    ]


def create(namespace: str) -> None:
    """Raises CalledProcessError if the cluster refuses it."""
    for found in objects(namespace):
        subprocess.run(
            ["kubectl", "create", "-f", "-"], input=json.dumps(found), check=True, capture_output=True, text=True
        )


@contextlib.asynccontextmanager
async def ready(client: Client) -> AsyncIterator[None]:
    """The node is ready, as long as this lasts."""
    await beat(client)
    beating = asyncio.create_task(beats(client))
    try:
        yield
    finally:
        beating.cancel()


async def beats(client: Client) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        with contextlib.suppress(ApiError):
            await beat(client)


async def beat(client: Client) -> None:
    """What a kubelet writes. Raises ApiError."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    well = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
    status = {"capacity": ALLOCATABLE, "allocatable": ALLOCATABLE, "conditions": [well]}
    path = f"/api/v1/nodes/{NODE}/status"
    await client._request("PATCH", path, None, {"status": status}, "application/merge-patch+json")


class Kubelet:
    """Lets the pods of a namespace run as soon as they have this node: the operator reports those that take long."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client, self._namespace = client, namespace
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until cancelled."""
        pods, version = RESOURCES["Pod"], "0"
        while True:
            with contextlib.suppress(ApiError):
                async for event, pod in self._client.watch(pods, self._namespace, "", version):
                    if event == "ERROR":
                        version = "0"
                        break
                    version = pod["metadata"]["resourceVersion"]
                    name = pod["metadata"].get("name")  # a bookmark has none
                    if name and pod["spec"].get("nodeName") == NODE and name not in self._tasks:
                        self._tasks[name] = asyncio.create_task(self._start(name))
            await asyncio.sleep(0.1)

    async def _start(self, name: str) -> None:
        path = RESOURCES["Pod"].path(self._namespace, name, "status")
        async with self._slots:
            with contextlib.suppress(ApiError):  # it was deleted
                patch = {"status": running_pod_status()}
                await self._client._request("PATCH", path, None, patch, "application/merge-patch+json")

    async def started(self, pods: int) -> None:
        """Wait until so many pods run."""
        while sum(task.done() for task in self._tasks.values()) < pods:
            await asyncio.sleep(0.2)


def running_pod_status() -> Object:
    """Of a pod whose container has just started, as a kubelet writes it."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    names = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    container = {"name": "trainer", "image": "", "imageID": "", "ready": True, "restartCount": 0}
    return {
        "phase": "Running",
        "startTime": now,
        "conditions": [{"type": name, "status": "True", "lastTransitionTime": now} for name in names],
        "containerStatuses": [container | {"state": {"running": {"startedAt": now}}}],
    }
