"""What the store keeps of an object. All objects pass through here, so the operator's memory is bounded here.

A pod as the API server sends it takes 30 KiB of Python objects, of which 1 KiB is ever read. A job is kept as text,
because it is read only when it is reconciled, and most jobs of a cluster have ended.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from luthier_api.conditions import ConditionType
from luthier_api.kinds import JobKind
from luthier_api.status import State
from luthier_operator import naming, wire
from luthier_operator.model import Key, Object
from luthier_operator.statuses import moment

META = tuple(name for name in wire.Meta.__annotations__ if name not in ("labels", "annotations", "ownerReferences"))
OWN = "luthier.dev/"
"""Prefix of our own labels and annotations, which are kept. kubectl keeps a copy of the whole object in another one."""
LABELS = {naming.RESTART_LABEL, naming.INDEX_ANNOTATION, *naming.CHILD_LABELS}
ANNOTATIONS = {naming.INDEX_ANNOTATION, naming.INDEX_FAILURES_ANNOTATION, naming.INDEX_IGNORED_ANNOTATION}
SPEC = tuple(name for name in wire.Spec.__annotations__ if name != "containers")
"""Of a pod's containers only its end is asked, which is read before."""
STATUS = tuple(name for name in wire.Status.__annotations__ if name not in ("conditions", "containerStatuses"))
CONDITION = ("type", "status", "reason", "message", "lastTransitionTime")
CONDITIONS_NOT_READ = {
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "SuccessCriteriaMet",
    "FailureTarget",
}
"""The other conditions of pods, Jobs and JobSets are kept: a controller or a queue may set any."""


def project(found: Object) -> Object:
    """What `children` and `failure` read of a Job, a JobSet or a pod.

    Keys and short values are shared between all objects.
    """
    meta, status = found["metadata"], found.get("status") or {}
    kept_meta = _some(meta, META)
    kept_meta["namespace"] = sys.intern(meta["namespace"])
    if owners := meta.get("ownerReferences"):
        kept_meta["ownerReferences"] = [{"uid": owner["uid"]} for owner in owners]
    if labels := _named(meta.get("labels"), LABELS):
        kept_meta["labels"] = labels
    if annotations := _named(meta.get("annotations"), ANNOTATIONS):
        kept_meta["annotations"] = annotations

    kept_status = _some(status, STATUS)
    conditions = [c for c in status.get("conditions") or [] if c["type"] not in CONDITIONS_NOT_READ]
    if conditions:
        kept_status["conditions"] = [_some(c, CONDITION) for c in conditions]
    containers = [c for c in status.get("containerStatuses") or [] if c["name"] == naming.CONTAINER]
    if containers:
        kept_status["containerStatuses"] = [_some(c, ("name", "state")) for c in containers]

    kept: Object = {"kind": found["kind"], "metadata": kept_meta}
    if spec := _some(found.get("spec") or {}, SPEC):
        kept["spec"] = spec
    if kept_status:
        kept["status"] = kept_status
    return kept


def changed(before: Object, after: Object) -> bool:
    """Whether two projections of one object differ in more than their version: no other change means anything to
    anybody here.
    """
    version = {"resourceVersion": after["metadata"]["resourceVersion"]}
    return before | {"metadata": before["metadata"] | version} != after


class Edition(NamedTuple):
    """What changes whenever somebody edits the spec of a job, deletes it, or creates it again."""

    uid: str
    generation: int | None
    deleted: str | None


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A FineTuneJob or GenerateJob as text, with what is asked about all jobs."""

    uid: str
    version: int
    edition: Edition
    text: bytes
    state: str
    """The column STATE of kubectl."""
    outcome: str
    """Its state and its conditions, as far as a job that uses its result reads them."""
    waits: bool
    """Whether it has not been accepted yet: it may wait for the result of another job."""
    finished: bool
    completed_at: datetime | None
    sources: tuple[Key, ...]
    """The jobs whose results it names."""

    @classmethod
    def of(cls, found: Object) -> KeptJob:
        meta, status = found["metadata"], found.get("status") or {}
        kept_meta = {name: value for name, value in meta.items() if name not in ("managedFields", "annotations")}
        if own := _named(meta.get("annotations"), set()):
            kept_meta["annotations"] = own
        conditions = {c.get("type"): c.get("status") for c in status.get("conditions") or []}
        completed_at = _moment(status.get("completionTime"))
        ended = "True" in (conditions.get(ConditionType.COMPLETE), conditions.get(ConditionType.FAILED))
        finished = ended or completed_at is not None
        state = status.get("state") or State.PENDING
        outcome = " ".join([state, *(f"{name}={value}" for name, value in conditions.items())])
        return cls(
            uid=meta["uid"],
            version=version(found),
            edition=edition(found),
            text=msgspec.json.encode(found | {"metadata": kept_meta}),
            state=sys.intern(str(state)),
            outcome=sys.intern(outcome),
            waits=not finished and conditions.get(ConditionType.ACCEPTED) != "True",
            finished=finished,
            completed_at=completed_at,
            sources=source_keys(found),
        )

    def object(self) -> Object:
        """The job as the API server sent it, without what is never read. A new object each time."""
        found: Object = msgspec.json.decode(self.text)
        return found


def source_keys(job: Object) -> tuple[Key, ...]:
    """The jobs whose results `job` names."""
    spec, namespace = job.get("spec") or {}, job["metadata"]["namespace"]
    names = [(spec.get("model") or {}).get("job"), *(a.get("job") for a in spec.get("adapters") or [])]
    inputs = (spec.get("inputs") or {}).get("job")
    trained = [Key(JobKind.FINE_TUNE, namespace, name) for name in dict.fromkeys(names) if name]
    return (*trained, *([Key(JobKind.GENERATE, namespace, inputs)] if inputs else []))


def edition(job: Object) -> Edition:
    meta = job["metadata"]
    return Edition(meta["uid"], meta.get("generation"), meta.get("deletionTimestamp"))


def version(found: Object) -> int:
    """The resource version as a number, which grows: guaranteed since Kubernetes 1.35, and always true with etcd."""
    return int(found["metadata"]["resourceVersion"])


def _named(found: dict[str, str] | None, names: set[str]) -> dict[str, str]:
    """Our own labels or annotations, and those of `names`."""
    return {name: value for name, value in (found or {}).items() if name in names or name.startswith(OWN)}


def _moment(text: object) -> datetime | None:
    """The time, if it is one: an operator of another version may have written the status."""
    try:
        return moment(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _some(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}
