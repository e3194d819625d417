"""The metadata of children: name, labels, annotations, owner."""

from __future__ import annotations

from luthier_api.status import Phase
from luthier_operator import naming
from luthier_operator.model import Job, Object


def metadata(
    job: Job, name: str, phase: Phase | None = None, annotations: dict[str, str] | None = None, owned: bool = True
) -> Object:
    """Metadata of a child. `owned`: it is deleted with the job. A job without a uid, which exists in no cluster, owns
    nothing.
    """
    meta: Object = {"name": name, "namespace": job.metadata.namespace, "labels": naming.labels(job, phase)}
    found = dict(annotations or {})
    if phase and job.status.resumes:
        found[naming.RESUMES_ANNOTATION] = str(job.status.resumes)
    if found:
        meta["annotations"] = found
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
