"""What the cluster last said: jobs, their children and pods, the ends of pods, and what the pods' metrics tell.

Fed by the watches, by the answers to our own writes (so that a reconcile sees what the one before it did), and by a periodic relist that
drops what kopf keeps after a 410. Nothing is decided here. Neighbours: `watch` feeds it, `reconcile` reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from luthier_api.kinds import KINDS, FineTuneJob, GenerateJob, JobKind, parse_job
from luthier_api.metrics import checkpoint_step, progress_of, samples_at_end
from luthier_api.status import Progress
from luthier_operator import naming
from luthier_operator.failure import pod_end
from luthier_operator.model import ChildRef, Job, Key, Object, Observed, PodEnd

ENDS_KEPT = 256  # of each job; older ones are in its status by then
DELETED_KEPT = 10_000  # uids that are remembered as deleted, against answers that were under way meanwhile
WATCHED = {*KINDS, "Job", "JobSet", "Pod"}
"""Config maps and claims are applied and not watched: what is known of them would only grow old."""
READ = ("nodeName", "suspend")
"""What `children` and `failure` read of the specs of pods, Jobs and JobSets."""
K = TypeVar("K")


class Store:
    """Every change returns the keys of the jobs that it concerns."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self.jobset_installed = True
        self._jobs: dict[Key, Object] = {}
        self._children: dict[str, dict[ChildRef, Object]] = {}  # by the job's uid, as everything below
        self._pods: dict[str, dict[str, Object]] = {}
        self._ended: dict[str, OrderedDict[str, PodEnd]] = {}
        self._samples: dict[str, dict[int, dict[str, float]]] = {}
        self._sampled: dict[str, datetime] = {}
        self._dependents: dict[Key, set[Key]] = {}  # FineTuneJob → jobs that use its result
        self._deleted: OrderedDict[str, None] = OrderedDict()

    # Reading

    def job(self, key: Key) -> Object | None:
        return self._jobs.get(key)

    def keys(self) -> list[Key]:
        return list(self._jobs)

    def pods(self) -> Iterator[tuple[Key, str, Object]]:
        """Live pods, with key and uid of their job."""
        for uid, pods in self._pods.items():
            for pod in list(pods.values()):
                if key := key_of(pod):
                    yield key, uid, pod

    def child(self, key: Key, ref: ChildRef) -> Object | None:
        return self._children.get(self._uid(key), {}).get(ref)

    def observed(self, job: Job) -> Observed:
        """All that is known of `job`."""
        uid = job.metadata.uid
        return Observed(
            job=job,
            children=dict(self._children.get(uid, {})),
            pods=list(self._pods.get(uid, {}).values()),
            ended=list(self._ended.get(uid, {}).values()),
            progress=self._progress(job),
            checkpoint_step=checkpoint_step(self._samples.get(uid, {}).get(0, {})),
            sources=self._sources(job),
            jobset_installed=self.jobset_installed,
        )

    # Writing

    def put(self, found: Object) -> set[Key]:
        """`found` exists and looks like this. Older than what is known, or deleted since, it changes nothing."""
        key, meta = key_of(found), found["metadata"]
        if key is None or meta["uid"] in self._deleted or found["kind"] not in WATCHED:
            return set()
        known = self._known(key, found)
        if known is not None and known["metadata"]["uid"] == meta["uid"] and version(known) >= version(found):
            return set()
        found = slim(found)
        if found["kind"] in KINDS:
            return self._put_job(key, found, known)
        uid = meta["labels"][naming.UID_LABEL]
        if found["kind"] == "Pod":
            self._pods.setdefault(uid, {})[meta["uid"]] = found
            if uid not in self._deleted:  # pods outlive their job by a moment: nobody asks for their ends any more
                self._remember_end(uid, found)
        else:
            self._children.setdefault(uid, {})[ChildRef(found["kind"], meta["name"])] = found
        return {key}

    def remove(self, gone: Object) -> set[Key]:
        """`gone` exists no more; this is how it looked at last."""
        key, meta = key_of(gone), gone["metadata"]
        if key is None:
            return set()
        self._deleted[meta["uid"]] = None
        while len(self._deleted) > DELETED_KEPT:
            self._deleted.popitem(last=False)
        if gone["kind"] in KINDS:
            if (known := self._jobs.get(key)) and known["metadata"]["uid"] == meta["uid"]:
                del self._jobs[key]
                self._unlink(key, known)
            for remembered in (self._ended, self._samples, self._sampled):
                remembered.pop(meta["uid"], None)
            return {key} | self._dependents.get(key, set())
        uid = meta["labels"][naming.UID_LABEL]
        if gone["kind"] == "Pod":
            # The Job controller deletes the survivors as soon as one pod has failed: this may be the first that we hear of its end.
            if self._uid(key) == uid:
                self._remember_end(uid, gone)
            _drop(self._pods, uid, meta["uid"])
        else:
            ref = ChildRef(gone["kind"], meta["name"])
            known = self._children.get(uid, {}).get(ref)
            if known and known["metadata"]["uid"] == meta["uid"]:
                _drop(self._children, uid, ref)
        return {key}

    def prune(self, kind: str, namespace: str | None, listed: set[str], list_version: str) -> set[Key]:
        """Forget objects of `kind` that a list at `list_version` did not hold: their deletion went unseen. `listed` are uids."""
        touched: set[Key] = set()
        for known in self._all(kind):
            meta = known["metadata"]
            newer = version(known) > int(list_version)  # created while the list was under way
            if meta["uid"] not in listed and not newer and namespace in (None, meta["namespace"]):
                touched |= self.remove(known)
        return touched

    def put_samples(self, uid: str, samples: Mapping[int, dict[str, float]]) -> None:
        """What the pods' metrics say, by node rank or shard. A pod that is gone keeps counting with its last figures."""
        if uid in self._deleted:
            return
        figures = self._samples.setdefault(uid, {})
        figures.update(samples)
        self._sampled[uid] = self._now()

    # Parts

    def _progress(self, job: Job) -> Progress | None:
        figures, prepared = self._samples.get(job.metadata.uid, {}), job.status.prepared
        outputs = prepared.dataset.rows * job.spec.per_prompt if prepared and isinstance(job, GenerateJob) else None
        return progress_of([figures[i] for i in sorted(figures)], self._sampled.get(job.metadata.uid), outputs)

    def _uid(self, key: Key) -> str:
        job = self._jobs.get(key)
        return str(job["metadata"]["uid"]) if job else ""

    def _known(self, key: Key, found: Object) -> Object | None:
        if found["kind"] in KINDS:
            return self._jobs.get(key)
        meta = found["metadata"]
        uid = meta["labels"][naming.UID_LABEL]
        if found["kind"] == "Pod":
            return self._pods.get(uid, {}).get(meta["uid"])
        return self._children.get(uid, {}).get(ChildRef(found["kind"], meta["name"]))

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

    def _remember_end(self, uid: str, pod: Object) -> None:
        end = pod_end(pod, self._now())
        if end is None:
            return
        ended = self._ended.setdefault(uid, OrderedDict())
        known = ended.get(end.uid)
        # A pod that is lost with its node ends without an exit code, which may follow when the node comes back; so may the reason.
        if known is None or (end.exit_code >= 0 and known.exit_code < 0) or (end.disrupted and not known.disrupted):
            ended[end.uid] = end
            if end.exit_code == 0 and end.message and (last := samples_at_end(end.message.metrics)):
                self.put_samples(uid, {end.index: last})
        while len(ended) > ENDS_KEPT:
            ended.popitem(last=False)

    def _sources(self, job: Job) -> dict[str, FineTuneJob]:
        def find(name: str) -> FineTuneJob | None:
            try:
                parsed = parse_job(self._jobs[Key(JobKind.FINE_TUNE, job.metadata.namespace, name)])
            except (KeyError, ValueError):  # it does not exist, or cannot be understood: the same for who waits for it
                return None
            assert isinstance(parsed, FineTuneJob)
            return parsed

        return {name: source for name, source in naming.needed_jobs(job, find).items() if source}


def key_of(found: Object) -> Key | None:
    """The job that an object is, or belongs to by its labels; None when it is none of ours."""
    meta = found.get("metadata", {})
    kind, name = found.get("kind"), meta.get("name")
    if kind not in KINDS:
        labels = meta.get("labels") or {}
        kind, name = labels.get(naming.KIND_LABEL), labels.get(naming.JOB_LABEL)
        if kind not in KINDS or not name or naming.UID_LABEL not in labels:
            return None
    return Key(JobKind(kind), meta["namespace"], name)


def source_keys(job: Object) -> set[Key]:
    """The FineTuneJobs whose results `job` names."""
    spec = job.get("spec", {})
    names = [spec.get("model", {}).get("job"), *(a.get("job") for a in spec.get("adapters") or [])]
    return {Key(JobKind.FINE_TUNE, job["metadata"]["namespace"], name) for name in names if name}


def version(found: Object) -> int:
    """Since Kubernetes 1.35 resource versions are numbers that grow; they always were, with etcd."""
    return int(found["metadata"]["resourceVersion"])


def slim(found: Object) -> Object:
    """Without what nobody reads, which is most of an object's memory: of a child's spec that is all but the fields in READ."""
    meta = {k: v for k, v in found["metadata"].items() if k != "managedFields"}
    spec = found.get("spec", {})
    kept = spec if found["kind"] in KINDS else {k: spec[k] for k in READ if k in spec}
    return found | {"metadata": meta, "spec": kept}


def _drop(by_job: dict[str, dict[K, Object]], uid: str, inner: K) -> None:
    by_job.get(uid, {}).pop(inner, None)
    if not by_job.get(uid, True):
        del by_job[uid]
