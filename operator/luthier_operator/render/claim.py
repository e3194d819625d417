"""The workspace's claim, when the job brings none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_api.quantity import amount, canonical
from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.render.meta import metadata

if TYPE_CHECKING:
    from luthier_operator.settings import Settings
    from luthier_operator.workloads.base import Workload


def claim(workload: Workload, settings: Settings) -> Object | None:
    """None when the job names an existing one. Without an owner, unless the job says Delete: results outlive the job
    and its TTL.
    """
    job = workload.job
    workspace = job.spec.workspace
    if workspace.claim_name:
        return None
    access_mode = "ReadWriteMany" if workload.pods > 1 else "ReadWriteOnce"
    spec: Object = {
        "accessModes": [workspace.access_mode or access_mode],
        "resources": {"requests": {"storage": canonical(workspace.size or settings.workspace_size)}},
    }
    if workspace.storage_class_name:
        spec["storageClassName"] = workspace.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(job, naming.place(job).claim, owned=workspace.when_deleted == "Delete"),
        "spec": spec,
    }


def shortfall(wanted: Object, found: Object) -> str | None:
    """What to say when the claim that an earlier job left is smaller than the one that this job would make. None when
    it is large enough.
    """
    asked = wanted["spec"]["resources"]["requests"]["storage"]
    has = (
        found.get("status", {}).get("capacity", {}).get("storage") or found["spec"]["resources"]["requests"]["storage"]
    )
    if amount(has) >= amount(asked):
        return None
    return (
        f"spec.workspace.size: {asked} are wanted, and the claim {found['metadata']['name']}, which an earlier job"
        f" left, has {has}. Resize the claim, delete it with the results on it, or give this job another name"
    )
