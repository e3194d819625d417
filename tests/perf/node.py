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

from luthier_operator.client import ApiError, Client
from luthier_operator.model import Object

NODE = VOLUME = "luthier-bench"
CLAIM = "bench"
TAINT = {"key": "luthier.dev/bench", "effect": "NoSchedule"}
"""Keeps the pods of others away."""
HEARTBEAT_SECONDS = 5.0  # after 20 s without, the local cluster takes the pods away
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
