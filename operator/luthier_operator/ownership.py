"""Which job an object belongs to."""

from __future__ import annotations

from typing import NamedTuple

from luthier_api.kinds import KINDS, JobKind
from luthier_operator import naming
from luthier_operator.model import Job, Key, Object

OWNED = {"Job", "JobSet"}


class Owner(NamedTuple):
    """The job that an object belongs to, by its namespace and labels. The uid alone could be a copied label in another
    namespace.
    """

    key: Key
    uid: str


def owner_of_job(job: Job) -> Owner:
    return Owner(Key(naming.kind(job), job.metadata.namespace, job.metadata.name), naming.uid(job))


def owner_of(found: Object) -> Owner | None:
    """The job that an object is, or belongs to. None for any other object."""
    meta = found.get("metadata", {})
    if found.get("kind") in KINDS:
        return Owner(Key(JobKind(found["kind"]), meta["namespace"], meta["name"]), meta["uid"])

    labels = meta.get("labels") or {}
    kind, name, uid = labels.get(naming.KIND_LABEL), labels.get(naming.JOB_LABEL), labels.get(naming.UID_LABEL)
    if kind not in KINDS or not name or not uid:
        return None
    # Labels are kept in copies and backups, so the object must also be owned.
    owners = meta.get("ownerReferences") or []
    if found["kind"] in OWNED and uid not in {owner["uid"] for owner in owners}:
        return None
    if found["kind"] == "Pod" and not any(is_job_of(JobKind(kind), name, owner) for owner in owners):
        return None
    return Owner(Key(JobKind(kind), meta["namespace"], name), uid)


def is_job_of(kind: JobKind, name: str, owner: Object) -> bool:
    """Whether an owner reference of a pod names a Job that does the work of this job.

    By name, because the Jobs of a JobSet are not watched, and because pods are seen before and after their Job. That is
    enough: the garbage collector deletes a pod if no Job with this name has the uid of the reference.
    """
    return bool(owner.get("controller")) and owner["kind"] == "Job" and owner["name"] in naming.job_names(kind, name)
