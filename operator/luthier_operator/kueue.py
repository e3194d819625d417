"""What Kueue says about a child of a job: its Workload, and the condition Admitted that follows from it.

Kueue makes one Workload for each JobSet or Job that names a queue, owned by it, and tells in its conditions whether the
child may start. The child itself only shows `spec.suspend`. Reasons and messages as seen with Kueue v0.19.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from luthier_api.conditions import Reason
from luthier_operator import naming
from luthier_operator.model import Key, KueueCondition, KueueWorkload, Object
from luthier_operator.statuses import Value

WORKLOAD = "Workload"
NEVER_FITS = ("maximum capacity", "unavailable in ClusterQueue")
"""In messages of Kueue about a request that its quota cannot meet even while nothing else runs."""
STOPPED = "Deactivated"
"""Kueue's reason for a Workload with `spec.active: false`, set by a user. Kueue's own decisions begin with it."""


@dataclass(frozen=True)
class Verdict:
    """Status, reason and message of the condition Admitted."""

    value: Value
    reason: str
    message: str


class Workloads:
    """The Workloads of children of jobs, by the uid of the child. Every change returns the jobs that it affects.

    A Workload belongs to a job by the name of its owner, so that it may be seen before the child is.
    """

    def __init__(self) -> None:
        self.listed = False
        """Whether all are known. False without Kueue, and without the right to read its Workloads."""
        self._by_child: dict[str, tuple[Key, KueueWorkload]] = {}

    def of(self, child: Object | None) -> KueueWorkload | None:
        _, found = self._by_child.get(child["metadata"]["uid"] if child else "", (None, None))
        return found

    def put(self, found: Object) -> set[Key]:
        read = read_workload(found)
        if read is None:
            return set()
        key, now = read
        _, known = self._by_child.get(now.child, (None, None))
        if known and known.version >= now.version:
            return set()
        self._by_child[now.child] = read
        unchanged = known is not None and replace(known, version=now.version) == now
        return set() if unchanged else {key}

    def remove(self, gone: Object) -> set[Key]:
        uid = gone["metadata"]["uid"]
        return self._drop({child for child, (_, known) in self._by_child.items() if known.uid == uid})

    def prune(self, namespace: str | None, listed: set[str], list_version: int) -> set[Key]:
        """Remove those that are missing in a list, as `Store.prune` does."""
        return self._drop(
            {
                child
                for child, (key, known) in self._by_child.items()
                if known.uid not in listed and known.version <= list_version and namespace in (None, key.namespace)
            }
        )

    def _drop(self, children: set[str]) -> set[Key]:
        return {self._by_child.pop(child)[0] for child in children}


def read_workload(found: Object) -> tuple[Key, KueueWorkload] | None:
    """The job to which a Workload belongs, and what is kept of it. None for a Workload of anything else."""
    meta, status = found["metadata"], found.get("status") or {}
    for owner in meta.get("ownerReferences") or []:
        job = naming.job_of_child(owner["name"], "run")
        if job is None or owner["kind"] not in ("Job", "JobSet"):
            continue
        kind, name = job
        return Key(kind, meta["namespace"], name), KueueWorkload(
            name=meta["name"],
            uid=meta["uid"],
            version=int(meta["resourceVersion"]),
            child=owner["uid"],
            conditions={
                c["type"]: KueueCondition(c["status"] == "True", c.get("reason", ""), c.get("message", ""))
                for c in status.get("conditions") or []
            },
            requeue_at=(status.get("requeueState") or {}).get("requeueAt"),
            checks={check["name"]: check for check in status.get("admissionChecks") or []},
        )
    return None


def verdict(found: KueueWorkload) -> Verdict | None:
    """What the Workload says now. None where nothing is to be said any more: the child has finished."""
    if found.is_true("Finished"):
        return None
    # Before Admitted, which stays True until the evicted pods have ended.
    if found.is_true("Evicted"):
        return evicted(found)
    if found.is_true("Admitted"):
        return Verdict("True", Reason.ADMITTED, found.conditions["Admitted"].message)
    reserved = found.conditions.get("QuotaReserved")
    if reserved is None:
        return Verdict("False", Reason.PENDING, "it waits behind others in the queue")
    if reserved.is_true:
        return Verdict("False", Reason.QUOTA_RESERVED, f"quota is reserved; {waits_for(found.checks)}")
    if any(text in reserved.message for text in NEVER_FITS):
        remedy = "the quota of the ClusterQueue cannot meet this request at all: ask for less, or have it raised"
        return Verdict("False", Reason.UNSATISFIABLE, f"{reserved.message}; {remedy}")
    return Verdict("False", reserved.reason, reserved.message)


def evicted(found: KueueWorkload) -> Verdict:
    """Kueue has stopped the pods: why, and what it waits for now."""
    eviction, reserved = found.conditions["Evicted"], found.conditions.get("QuotaReserved")
    message = eviction.message
    if eviction.reason == STOPPED:
        return Verdict(
            "False", eviction.reason, f"{message}: set spec.active of Workload {found.name} to true to go on"
        )
    if eviction.reason.startswith(STOPPED):
        remedy = (
            "Kueue does not try again. Repair what kept the pods from starting, then set spec.suspend to true and back"
            " to false: the job queues again, and goes on from its checkpoint"
        )
        return Verdict("False", eviction.reason, f"{message}. {remedy}")
    if found.requeue_at:
        message += f"; it queues again at {found.requeue_at}"
    elif reserved and not reserved.is_true and reserved.message not in message:
        message += f". Now: {reserved.message}"
    return Verdict("False", eviction.reason, message)


def waits_for(checks: Mapping[str, Object]) -> str:
    pending = [
        f"{name} ({check.get('state', 'Pending')}{(check.get('message') and ': ' + check['message']) or ''})"
        for name, check in sorted(checks.items())
        if check.get("state") != "Ready"
    ]
    return f"waiting for the admission checks {', '.join(pending)}" if pending else "admission follows"
