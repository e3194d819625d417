"""The last known state of the cluster: jobs, their children and pods, the ends of pods, and the metrics of pods.

It is updated by the watches, by the answers to the operator's own writes (so that a reconcile sees what the previous
one did), and by a periodic relist that drops objects whose deletion was missed after a 410. Nothing is decided here.

Memory is bounded by the jobs at work: `kept` says what stays of an object, a pod that has terminated leaves its end,
and a job that has ended leaves itself and its children.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from luthier_api.conditions import ConditionType
from luthier_api.kinds import KINDS, source_of
from luthier_api.metrics import CHECKPOINT_STEP, broken_checkpoints, checkpoint_step, samples_at_end
from luthier_operator import children
from luthier_operator.children import NO_SCHEDULER_SECONDS
from luthier_operator.failure.pod_end import PodEnds, pod_end
from luthier_operator.kept import KeptJob, changed, edition, project, version
from luthier_operator.kueue import WORKLOAD, Workloads
from luthier_operator.model import ChildRef, Job, Key, Object, Observed, Silence
from luthier_operator.ownership import OWNED, Owner, owner_of, owner_of_job
from luthier_operator.parts import HeldPod, Parts
from luthier_operator.settling import AS_EXPECTED
from luthier_operator.workloads import workload
from luthier_operator.workloads.sources import Sources, observed_sources

DELETED_KEPT = 10_000  # uids of deleted objects, so that a late answer does not bring one back
LATE_REPORTS = timedelta(minutes=10)
"""For so long after the end of a job the messages of its pods are read. Watches are behind by seconds at most; a new
operator process would otherwise read the messages of all pods that were ever kept.
"""
WATCHED = {*KINDS, *OWNED, "Pod"}
"""Config maps and claims are created, but neither watched nor kept."""


class Store:
    """Every change returns the keys of the jobs that it affects."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self.jobset_installed = True
        self.workloads = Workloads()
        self._jobs: dict[Key, KeptJob] = {}
        self._parts: dict[Owner, Parts] = {}
        self._dependents: dict[Key, set[Key]] = {}  # job → jobs that use its result
        self._without_pods: set[str] = set()  # uids of the children that `awaits_pods`
        self._deleted: OrderedDict[str, None] = OrderedDict()

    # Reading

    def job(self, key: Key) -> Object | None:
        """The job as a new object."""
        known = self._jobs.get(key)
        return known.object() if known else None

    def knows(self, job: Object) -> bool:
        """Whether this version of a job, or a newer one of its name, is known."""
        owner = owner_of(job)
        known = self._jobs.get(owner.key) if owner else None
        return known is not None and known.version >= version(job)

    def is_edited(self, job: Object) -> bool:
        """Whether more than the status of a known job has changed."""
        owner = owner_of(job)
        known = self._jobs.get(owner.key) if owner else None
        return known is None or known.edition != edition(job)

    def keys(self) -> list[Key]:
        return list(self._jobs)

    def state(self, key: Key) -> str:
        """Of one job, as kubectl shows it. Empty if there is none."""
        known = self._jobs.get(key)
        return known.state if known else ""

    def states(self) -> Iterator[tuple[Key, str]]:
        """Every job with its state, as kubectl shows it."""
        return ((key, known.state) for key, known in list(self._jobs.items()))

    def pods(self) -> Iterator[tuple[Owner, Object]]:
        """Pods that have not terminated, of jobs that exist."""
        for owner, parts in list(self._parts.items()):
            if parts.pods and self._exists(owner):
                yield from ((owner, pod) for pod in list(parts.pods.values()))

    def pods_of(self, owner: Owner) -> list[Object]:
        parts = self._parts.get(owner)
        return list(parts.pods.values()) if parts else []

    def child(self, key: Key, ref: ChildRef) -> Object | None:
        parts = self._parts_of_job(key)
        return parts.children.get(ref) if parts else None

    def keepers(self, key: Key) -> list[Object]:
        """The children of a job that hold pods which are to go."""
        parts = self._parts_of_job(key)
        return parts.keepers() if parts else []

    def seconds_held(self, key: Key) -> float | None:
        """For how long the newest pod that `keepers` hold has been held. None if there is none."""
        parts = self._parts_of_job(key)
        since = parts.held_since() if parts else None
        return None if since is None else (self._now() - since).total_seconds()

    def goes_as_expected(self, key: Key, version: int) -> bool:
        """Whether a job has still this version, reports no problem, and neither do its pods, none of which is missing.
        Of anything that ends this, an event tells.
        """
        known, parts = self._jobs.get(key), self._parts_of_job(key)
        if known is None or known.version != version or known.state not in AS_EXPECTED or parts is None:
            return False
        since = parts.awaits_scheduler_since()
        late = since is not None and since + timedelta(seconds=NO_SCHEDULER_SECONDS) <= self._now()
        return not late and parts.go_as_expected()

    def awaits_scheduler(self, key: Key) -> bool:
        """Whether no scheduler has tried to give one of its pods a node. No event tells if none ever does."""
        parts = self._parts_of_job(key)
        return parts is not None and parts.awaits_scheduler_since() is not None

    def observed(self, job: Job) -> Observed:
        """Everything that is known about `job`."""
        owner = owner_of_job(job)
        parts = self._parts.get(owner) or Parts()
        first = parts.samples.get(0, {})
        sources = self._sources(job)
        return Observed(
            job=job,
            children=dict(parts.children),
            ended_since=dict(parts.ended_since),
            pods=list(parts.pods.values()),
            ended=parts.ends.all() if parts.ends else [],
            progress=workload(job).progress(parts.samples, parts.sampled_at),
            checkpoint_step=checkpoint_step(first),
            broken_checkpoints=broken_checkpoints(first),
            silences=dict(parts.silences),
            sources=sources.jobs,
            unreadable_sources=sources.unreadable,
            cycle=sources.cycle,
            jobset_installed=self.jobset_installed,
            admission=self.workloads.of(parts.children.get(workload(job).child("run"))),
            kueue_readable=self.workloads.listed,
            backlog=len(self._without_pods),
        )

    # Writing

    def put(self, found: Object, *, answer: bool = False) -> set[Key]:
        """Store `found`, unless it is older than the known object of its name, or was deleted.

        `answer`: of a job, whether it is the answer to a request. A watch goes on for a while with the schema that the
        CRD had when it began, so that its event of the same version may lack fields of a newer one.
        """
        if found["kind"] == WORKLOAD:
            return set() if found["metadata"]["uid"] in self._deleted else self.workloads.put(found)
        owner, uid = owner_of(found), found["metadata"]["uid"]
        if owner is None or uid in self._deleted or found["kind"] not in WATCHED:
            return set()
        if found["kind"] in KINDS:
            return self._put_job(owner, found, answer)
        if found["kind"] == "Pod":
            return self._put_pod(owner, found)
        return self._put_child(owner, found)

    def remove(self, gone: Object) -> set[Key]:
        """Remove an object that was deleted. `gone` is its last state."""
        owner, meta = owner_of(gone), gone["metadata"]
        if gone["kind"] == WORKLOAD:
            self._remember_deletion(meta["uid"])
            return self.workloads.remove(gone)
        if owner is None:
            return set()
        # The Job controller deletes the other pods as soon as one has failed: their ends may be seen only now.
        if gone["kind"] == "Pod" and self._exists(owner) and not self._reports_are_old(owner):
            parts = self._parts.get(owner)
            self._remember_end(owner, gone, was_watched=parts is not None and meta["uid"] in parts.pods)
        return self._remove(owner, gone["kind"], meta["name"], meta["uid"])

    def prune(self, kind: str, namespace: str | None, listed: set[str], list_version: str) -> set[Key]:
        """Remove objects of `kind` that are missing in a list of `list_version`: their deletion was missed.

        `listed`: the uids in the list.
        """
        if kind == WORKLOAD:
            return self.workloads.prune(namespace, listed, int(list_version))
        touched: set[Key] = set()
        for owner, name, uid, known_version in list(self._all(kind)):
            newer = known_version > int(list_version)  # created while the list was under way
            if uid not in listed and not newer and namespace in (None, owner.key.namespace):
                touched |= self._remove(owner, kind, name, uid)
        return touched

    def expect(self, key: Key, child: Object, pods: int) -> None:
        """A child was created that has so many pods at first."""
        if parts := self._parts_of_job(key):
            parts.pods_expected[child["metadata"]["uid"]] = pods

    def put_samples(self, owner: Owner, samples: Mapping[int, dict[str, float]]) -> None:
        """Store metrics of pods, by node rank or shard. The last metrics of a deleted pod stay while the job is at
        work.
        """
        if owner.uid in self._deleted or self._finished(owner):
            return
        parts = self._parts_of(owner)
        parts.samples.update(samples)
        parts.sampled_at = self._now()

    def put_silences(self, owner: Owner, silences: Mapping[str, Silence]) -> None:
        """Store for how long pods have made no progress, by their uids. Those of pods that are gone are dropped."""
        if parts := self._parts.get(owner):
            known = {**parts.silences, **silences}
            parts.silences = {uid: silence for uid, silence in known.items() if uid in parts.pods}

    def forget_reports(self, job: Job) -> None:
        """Drop the ends of pods and the metrics of a job that has ended, once its status holds what they report."""
        owner = owner_of_job(job)
        if self._finished(owner) and (parts := self._parts.get(owner)):
            parts.forget_reports()
            self._drop_if_empty(owner)

    # Parts

    def _put_job(self, owner: Owner, found: Object, answer: bool) -> set[Key]:
        key, known = owner.key, self._jobs.get(owner.key)
        # Also where the uid differs: the events of a job and of an earlier one of its name come in any order.
        if known is not None and known.version >= version(found) + answer:
            return set()
        job = KeptJob.of(found)
        if known is not None and known.version == job.version and known.object() == job.object():
            return set()
        if known is not None:
            self._unlink(key, known)
            if known.uid != owner.uid:
                self._forget_job(Owner(key, known.uid))
        self._jobs[key] = job
        for source in job.sources:
            self._dependents.setdefault(source, set()).add(key)
        if self._reports_are_old(owner) and (parts := self._parts.get(owner)):
            parts.forget_reports()
            self._drop_if_empty(owner)
        changed = known is None or known.uid != job.uid or known.outcome != job.outcome
        return {key} | (self._waiting_for(key) if changed else set())

    def _put_child(self, owner: Owner, found: Object) -> set[Key]:
        ref, parts = ChildRef(found["kind"], found["metadata"]["name"]), self._parts.get(owner)
        known = parts.children.get(ref) if parts else None
        if known is not None and version(known) >= version(found):
            return set()
        parts = self._parts_of(owner)
        if known is not None and known["metadata"]["uid"] != found["metadata"]["uid"]:
            parts.ended_since.pop(ref, None)
        if children.finished(found):
            parts.ended_since.setdefault(ref, self._now())
        new = parts.children[ref] = project(found)
        if parts.awaits_pods(new):
            self._without_pods.add(new["metadata"]["uid"])
        else:
            self._without_pods.discard(new["metadata"]["uid"])
        return {owner.key} if known is None or changed(known, new) else set()

    def _put_pod(self, owner: Owner, found: Object) -> set[Key]:
        uid, parts = found["metadata"]["uid"], self._parts.get(owner)
        known = parts.pods.get(uid) if parts else None
        if parts:
            known_version = version(known) if known else parts.terminated.get(uid, -1)
            if known_version >= version(found):
                return set()
        self._without_pods.discard(children.controller_uid(found))
        if not children.terminated(found):
            new = self._parts_of(owner).pods[uid] = project(found)
            return {owner.key} if known is None or changed(known, new) else set()
        if self._reports_are_old(owner) and not (parts and uid in parts.pods):
            return set()
        parts = self._parts_of(owner)
        was_watched = parts.pods.pop(uid, None) is not None
        parts.terminated[uid] = version(found)
        if children.deleting(found):
            parts.held.setdefault(uid, HeldPod(children.controller_uid(found), self._now()))
        # Pods exist for a moment after their job is deleted: their ends are not needed any more
        if owner.uid not in self._deleted:
            self._remember_end(owner, found, was_watched)
        return {owner.key}

    def _remove(self, owner: Owner, kind: str, name: str, uid: str) -> set[Key]:
        self._remember_deletion(uid)
        self._without_pods.discard(uid)
        key = owner.key
        if kind in KINDS:
            known = self._jobs.get(key)
            if known is not None and known.uid == uid:
                del self._jobs[key]
                self._unlink(key, known)
            self._forget_job(owner)
            return {key} | self._waiting_for(key)
        touched = set() if self._reports_are_old(owner) else {key}
        parts = self._parts.get(owner)
        if parts is None:
            return touched
        if kind == "Pod":
            parts.pods.pop(uid, None)
            parts.terminated.pop(uid, None)
            parts.held.pop(uid, None)
        else:
            ref = ChildRef(kind, name)  # type: ignore[arg-type]
            known_child = parts.children.get(ref)
            if known_child and known_child["metadata"]["uid"] == uid:
                del parts.children[ref]
                parts.pods_expected.pop(uid, None)
                parts.ended_since.pop(ref, None)
        self._drop_if_empty(owner)
        return touched

    def _remember_deletion(self, uid: str) -> None:
        self._deleted[uid] = None
        while len(self._deleted) > DELETED_KEPT:
            self._deleted.popitem(last=False)

    def _forget_job(self, owner: Owner) -> None:
        """Its children and pods stay until they are deleted, too."""
        if parts := self._parts.get(owner):
            parts.forget_reports()
            self._drop_if_empty(owner)

    def _parts_of_job(self, key: Key) -> Parts | None:
        known = self._jobs.get(key)
        return self._parts.get(Owner(key, known.uid)) if known else None

    def _parts_of(self, owner: Owner) -> Parts:
        parts = self._parts.get(owner)
        if parts is None:
            parts = self._parts[owner] = Parts()
        return parts

    def _drop_if_empty(self, owner: Owner) -> None:
        if not self._parts.get(owner, True):
            del self._parts[owner]

    def _exists(self, owner: Owner) -> bool:
        known = self._jobs.get(owner.key)
        return known is not None and known.uid == owner.uid

    def _finished(self, owner: Owner) -> bool:
        return self._exists(owner) and self._jobs[owner.key].finished

    def _reports_are_old(self, owner: Owner) -> bool:
        if not self._finished(owner):
            return False
        completed_at = self._jobs[owner.key].completed_at
        return completed_at is not None and self._now() - completed_at > LATE_REPORTS

    def _all(self, kind: str) -> Iterator[tuple[Owner, str, str, int]]:
        """Owner, name, uid and version of all objects of a kind. A pod has no name here."""
        if kind in KINDS:
            for key, job in self._jobs.items():
                if key.kind == kind:
                    yield Owner(key, job.uid), key.name, job.uid, job.version
            return
        for owner, parts in self._parts.items():
            if kind == "Pod":
                yield from ((owner, "", uid, version(pod)) for uid, pod in parts.pods.items())
                yield from ((owner, "", uid, known) for uid, known in parts.terminated.items())
                continue
            for ref, child in parts.children.items():
                if ref.kind == kind:
                    yield owner, ref.name, child["metadata"]["uid"], version(child)

    def _waiting_for(self, key: Key) -> set[Key]:
        """Jobs that may wait for the result of `key`. Those that were accepted work with what they found then."""
        return {
            dependent
            for dependent in self._dependents.get(key, ())
            if (known := self._jobs.get(dependent)) and known.waits
        }

    def _unlink(self, key: Key, known: KeptJob) -> None:
        for source in known.sources:
            dependents = self._dependents.get(source, set())
            dependents.discard(key)
            if not dependents:
                self._dependents.pop(source, None)

    def _remember_end(self, owner: Owner, pod: Object, was_watched: bool) -> None:
        end = pod_end(pod, self._now(), was_watched)
        if end is None:
            return
        parts = self._parts_of(owner)
        if parts.ends is None:
            parts.ends = PodEnds()
        if not parts.ends.put(end):
            return
        if end.phase == "run":  # its message is newer than the metric, and the next pod reports its own
            parts.samples.get(0, {}).pop(CHECKPOINT_STEP.name, None)
        if end.exit_code == 0 and end.message and (last := samples_at_end(end.message.metrics)):
            self.put_samples(owner, {end.index: last})

    def _sources(self, job: Job) -> Sources:
        if job.status.is_true(ConditionType.PREPARED):
            return Sources({}, {}, ())  # `status.sources` says where their results are

        def find(name: str) -> Object | None:
            kind, alone = source_of(name)
            known = self._jobs.get(Key(kind, job.metadata.namespace, alone))
            return known.object() if known else None

        return observed_sources(job, find)
