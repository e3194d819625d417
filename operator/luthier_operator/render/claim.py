"""The claim of the workspace, for a job that names none."""

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
    """The claim, or None if the job names an existing one.

    It has an owner only with `whenDeleted: Delete`: otherwise the results stay when the job is deleted.
    """
    job = workload.job
    workspace = job.spec.workspace
    if workspace.claim_name:
        return None
    access_mode = "ReadWriteMany" if workload.parallel_pods > 1 else "ReadWriteOnce"
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
    """The message about a claim of an earlier job that is too small for this job. None if it is large enough."""
    asked = wanted["spec"]["resources"]["requests"]["storage"]
    has = (
        found.get("status", {}).get("capacity", {}).get("storage") or found["spec"]["resources"]["requests"]["storage"]
    )
    if amount(has) >= amount(asked):
        return None
    return (
        f"spec.workspace.size: {asked} are requested, but the claim {found['metadata']['name']} of an earlier job"
        f" has {has}. Resize the claim, delete it with the results on it, or give this job another name"
    )
