"""The volumes of a pod, where they are mounted, and whose files the kubelet may change.

With an fsGroup the kubelet gives every file on a volume to that group and changes its mode, unless the volume is
read-only at its source; `readOnly` of a mount does not count. So claims that a pod only reads are read-only at both,
and a claim of the user, which may hold other data, gets no fsGroup unless the job asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.naming import CONFIG, SOURCES, WORKSPACE, Place
from luthier_operator.render.resources import tmp_size

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload

RUN_FOLDER_SIZE = "64Mi"  # stop flag, heartbeat, one message of at most 4 KiB a rank


def volumes_of(
    workload: Workload, settings: Settings, phase: Phase, sources: Mapping[str, Place]
) -> tuple[list[Object], list[Object]]:
    """Volumes and mounts. Each claim is one volume, however often it is mounted: the kubelet does not start a pod that
    has a claim twice.
    """
    job = workload.job
    own = naming.place(job).claim
    claims = {own: "workspace"}
    shared = max(1, workload.gpus_per_pod) if phase == "run" else 1
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": tmp_size(workload, settings, phase)}},
        {"name": "run", "emptyDir": {"sizeLimit": RUN_FOLDER_SIZE}},
        # The default of 64 MiB is too small for data loaders and NCCL. It counts towards the memory limit.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared}Gi"}},
        {"name": "config", "configMap": {"name": naming.config_name(job)}},
        {"name": "workspace", "persistentVolumeClaim": {"claimName": own}},
    ]
    mounts: list[Object] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "run", "mountPath": "/run/luthier"},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
        {"name": "workspace", "mountPath": WORKSPACE},
    ]

    def mount(claim: str, path: str) -> None:
        if claim not in claims:
            claims[claim] = f"claim-{len(claims)}"
            # Of this pod only: other pods, on the same node too, may write to the claim.
            source = {"claimName": claim, "readOnly": True}
            volumes.append({"name": claims[claim], "persistentVolumeClaim": source})
        mounts.append({"name": claims[claim], "mountPath": path, "readOnly": True})

    for claim in sorted({place.claim for place in sources.values()} - {own}):
        mount(claim, f"{SOURCES}/{claim}")
    for i, volume in enumerate(job.spec.volumes):
        if volume.claim_name:
            mount(volume.claim_name, volume.mount_path)
        else:
            volumes.append({"name": f"configmap-{i}", "configMap": {"name": volume.config_map}})
            mounts.append({"name": f"configmap-{i}", "mountPath": volume.mount_path, "readOnly": True})
    return volumes, mounts


def workspace_group(job: Job, group: int | None) -> Object:
    """The fields of a pod's security context that let `group` write to the workspace. None: the cluster sets them.

    A new volume belongs to root, so the claim that the operator creates needs them. OnRootMismatch: the files are
    changed once, and not at each start of a pod.
    """
    workspace = job.spec.workspace
    if group is None:
        return {}
    if workspace.claim_name and workspace.ownership == "Keep":
        return {}
    return {"fsGroup": group, "fsGroupChangePolicy": "OnRootMismatch"}
