"""What every child's metadata says: its name, whose it is, and that it goes when the job goes."""

from __future__ import annotations

from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.model import Job, Object


def metadata(
    job: Job, name: str, phase: Phase | None = None, annotations: dict[str, str] | None = None, owned: bool = True
) -> Object:
    """`owned`: deleted together with the job. A job that no API server has seen cannot own anything."""
    meta: Object = {"name": name, "namespace": job.metadata.namespace, "labels": naming.labels(job, phase)}
    if annotations:
        meta["annotations"] = annotations
    if owned and job.metadata.uid:
        meta["ownerReferences"] = [
            {
                "apiVersion": job.api_version,
                "kind": job.kind,
                "name": job.metadata.name,
                "uid": job.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    return meta
