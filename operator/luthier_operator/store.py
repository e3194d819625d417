"""The last known state of the cluster: jobs, their children and pods, the ends of pods, and the metrics of pods.

It is updated by the watches, by the answers to the operator's own writes (so that a reconcile sees what the previous
one did), and by a periodic relist that drops objects whose deletion kopf has missed after a 410. Nothing is decided
here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from luthier_api.kinds import KINDS, FineTuneJob, JobKind
from luthier_api.metrics import CHECKPOINT_STEP, broken_checkpoints, checkpoint_step, samples_at_end
from luthier_api.status import Progress
from luthier_operator import naming
from luthier_operator.failure.pod_end import PodEnds, pod_end
from luthier_operator.model import ChildRef, Job, Key, Object, Observed
from luthier_operator.workloads import workload
from luthier_operator.workloads.sources import SOURCE_KIND, needed_jobs

DELETED_KEPT = 10_000  # uids of deleted objects, so that a late answer does not bring one back
OWNED = {"Job", "JobSet"}
WATCHED = {*KINDS, *OWNED, "Pod"}
"""Config maps and claims are created, but neither watched nor kept."""
READ = ("nodeName", "suspend")
"""Fields of the specs of pods, Jobs and JobSets that `children` and `failure` read."""
K = TypeVar("K")


class Owner(NamedTuple):
    """The job that an object belongs to, by its namespace and labels. The uid alone could be a copied label in another
    namespace.
    """

    key: Key
    uid: str


class Store:
    """Every change returns the keys of the jobs that it affects."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self.jobset_installed = True
        self._jobs: dict[Key, Object] = {}
        self._children: dict[Owner, dict[ChildRef, Object]] = {}
        self._pods: dict[Owner, dict[str, Object]] = {}
        self._ended: dict[Owner, PodEnds] = {}
        self._samples: dict[Owner, dict[int, dict[str, float]]] = {}
        self._sampled: dict[Owner, datetime] = {}
        self._dependents: dict[Key, set[Key]] = {}  # FineTuneJob → jobs that use its result
        self._deleted: OrderedDict[str, None] = OrderedDict()

    # Reading

    def job(self, key: Key) -> Object | None:
        return self._jobs.get(key)

    def keys(self) -> list[Key]:
        return list(self._jobs)

    def pods(self) -> Iterator[tuple[Owner, Object]]:
        """Pods of jobs that exist."""
        for owner, pods in self._pods.items():
            if self._exists(owner):
                yield from ((owner, pod) for pod in list(pods.values()))

    def pods_of(self, owner: Owner) -> list[Object]:
        return list(self._pods.get(owner, {}).values())

    def child(self, key: Key, ref: ChildRef) -> Object | None:
        job = self._jobs.get(key)
        return self._children.get(Owner(key, job["metadata"]["uid"]), {}).get(ref) if job else None

    def observed(self, job: Job) -> Observed:
        """Everything that is known about `job`."""
        owner = Owner(Key(naming.kind(job), job.metadata.namespace, job.metadata.name), job.metadata.uid)
        return Observed(
            job=job,
            children=dict(self._children.get(owner, {})),
            pods=list(self._pods.get(owner, {}).values()),
            ended=ends.all() if (ends := self._ended.get(owner)) else [],
            progress=self._progress(job, owner),
            checkpoint_step=checkpoint_step(first := self._samples.get(owner, {}).get(0, {})),
            broken_checkpoints=broken_checkpoints(first),
            sources=self._sources(job),
            jobset_installed=self.jobset_installed,
        )

    # Writing

    def put(self, found: Object) -> set[Key]:
        """Store `found`, unless it is older than the known object, or was deleted."""
        owner, meta = owner_of(found), found["metadata"]
        if owner is None or meta["uid"] in self._deleted or found["kind"] not in WATCHED:
            return set()
        known = self._known(owner, found)
        if known is not None and known["metadata"]["uid"] == meta["uid"] and version(known) >= version(found):
            return set()
        found = slim(found)
        if found["kind"] in KINDS:
            return self._put_job(owner.key, found, known)
        if found["kind"] == "Pod":
            self._pods.setdefault(owner, {})[meta["uid"]] = found
            # Pods exist for a moment after their job is deleted: their ends are not needed any more
            if owner.uid not in self._deleted:
                self._remember_end(owner, found)
        else:
            self._children.setdefault(owner, {})[ChildRef(found["kind"], meta["name"])] = found
        return {owner.key}

    def remove(self, gone: Object) -> set[Key]:
        """Remove an object that was deleted. `gone` is its last state."""
        owner, meta = owner_of(gone), gone["metadata"]
        if owner is None:
            return set()
        key = owner.key
        self._deleted[meta["uid"]] = None
        while len(self._deleted) > DELETED_KEPT:
            self._deleted.popitem(last=False)
        if gone["kind"] in KINDS:
            if (known := self._jobs.get(key)) and known["metadata"]["uid"] == meta["uid"]:
                del self._jobs[key]
                self._unlink(key, known)
            for remembered in (self._ended, self._samples, self._sampled):
                remembered.pop(owner, None)
            return {key} | self._dependents.get(key, set())
        if gone["kind"] == "Pod":
            # The Job controller deletes the other pods as soon as one has failed: their ends may be seen only now.
            if self._exists(owner):
                self._remember_end(owner, gone)
            _drop(self._pods, owner, meta["uid"])
        else:
            ref = ChildRef(gone["kind"], meta["name"])
            known = self._children.get(owner, {}).get(ref)
            if known and known["metadata"]["uid"] == meta["uid"]:
                _drop(self._children, owner, ref)
        return {key}

    def prune(self, kind: str, namespace: str | None, listed: set[str], list_version: str) -> set[Key]:
        """Remove objects of `kind` that are missing in a list of `list_version`: their deletion was missed.

        `listed`: the uids in the list.
        """
        touched: set[Key] = set()
        for known in self._all(kind):
            meta = known["metadata"]
            newer = version(known) > int(list_version)  # created while the list was under way
            if meta["uid"] not in listed and not newer and namespace in (None, meta["namespace"]):
                touched |= self.remove(known)
        return touched

    def put_samples(self, owner: Owner, samples: Mapping[int, dict[str, float]]) -> None:
        """Store metrics of pods, by node rank or shard. The last metrics of a deleted pod stay."""
        if owner.uid in self._deleted:
            return
        figures = self._samples.setdefault(owner, {})
        figures.update(samples)
        self._sampled[owner] = self._now()

    # Parts

    def _progress(self, job: Job, owner: Owner) -> Progress | None:
        return workload(job).progress(self._samples.get(owner, {}), self._sampled.get(owner))

    def _exists(self, owner: Owner) -> bool:
        job = self._jobs.get(owner.key)
        return job is not None and job["metadata"]["uid"] == owner.uid

    def _known(self, owner: Owner, found: Object) -> Object | None:
        if found["kind"] in KINDS:
            return self._jobs.get(owner.key)
        meta = found["metadata"]
        if found["kind"] == "Pod":
            return self._pods.get(owner, {}).get(meta["uid"])
        return self._children.get(owner, {}).get(ChildRef(found["kind"], meta["name"]))

    def _all(self, kind: str) -> list[Object]:
        if kind in KINDS:
            return [job for key, job in self._jobs.items() if key.kind == kind]
        if kind == "Pod":
            return [pod for pods in self._pods.values() for pod in pods.values()]
        return [child for children in self._children.values() for ref, child in children.items() if ref.kind == kind]

    def _put_job(self, key: Key, found: Object, known: Object | None) -> set[Key]:
        if known is not None:
            self._unlink(key, known)
        self._jobs[key] = found
        for source in source_keys(found):
            self._dependents.setdefault(source, set()).add(key)
        return {key} | self._dependents.get(key, set())

    def _unlink(self, key: Key, known: Object) -> None:
        for source in source_keys(known):
            dependents = self._dependents.get(source, set())
            dependents.discard(key)
            if not dependents:
                self._dependents.pop(source, None)

    def _remember_end(self, owner: Owner, pod: Object) -> None:
        end = pod_end(pod, self._now())
        if end is None or not self._ended.setdefault(owner, PodEnds()).put(end):
            return
        if end.phase == "run":  # its message is newer than the metric, and the next pod reports its own
            self._samples.get(owner, {}).get(0, {}).pop(CHECKPOINT_STEP.name, None)
        if end.exit_code == 0 and end.message and (last := samples_at_end(end.message.metrics)):
            self.put_samples(owner, {end.index: last})

    def _sources(self, job: Job) -> dict[str, FineTuneJob]:
        def find(name: str) -> FineTuneJob | None:
            try:
                found = self._jobs[Key(SOURCE_KIND, job.metadata.namespace, name)]
                return FineTuneJob.model_validate(found)
            except (KeyError, ValueError):  # missing or invalid: the job that needs it waits in both cases
                return None

        return {name: source for name, source in needed_jobs(job, find).items() if source}


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


def source_keys(job: Object) -> set[Key]:
    """The FineTuneJobs whose results `job` names."""
    spec = job.get("spec", {})
    names = [spec.get("model", {}).get("job"), *(a.get("job") for a in spec.get("adapters") or [])]
    return {Key(SOURCE_KIND, job["metadata"]["namespace"], name) for name in names if name}


def version(found: Object) -> int:
    """The resource version as a number, which grows: guaranteed since Kubernetes 1.35, and always true with etcd."""
    return int(found["metadata"]["resourceVersion"])


def slim(found: Object) -> Object:
    """`found` without the fields that are never read, which take most of the memory. Of the spec of a child, only the
    fields in READ stay.
    """
    meta = {k: v for k, v in found["metadata"].items() if k != "managedFields"}
    spec = found.get("spec", {})
    kept = spec if found["kind"] in KINDS else {k: spec[k] for k in READ if k in spec}
    return found | {"metadata": meta, "spec": kept}


def _drop(by_job: dict[Owner, dict[K, Object]], owner: Owner, inner: K) -> None:
    by_job.get(owner, {}).pop(inner, None)
    if not by_job.get(owner, True):
        del by_job[owner]
