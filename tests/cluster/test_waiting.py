"""Jobs that cannot start, and what they say: the words of the real scheduler, controllers and kubelet, with the field
and what helps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.operating import NOWHERE, World, connected, job, kubectl, namespaces, operator
from luthier_operator.model import Object

pytestmark = pytest.mark.cluster
PLAIN, QUOTA, UNSAID, LIMITED = (f"test-waiting-{name}" for name in ("plain", "quota", "unsaid", "limited"))
ADMINISTRATION: dict[str, Object] = {
    QUOTA: {"kind": "ResourceQuota", "spec": {"hard": {"requests.memory": "16Mi"}}},
    UNSAID: {"kind": "ResourceQuota", "spec": {"hard": {"limits.cpu": "64"}}},
    LIMITED: {"kind": "LimitRange", "spec": {"limits": [{"type": "Container", "max": {"memory": "16Mi"}}]}},
}
"""Namespace → what an administrator has put there."""


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    begin: str
    """Of the message, before the cluster's own words."""
    quotes: str
    remedy: str
    """The end of the message."""
    condition: str = "Prepared"
    namespace: str = PLAIN
    spec: dict[str, Any] = field(default_factory=dict)


OTHER_CLAIM = "Create that claim in this namespace, or name another one; `kubectl describe pvc {0}` says what it lacks"
REFUSES = "the cluster refuses the pods of Job ftj-{0}-prepare: Error creating: "
CASES = (
    Case(
        name="no-claim",
        spec={"workspace": {"claimName": "nobodys"}},
        reason="WaitingForVolume",
        begin="spec.workspace.claimName: claim nobodys is not ready: ",
        quotes='persistentvolumeclaim "nobodys" not found. (pod ',
        remedy=OTHER_CLAIM.format("nobodys"),
    ),
    Case(
        name="no-data",
        spec={"volumes": [{"name": "data", "claimName": "gone", "mountPath": "/data"}]},
        reason="WaitingForVolume",
        begin="spec.volumes[0].claimName: claim gone is not ready: ",
        quotes='persistentvolumeclaim "gone" not found. (pod ',
        remedy=OTHER_CLAIM.format("gone"),
    ),
    Case(
        name="no-class",
        spec={"workspace": {"storageClassName": "none", "size": "1Gi"}},
        reason="WaitingForVolume",
        begin="spec.workspace: claim ftj-no-class is not ready: ",
        quotes="pod has unbound immediate PersistentVolumeClaims. (pod ",
        remedy="`kubectl describe pvc ftj-no-class` says more",
    ),
    Case(
        name="no-priority",
        spec={"scheduling": {"priorityClassName": "nobodys"}},
        reason="NoPods",
        begin="spec.scheduling.priorityClassName: " + REFUSES.format("no-priority"),
        quotes="no PriorityClass with name nobodys was found",
        remedy="To solve it: name one that `kubectl get priorityclasses` shows",
    ),
    Case(
        name="no-memory",
        spec={"prepare": {"memory": "90Ti"}},
        reason="Unschedulable",
        begin="spec.prepare.memory: pod ftj-no-memory-prepare-",
        quotes=" 1 Insufficient memory. ",
        remedy="To solve it: ask for no more than one node has, or wait until other pods have ended",
    ),
    Case(
        name="no-node",
        spec={"scheduling": NOWHERE},
        condition="Running",
        reason="Unschedulable",
        begin="spec.scheduling: pod ftj-no-node-run-",
        quotes=" 1 node(s) didn't match Pod's node affinity/selector",
        remedy="To solve it: set nodeSelector and affinity to labels that `kubectl get nodes --show-labels` shows",
    ),
    Case(
        name="no-gpu",
        spec={"resources": {"gpusPerNode": 64}, "training": {"batchSize": 64}},
        condition="Running",
        reason="Unschedulable",
        begin="spec.resources.gpusPerNode: pod ftj-no-gpu-run-",
        quotes=" 1 Insufficient nvidia.com/gpu. ",
        remedy="To solve it: ask for no more than one node has, or wait until other pods have ended",
    ),
    Case(
        name="no-image",
        reason="ImagePullFailed",
        begin="registry.example/trainer:latest cannot be pulled for pod ftj-no-image-prepare-",
        quotes="An administrator sets it by trainer.image (chart)",
        remedy="",  # the error of the registry
    ),
    Case(
        name="over-quota",
        namespace=QUOTA,
        reason="NoPods",
        begin="spec.prepare: " + REFUSES.format("over-quota"),
        quotes="exceeded quota: set, requested: requests.memory=512Mi, used: requests.memory=0, limited: requests",
        remedy="wait until other pods of the namespace have ended, or have its ResourceQuota raised",
    ),
    Case(
        name="unsaid",
        namespace=UNSAID,
        reason="NoPods",
        begin="spec.prepare: " + REFUSES.format("unsaid"),
        quotes="failed quota: set: must specify limits.cpu for: trainer",
        remedy="To solve it: set what the ResourceQuota of the namespace asks for",
    ),
    Case(
        name="request-over-limit",
        namespace=LIMITED,
        reason="NoPods",
        begin="spec.prepare: " + REFUSES.format("request-over-limit"),
        quotes='Invalid value: "512Mi": must be less than or equal to memory limit of 16Mi',
        remedy="To solve it: stay within the LimitRange of the namespace, or have it changed",
    ),
    Case(
        name="over-limit",
        namespace=LIMITED,
        spec={"prepare": {"memory": "1Gi"}},
        reason="NoPods",
        begin="spec.prepare: " + REFUSES.format("over-limit"),
        quotes="maximum memory usage per Container is 16Mi, but limit is 1Gi",
        remedy="To solve it: stay within the LimitRange of the namespace, or have it changed",
    ),
)


async def test_a_job_that_cannot_start_says_which_field_and_what_helps(cluster: None) -> None:
    """All at once: each waits for half a minute before it is called late."""
    every = (PLAIN, QUOTA, UNSAID, LIMITED)
    with namespaces(*every), operator(*every):
        async with connected() as client:
            for namespace, made in ADMINISTRATION.items():
                document = {"apiVersion": "v1", "metadata": {"name": "set"}} | made
                kubectl("-n", namespace, "create", "-f", "-", document=document)
            for case in CASES:
                spec = {"workspace": {"size": "1Gi"}, "scheduling": {}} | case.spec
                await World(client, case.namespace).create(job("FineTuneJob", case.name, **spec))
            for case in CASES:
                world = World(client, case.namespace)
                if case.condition == "Running":
                    await world.prepare(case.name)
                found = await world.until_condition("FineTuneJob", case.name, case.condition, case.reason, seconds=90)
                message = found["message"]
                assert message.startswith(case.begin), message
                assert case.quotes in message
                assert message.endswith(case.remedy), message
