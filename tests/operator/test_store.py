"""What the store believes, and what it does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fake_cluster import said

from luthier_api.kinds import JobKind, parse_job
from luthier_api.status import Progress
from luthier_operator import naming
from luthier_operator.children import pods_at_once, suspended
from luthier_operator.failure.pod_end import FAILED_ENDS_KEPT, PodEnds
from luthier_operator.model import ChildRef, Key
from luthier_operator.objects import objects
from luthier_operator.ownership import OWNED, Owner
from luthier_operator.store import Store

TUNE = Key(JobKind.FINE_TUNE, "default", "tune")


GENERATE = {"task": "text-generation", "model": {"id": "org/model"}}


def job(name: str = "tune", version: int = 1, uid: str = "", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(version),
            "managedFields": [1],
        },
        "spec": {"task": "causal-lm", "model": {"id": "a/b"}, "dataset": {"id": "a/b"}} | spec,
    }


def owned(kind: str, name: str, version: int = 1, uid: str = "", job: str = "uid-tune", **parts: Any) -> dict[str, Any]:
    labels = {
        naming.KIND_LABEL: "FineTuneJob",
        naming.JOB_LABEL: "tune",
        naming.UID_LABEL: job,
        naming.PHASE_LABEL: "run",
    }
    meta = {
        "name": name,
        "namespace": "default",
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "labels": labels,
    }
    owner = {"kind": "FineTuneJob", "name": "tune", "uid": job, "controller": True}
    if kind == "Pod":
        owner = {"kind": "Job", "name": "ftj-tune-run-node-0", "uid": "uid-of-node-0", "controller": True}
    return {"kind": kind, "metadata": meta | {"ownerReferences": [owner]}} | parts


def ended(
    name: str, code: int = 70, version: int = 2, index: str = "0", at: str = "2026-01-01T00:00:00Z", **told: Any
) -> dict[str, Any]:
    state = {
        "terminated": {"exitCode": code, "reason": "Error", "message": said("run", code, **told), "finishedAt": at}
    }
    found = owned(
        "Pod", name, version, status={"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": state}]}
    )
    return found | {"metadata": found["metadata"] | {"annotations": {naming.INDEX_ANNOTATION: index}}}


def moved(found: dict[str, Any], **meta: Any) -> dict[str, Any]:
    """A copy of an object, as a backup or a stranger makes it."""
    return found | {"metadata": found["metadata"] | meta}


def condition(type: str, status: str = "True") -> dict[str, str]:
    return {"type": type, "status": status, "reason": type, "lastTransitionTime": "2026-01-01T00:00:00Z"}


def finished(version: int = 5) -> dict[str, Any]:
    """The job, which has ended at the beginning of the year."""
    return job(version=version) | {
        "status": {"conditions": [condition("Complete")], "completionTime": "2026-01-01T00:00:00Z"}
    }


def held(store: Store) -> dict[str, int]:
    """How many objects are kept of all jobs, by what they are."""
    found: Counter[str] = Counter()
    for parts in store._parts.values():
        found.update(children=len(parts.children), pods=len(parts.pods), samples=len(parts.samples))
        found.update(terminated=len(parts.terminated), ends=len(parts.ends.all()) if parts.ends else 0)
    return {name: count for name, count in found.items() if count}


def seen(store: Store) -> Any:
    found = store.job(TUNE)
    assert found is not None
    return store.observed(parse_job(found))


def test_an_older_answer_changes_nothing() -> None:
    store = Store()
    assert store.put(job(version=5)) == {TUNE}
    assert store.put(job(version=4, suspend=True)) == set()
    assert store.put(job(version=5)) == set()
    assert not seen(store).job.spec.suspend


@pytest.mark.parametrize(
    ("found", "expect"),
    [
        (job(version=4), True),
        (job(version=5), True),
        (job(version=5, uid="another"), True),
        (job(version=6), False),
        (job("other", version=5), False),
    ],
    ids=["an older version", "the same", "of an earlier job of the name", "a newer one", "of another job"],
)
def test_what_is_known_of_a_job_is_no_news(found: dict[str, Any], expect: bool) -> None:
    """kopf calls no handler then, so what is known must change nothing."""
    store = Store()
    store.put(job(version=5))
    assert store.knows(found) is expect
    assert not (store.knows(found) and store.put(found))


@dataclass(frozen=True)
class EditCase:
    name: str
    found: dict[str, Any]
    edited: bool


EDITS = [
    EditCase(
        name="its status",
        found=moved(job(version=2), generation=1) | {"status": {"state": "Running"}},
        edited=False,
    ),
    EditCase(
        name="its spec",
        found=moved(job(version=2), generation=2),
        edited=True,
    ),
    EditCase(
        name="it is deleted",
        found=moved(job(version=2), generation=1, deletionTimestamp="2026-01-01T00:00:00Z"),
        edited=True,
    ),
    EditCase(
        name="it is created again",
        found=moved(job(version=2, uid="another"), generation=1),
        edited=True,
    ),
    EditCase(
        name="it is not known",
        found=moved(job("other", version=2), generation=1),
        edited=True,
    ),
]


@pytest.mark.parametrize("case", EDITS, ids=lambda case: case.name)
def test_a_job_is_edited_unless_only_its_status_has_changed(case: EditCase) -> None:
    store = Store()
    store.put(moved(job(), generation=1))
    assert store.is_edited(case.found) is case.edited


def test_an_answer_has_the_fields_that_a_watch_under_an_earlier_schema_drops() -> None:
    store = Store()
    store.put(job(version=1))
    store.put(job(version=2))  # the event of the write, before its answer
    assert store.put(job(version=2, later="x"), answer=True) == {TUNE}
    assert store.put(job(version=2, later="x"), answer=True) == set(), "no news"
    store.put(job(version=2))
    assert store.job(TUNE)["spec"]["later"] == "x"
    assert store.put(job(version=1), answer=True) == set()
    assert store.job(TUNE)["spec"]["later"] == "x"


def test_what_was_deleted_does_not_come_back_by_a_late_answer() -> None:
    store = Store()
    store.put(job())
    child = owned("Job", "ftj-tune-prepare")
    store.put(child)
    assert store.remove(child) == {TUNE}
    assert store.put(owned("Job", "ftj-tune-prepare", version=9)) == set()
    assert seen(store).children == {}


@dataclass(frozen=True)
class OrderCase:
    name: str
    events: list[tuple[str, str, int]]
    """Type of an event, uid and version of the object."""


ORDERS = [
    OrderCase(
        name="in their order",
        events=[("MODIFIED", "first", 5), ("DELETED", "first", 6), ("ADDED", "second", 7)],
    ),
    OrderCase(
        name="the new object comes first",
        events=[("ADDED", "second", 7), ("MODIFIED", "first", 5), ("DELETED", "first", 6)],
    ),
    OrderCase(
        name="a change of the old object comes last",
        events=[("DELETED", "first", 6), ("ADDED", "second", 7), ("MODIFIED", "first", 5)],
    ),
    OrderCase(
        name="the deletion was missed",
        events=[("ADDED", "second", 7), ("MODIFIED", "first", 5)],
    ),
]


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["FineTuneJob", "Job"])
def test_an_object_that_is_created_again_under_its_name_is_never_lost(kind: str, case: OrderCase) -> None:
    store = Store()
    store.put(job(version=1, uid="first" if kind == "FineTuneJob" else ""))
    if kind == "Job":
        store.put(owned("Job", "ftj-tune-prepare", version=1, uid="first"))
    for event, uid, number in case.events:
        found = job(version=number, uid=uid)
        if kind == "Job":
            found = owned("Job", "ftj-tune-prepare", version=number, uid=uid)
        if event == "DELETED":
            store.remove(found)
        else:
            store.put(found)
    known = store.job(TUNE) if kind == "FineTuneJob" else store.child(TUNE, ChildRef("Job", "ftj-tune-prepare"))
    assert known is not None
    assert known["metadata"]["uid"] == "second"


def test_reports_of_an_earlier_job_of_the_name_are_dropped_with_it() -> None:
    store = Store()
    store.put(job())
    store.put(ended("pod"))
    store.put(job(version=9, uid="new"))
    assert held(store) == {"terminated": 1}


def test_a_deletion_that_comes_late_does_not_take_the_next_one_of_the_name() -> None:
    store = Store()
    store.put(job())
    store.put(owned("Job", "ftj-tune-prepare", version=7, uid="second"))
    store.remove(owned("Job", "ftj-tune-prepare", version=6, uid="first"))
    assert list(seen(store).children) == [ChildRef("Job", "ftj-tune-prepare")]


def test_children_of_an_earlier_job_of_the_name_are_not_ours() -> None:
    store = Store()
    store.put(job(uid="new"))
    store.put(owned("Job", "ftj-tune-prepare", job="old"))
    store.put(ended("pod") | {})
    assert (seen(store).children, seen(store).pods, seen(store).ended) == ({}, [], [])


def test_the_end_of_a_pod_outlives_it() -> None:
    store = Store()
    store.put(job())
    store.put(ended("pod"))
    store.remove(ended("pod", version=3))
    assert [(e.pod, e.exit_code) for e in seen(store).ended] == [("pod", 70)]
    assert seen(store).pods == []


def test_an_end_that_is_first_told_by_the_deletion_counts() -> None:
    store = Store()
    store.put(job())
    store.put(owned("Pod", "pod", status={"phase": "Running"}))
    store.remove(ended("pod"))
    assert [e.exit_code for e in seen(store).ended] == [70]


def test_the_first_end_stays() -> None:
    """The kubelet may report a pod again while it is taken down."""
    store = Store()
    store.put(job())
    store.put(ended("pod", code=79))
    store.put(ended("pod", code=143, version=3))
    assert [e.exit_code for e in seen(store).ended] == [79]


def test_failures_are_bounded_and_go_with_the_job() -> None:
    store = Store()
    store.put(job())
    for number in range(FAILED_ENDS_KEPT + 10):
        store.put(ended(f"pod-{number}"))
    assert (len(seen(store).ended), seen(store).ended[-1].pod) == (FAILED_ENDS_KEPT, f"pod-{FAILED_ENDS_KEPT + 9}")
    store.remove(job())
    assert held(store) == {"terminated": FAILED_ENDS_KEPT + 10}, "the pods are deleted after their job"


def test_every_shard_that_ended_well_is_remembered_and_each_once() -> None:
    """However many there are, and however often they were started: one end an index, and nothing of what they
    printed.
    """
    store, shards = Store(), FAILED_ENDS_KEPT + 44
    store.put(job())
    for attempt in range(3):
        for index in range(shards):
            store.put(
                ended(
                    f"pod-{index}-{attempt}",
                    0,
                    index=str(index),
                    at=f"2026-01-01T00:00:0{attempt}Z",
                    metrics={"rows": attempt},
                    last_lines="x" * 999,
                )
            )
    ends = seen(store).ended
    assert sorted(e.index for e in ends) == list(range(shards))
    assert {(e.message.metrics["rows"], e.message.last_lines, e.raw_message) for e in ends} == {(2, "", "")}
    store.put(ended("pod-0-1", 0, version=9, at="2026-01-01T00:00:01Z"))
    assert {e.pod for e in seen(store).ended if e.index == 0} == {"pod-0-2"}, "an earlier one that is told of late"


@pytest.mark.parametrize("code", [0, 70])
def test_an_end_is_news_once(code: int) -> None:
    """What is news takes the place of the figures that were read since."""
    store, ends = Store(), PodEnds()
    store.put(job())
    store.put(ended("pod", code))
    (end,) = seen(store).ended
    assert [ends.put(end) for _ in range(2)] == [True, False]


def test_a_pod_that_was_lost_with_its_node_may_have_ended_well() -> None:
    store = Store()
    store.put(job())
    store.put(owned("Pod", "pod", status={"phase": "Failed", "reason": "NodeLost"}))
    store.put(ended("pod", 0, version=3))
    assert [e.exit_code for e in seen(store).ended] == [0]


def test_a_pod_may_end_well_without_a_word() -> None:
    """Of an image that is not ours, or one whose output took the place of the message."""
    silent = ended("pod", 0)
    silent["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = ""
    store = Store()
    store.put(job())
    store.put(silent)
    assert [(e.exit_code, e.message) for e in seen(store).ended] == [(0, None)]


def test_what_a_pod_served_of_its_checkpoint_ends_with_it() -> None:
    """Its last word is newer, and the pod after it may find less: a broken checkpoint is set aside."""
    store, owner = Store(), Owner(TUNE, "uid-tune")
    store.put(job())
    read = {
        "luthier_checkpoint_last_step": 20,
        "luthier_checkpoints_broken": 0,
        "luthier_train_step": 25,
        "luthier_train_max_steps": 30,
    }
    store.put_samples(owner, {0: dict(read)})
    assert (seen(store).checkpoint_step, seen(store).broken_checkpoints) == (20, 0)
    store.put(ended("pod"))
    assert (seen(store).checkpoint_step, seen(store).broken_checkpoints) == (None, 0)
    assert (seen(store).progress or Progress()).step == 25
    store.put_samples(owner, {0: read | {"luthier_checkpoint_last_step": 10, "luthier_checkpoints_broken": 1}})
    store.put(ended("pod", version=3))  # told once more
    assert (seen(store).checkpoint_step, seen(store).broken_checkpoints) == (10, 1)


CHILD, POD = owned("Job", "ftj-tune-prepare"), ended("pod")
OWNER_OF_POD = POD["metadata"]["ownerReferences"][0]


@dataclass(frozen=True)
class CopyCase:
    name: str
    given: dict[str, Any]
    counts: bool


COPIES = [
    CopyCase(
        name="our Job",
        given=CHILD,
        counts=True,
    ),
    CopyCase(
        name="our pod",
        given=POD,
        counts=True,
    ),
    CopyCase(
        name="a Job with our labels, elsewhere",
        given=moved(CHILD, namespace="other"),
        counts=False,
    ),
    CopyCase(
        name="a pod with our labels, elsewhere",
        given=moved(POD, namespace="other"),
        counts=False,
    ),
    CopyCase(
        name="a bare pod with our labels",
        given=moved(POD, ownerReferences=[]),
        counts=False,
    ),
    CopyCase(
        name="a pod with our labels, of a Job of somebody else",
        given=moved(POD, ownerReferences=[OWNER_OF_POD | {"name": "ftj-tune-run-copy"}]),
        counts=False,
    ),
    CopyCase(
        name="a pod with our labels, of another kind of owner",
        given=moved(POD, ownerReferences=[OWNER_OF_POD | {"kind": "ReplicaSet"}]),
        counts=False,
    ),
    CopyCase(
        name="a pod that our Job owns without controlling it",
        given=moved(POD, ownerReferences=[OWNER_OF_POD | {"controller": False}]),
        counts=False,
    ),
    CopyCase(
        name="a Job with our labels that nobody owns",
        given=moved(CHILD, ownerReferences=[]),
        counts=False,
    ),
    CopyCase(
        name="a Job with our labels, of another owner",
        given=moved(CHILD, ownerReferences=[{"uid": "uid-of-another"}]),
        counts=False,
    ),
]


@pytest.mark.parametrize("case", COPIES, ids=lambda case: case.name)
def test_labels_alone_make_nothing_ours(case: CopyCase) -> None:
    store = Store()
    store.put(job())
    store.put(case.given)
    assert bool(seen(store).children or seen(store).pods or seen(store).ended) is case.counts
    store.remove(case.given)
    assert bool(seen(store).ended) is (case.counts and case.given["kind"] == "Pod")


NO_NUMBERS = ["abc", "-1", "1.5", "9" * 5000, "", "٣٣٣٣٣٣٣٣٣٣٣"]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:5])
def test_labels_and_annotations_that_are_no_numbers_count_as_none(text: str) -> None:
    """Whoever may create pods may write them."""
    store = Store()
    store.put(job())
    notes = dict.fromkeys(
        (naming.INDEX_ANNOTATION, naming.INDEX_FAILURES_ANNOTATION, naming.INDEX_IGNORED_ANNOTATION), text
    )
    labels = POD["metadata"]["labels"] | {naming.RESTART_LABEL: text, naming.INDEX_ANNOTATION: text}
    assert store.put(moved(POD, labels=labels, annotations=notes)) == {TUNE}
    assert [(e.attempt, e.index) for e in seen(store).ended] == [(0, 0)]


def test_what_pods_say_after_their_job_was_deleted_is_not_kept() -> None:
    store = Store()
    store.put(job())
    store.put(owned("Pod", "pod", status={"phase": "Running"}))
    store.remove(job())
    store.put(ended("pod"))
    store.put_samples(Owner(TUNE, "uid-tune"), {0: {"luthier_train_step": 1}})
    store.remove(ended("pod", version=3))
    assert held(store) == {}


@dataclass(frozen=True)
class ListCase:
    name: str
    version: int  # resourceVersion of the job that is known
    listed_at: int  # resourceVersion of the list
    in_list: bool  # the list has the job
    kept: bool


LISTS = [
    ListCase(
        name="it is in the list",
        version=5,
        listed_at=9,
        in_list=True,
        kept=True,
    ),
    ListCase(
        name="it is not: its deletion went unseen",
        version=5,
        listed_at=9,
        in_list=False,
        kept=False,
    ),
    ListCase(
        name="it was created while the list was made",
        version=10,
        listed_at=9,
        in_list=False,
        kept=True,
    ),
]


@pytest.mark.parametrize("case", LISTS, ids=lambda case: case.name)
def test_prune(case: ListCase) -> None:
    store = Store()
    store.put(job(version=case.version))
    touched = store.prune("FineTuneJob", None, {"uid-tune"} if case.in_list else set(), str(case.listed_at))
    assert (store.job(TUNE) is not None, touched) == (case.kept, set() if case.kept else {TUNE})


def test_prune_of_one_namespace_leaves_the_others() -> None:
    store = Store()
    store.put(job())
    assert store.prune("FineTuneJob", "other", set(), "9") == set()


AFTER = Key(JobKind.FINE_TUNE, "default", "after")


@dataclass(frozen=True)
class DependentCase:
    name: str
    before: dict[str, Any]
    after: dict[str, Any] | None
    """Statuses of the job whose result is used. None: it is deleted."""
    accepted: str = ""
    """Status of the condition Accepted of the job that uses it."""
    woken: bool = False


DEPENDENTS = [
    DependentCase(
        name="it makes progress",
        before={"state": "Running", "progress": {"step": 1}},
        after={"state": "Running", "progress": {"step": 2}},
    ),
    DependentCase(
        name="it has trained",
        before={"state": "Running"},
        after={"state": "Publishing", "conditions": [condition("Trained")]},
        woken=True,
    ),
    DependentCase(
        name="it has failed",
        before={"state": "Running"},
        after={"state": "Failed", "conditions": [condition("Failed")]},
        accepted="False",
        woken=True,
    ),
    DependentCase(
        name="it is deleted",
        before={"state": "Running"},
        after=None,
        accepted="False",
        woken=True,
    ),
    DependentCase(
        name="it has trained, and the other job began before",
        before={"state": "Running"},
        after={"state": "Publishing", "conditions": [condition("Trained")]},
        accepted="True",
    ),
    DependentCase(
        name="it is deleted, and the other job began before",
        before={"state": "Running"},
        after=None,
        accepted="True",
    ),
]


@pytest.mark.parametrize("case", DEPENDENTS, ids=lambda case: case.name)
def test_a_job_is_woken_by_the_job_that_it_waits_for(case: DependentCase) -> None:
    store = Store()
    accepted = [condition("Accepted", case.accepted)] if case.accepted else []
    store.put(job() | {"status": case.before})
    store.put(job("after", model={"job": "tune"}) | {"status": {"conditions": accepted}})
    assert list(store.observed(parse_job(store.job(AFTER) or {})).sources) == ["tune"]
    changed = job(version=2) | {"status": case.after}
    touched = store.remove(changed) if case.after is None else store.put(changed)
    assert touched == ({TUNE, AFTER} if case.woken else {TUNE})
    store.remove(job("after"))
    assert not store._dependents


def test_a_job_is_woken_by_the_job_whose_outputs_it_waits_for() -> None:
    store = Store()
    rows = {"rows": [{"prompt": "a lute"}]}
    waiting, made = (
        job(name, uid=f"{name}-outputs") | {"kind": "GenerateJob", "spec": GENERATE | {"inputs": inputs}}
        for name, inputs in (("after", {"job": "tune", "columns": {"prompt": "text"}}), ("tune", rows))
    )
    key, after = (Key(JobKind.GENERATE, "default", name) for name in ("tune", "after"))
    store.put(waiting)
    assert store.put(job()) == {TUNE}  # a FineTuneJob of this name
    assert store.put(made) == {key, after}
    assert list(store.observed(parse_job(store.job(after) or {})).sources) == ["GenerateJob/tune"]


def test_the_jobs_below_are_not_read_once_prepare_has_noted_where_their_results_are() -> None:
    store = Store()
    store.put(job("base"))
    store.put(job(model={"job": "base"}) | {"status": {"conditions": [condition("Prepared")]}})
    assert seen(store).sources == {}


@dataclass(frozen=True)
class ChainCase:
    name: str
    chain: dict[str, tuple[str, str | None]]
    expect: list[str]


CHAINS = [
    ChainCase(
        name="a whole model",
        chain={"base": ("full", None)},
        expect=["base"],
    ),
    ChainCase(
        name="an adapter on a model of the Hub",
        chain={"base": ("lora", None)},
        expect=["base"],
    ),
    ChainCase(
        name="an adapter on a whole model",
        chain={"base": ("lora", "below"), "below": ("full", None)},
        expect=["base", "below"],
    ),
    ChainCase(
        name="an adapter on an adapter, merged there",
        chain={"base": ("lora", "below"), "below": ("qlora", None)},
        expect=["base"],
    ),
    ChainCase(
        name="a whole model that began as another",
        chain={"base": ("full", "below"), "below": ("full", None)},
        expect=["base"],
    ),
    ChainCase(
        name="an adapter on a model whose job is gone",
        chain={"base": ("lora", "below")},
        expect=["base"],
    ),
]


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_the_model_below_an_adapter_is_needed_too(case: ChainCase) -> None:
    store = Store()
    store.put(job(model={"job": "base"}))
    for name, (method, below) in case.chain.items():
        store.put(job(name, method={"type": method}, **({"model": {"job": below}} if below else {})))
    assert sorted(seen(store).sources) == case.expect


def test_what_nobody_reads_is_not_kept() -> None:
    store = Store()
    store.put(job())
    assert "managedFields" not in (store.job(TUNE) or {})["metadata"]
    assert store.put(owned("ConfigMap", "ftj-tune")) == set()


def test_objects_of_others_are_nobodys() -> None:
    store = Store()
    assert (
        store.put(
            {
                "kind": "Pod",
                "metadata": {
                    "name": "p",
                    "namespace": "n",
                    "uid": "u",
                    "resourceVersion": "1",
                    "labels": {naming.JOB_LABEL: "x"},
                },
            }
        )
        == set()
    )


def test_what_is_decided_by_is_kept() -> None:
    """Most of the specs is dropped; `children` and `failure` must find what they look for."""
    store = Store()
    store.put(job())
    store.put(owned("Job", "ftj-tune-prepare", spec={"suspend": True, "template": {"spec": {}}}))
    store.put(owned("Pod", "runs", status={"phase": "Running"}, spec={"nodeName": "node-2", "containers": [{}]}))
    limited = {"name": "trainer", "resources": {"limits": {"memory": "2Gi"}}}
    store.put(ended("ended") | {"spec": {"nodeName": "node-1", "containers": [{}, limited]}})
    found = seen(store)
    assert suspended(next(iter(found.children.values())))
    assert (found.ended[0].node, found.ended[0].memory_limit) == ("node-1", "2Gi")
    assert [pod["spec"] for pod in found.pods] == [{"nodeName": "node-2"}]


def test_ends_have_the_time_at_which_they_were_seen() -> None:
    """Clocks of nodes and of the API server may be minutes apart."""
    now = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    store = Store(lambda: now)
    ref = ChildRef("Job", "ftj-tune-prepare")
    store.put(job())
    store.put(owned("Job", ref.name))
    store.put(owned("Pod", "pod", status={"phase": "Running"}))
    assert seen(store).ended_since == {}
    over = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-03-01T12:10:00Z"}]}
    store.put(owned("Job", ref.name, version=2, status=over))
    store.put(ended("pod", version=2))
    seen_at, now = now, now + timedelta(seconds=2)
    store.put(owned("Job", ref.name, version=3, status=over))
    assert seen(store).ended_since == {ref: seen_at}
    assert seen(store).ended[0].ended_at == seen_at
    store.put(owned("Job", ref.name, version=4, uid="another"))
    assert seen(store).ended_since == {}


def test_a_pod_that_has_terminated_leaves_its_end_and_does_not_come_back() -> None:
    """A list may be answered after the watch has reported the end."""
    store, running = Store(), owned("Pod", "pod", version=2, status={"phase": "Running"})
    store.put(job())
    store.put(running)
    assert [owner.uid for owner, _ in store.pods()] == ["uid-tune"], "whose metrics are read"
    store.put(ended("pod", version=4))
    assert store.put(moved(running, resourceVersion="3")) == set()
    assert (list(store.pods()), seen(store).pods, len(seen(store).ended)) == ([], [], 1)
    store.remove(ended("pod", version=5))
    assert held(store) == {"ends": 1}


@dataclass(frozen=True)
class EndCase:
    name: str
    minutes: float
    """Since the job ended."""
    ends: int
    touched: set[Key]


ENDS_OF_A_FINISHED_JOB = [
    EndCase(
        name="the message of a pod comes after the end of its job",
        minutes=1,
        ends=1,
        touched={TUNE},
    ),
    EndCase(
        name="a new operator lists the pods of a job that ended long ago",
        minutes=60,
        ends=0,
        touched=set(),
    ),
]


@pytest.mark.parametrize("case", ENDS_OF_A_FINISHED_JOB, ids=lambda case: case.name)
@pytest.mark.parametrize("pods_first", [False, True], ids=["jobs first", "pods first"])
def test_of_a_finished_job_only_late_reports_are_kept(case: EndCase, pods_first: bool) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    store = Store(now=lambda: begin + timedelta(minutes=case.minutes))
    order = [finished(), ended("pod", 0)]
    touched = [store.put(found) for found in (reversed(order) if pods_first else order)]
    assert len(seen(store).ended) == case.ends
    if not pods_first:
        assert touched[1] == case.touched
    store.forget_reports(seen(store).job)
    store.put_samples(Owner(TUNE, "uid-tune"), {0: {"luthier_train_step": 1}})
    assert (len(seen(store).ended), seen(store).progress) == (0, None)


def test_the_reports_of_a_job_at_work_are_not_forgotten() -> None:
    store = Store()
    store.put(job())
    store.put(ended("pod"))
    store.forget_reports(seen(store).job)
    assert len(seen(store).ended) == 1


@dataclass(frozen=True)
class BacklogCase:
    name: str
    then: list[dict[str, Any]]
    """What follows on a JobSet that was created."""
    backlog: int


PODS_OF = {naming.CHILD_LABELS[0]: "uid-ftj-tune-run"}
BACKLOGS = [
    BacklogCase(
        name="nothing",
        then=[],
        backlog=1,
    ),
    BacklogCase(
        name="its controller has begun",
        then=[owned("JobSet", "ftj-tune-run", version=2, status={"restarts": 0})],
        backlog=1,
    ),
    BacklogCase(
        name="a pod",
        then=[moved(owned("Pod", "a"), labels=owned("Pod", "a")["metadata"]["labels"] | PODS_OF)],
        backlog=0,
    ),
    BacklogCase(
        name="a pod, and another count of the JobSet",
        then=[
            moved(owned("Pod", "a"), labels=owned("Pod", "a")["metadata"]["labels"] | PODS_OF),
            owned("JobSet", "ftj-tune-run", version=2, status={"restarts": 0}),
        ],
        backlog=0,
    ),
    BacklogCase(
        name="a queue holds it",
        then=[owned("JobSet", "ftj-tune-run", version=2, spec={"suspend": True})],
        backlog=0,
    ),
    BacklogCase(
        name="a queue has held it",
        then=[
            owned("JobSet", "ftj-tune-run", version=2, spec={"suspend": True}),
            owned("JobSet", "ftj-tune-run", version=3, spec={"suspend": False}),
        ],
        backlog=1,
    ),
    BacklogCase(
        name="it has failed",
        then=[owned("JobSet", "ftj-tune-run", version=2, status={"conditions": [condition("Failed")]})],
        backlog=0,
    ),
]


@pytest.mark.parametrize("case", BACKLOGS, ids=lambda case: case.name)
def test_children_without_pods_are_the_backlog(case: BacklogCase) -> None:
    store = Store()
    store.put(job())
    created = owned("JobSet", "ftj-tune-run")
    store.put(created)
    for found in case.then:
        store.put(found)
    assert seen(store).backlog == case.backlog
    store.remove(created)
    assert seen(store).backlog == 0


@dataclass(frozen=True)
class NewsCase:
    name: str
    kind: str
    change: dict[str, Any]
    news: bool


NEWS = [
    NewsCase(
        name="a pod is scheduled",
        kind="Pod",
        change={"spec": {"nodeName": "a"}},
        news=True,
    ),
    NewsCase(
        name="a condition that nobody reads",
        kind="Pod",
        change={"status": {"conditions": [{"type": "Ready", "status": "False"}]}},
        news=False,
    ),
    NewsCase(
        name="a Job has failed",
        kind="Job",
        change={"status": {"conditions": [{"type": "Failed", "status": "True"}]}},
        news=True,
    ),
    NewsCase(
        name="a count that nobody reads",
        kind="Job",
        change={"status": {"ready": 1}},
        news=False,
    ),
]


@pytest.mark.parametrize("case", NEWS, ids=lambda case: case.name)
def test_a_change_that_nobody_reads_is_no_news(case: NewsCase) -> None:
    store = Store()
    store.put(job())
    found = owned(case.kind, "a", version=2)
    store.put(found)
    later = found | case.change | {"metadata": found["metadata"] | {"resourceVersion": "3"}}
    assert bool(store.put(later)) is case.news
    assert store.put(later) == set()


@dataclass(frozen=True)
class CheckCase:
    name: str
    holds: bool
    """Whether nobody has to look at the job because of the time alone."""
    pods: tuple[dict[str, Any], ...]
    """Status and metadata of each pod of its JobSet of two."""
    jobset: dict[str, Any] = field(default_factory=dict)
    state: str = "Starting"
    written: int = 1
    """The version of the job that the operator has written last."""
    expected: int | None = 2


RUNS = {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]}
WAITS = {"phase": "Pending", "containerStatuses": [{"name": "trainer", "state": {"waiting": {}}}]}
NEW = {"phase": "Pending"}
HAS_NODE = {
    "phase": "Pending",
    "conditions": [condition("PodScheduled") | {"lastTransitionTime": "2026-01-01T00:00:00Z"}],
}
NO_NODE = {"phase": "Pending", "conditions": [condition("PodScheduled", "False") | {"reason": "Unschedulable"}]}
DELETED = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
LONG_AGO = {"creationTimestamp": "2026-01-01T00:00:00Z"}
CHECKS = [
    CheckCase("all run", True, ({"status": RUNS}, {"status": RUNS})),
    CheckCase("one runs, nobody has sought a node for the other", True, ({"status": RUNS}, {"status": NEW})),
    CheckCase("for long", False, ({"status": RUNS}, {"status": NEW, "metadata": LONG_AGO})),
    CheckCase("one is missing", False, ({"status": RUNS},)),
    CheckCase("all are missing", False, ()),
    CheckCase("one has its node and does not start", False, ({"status": RUNS}, {"status": HAS_NODE})),
    CheckCase("one waits for its image", False, ({"status": RUNS}, {"status": WAITS})),
    CheckCase("no node takes one", False, ({"status": RUNS}, {"status": NO_NODE})),
    CheckCase("one is deleted", False, ({"status": RUNS}, {"status": RUNS, "metadata": DELETED})),
    CheckCase("one has ended", False, ({"status": RUNS}, {"status": RUNS | {"phase": "Succeeded"}})),
    CheckCase("the job reports a problem", False, ({"status": RUNS},) * 2, state="NoPods"),
    CheckCase("somebody else has written the job", False, ({"status": RUNS},) * 2, written=0),
    CheckCase("a queue holds the child", False, ({"status": NEW},) * 2, jobset={"spec": {"suspend": True}}),
    CheckCase("the child is deleted", False, ({"status": RUNS},) * 2, jobset={"metadata": DELETED}),
    CheckCase("the child has ended", False, ({"status": RUNS},) * 2, {"status": {"conditions": [condition("Failed")]}}),
    CheckCase("an earlier operator has created the child", False, ({"status": RUNS},) * 2, expected=None),
]


@pytest.mark.parametrize("case", CHECKS, ids=lambda case: case.name)
def test_a_job_is_not_looked_at_while_it_goes_as_expected(case: CheckCase) -> None:
    store = Store()
    store.put(job() | {"status": {"state": case.state}})
    child = owned("JobSet", "ftj-tune-run", spec={}) | {k: v for k, v in case.jobset.items() if k != "metadata"}
    child = moved(child, **case.jobset.get("metadata", {}))
    store.put(child)
    if case.expected is not None:
        store.expect(TUNE, child, case.expected)
    for number, pod in enumerate(case.pods):
        found = owned("Pod", f"pod-{number}", status=pod["status"])
        labels = found["metadata"]["labels"] | {naming.CHILD_LABELS[0]: child["metadata"]["uid"]}
        store.put(moved(found, labels=labels, **pod.get("metadata", {})))
    assert store.goes_as_expected(TUNE, case.written) == case.holds


def test_the_pods_that_are_expected_are_those_that_the_manifests_ask_for() -> None:
    generates = {
        "kind": "GenerateJob",
        "metadata": job()["metadata"],
        "spec": GENERATE | {"inputs": {"dataset": {"id": "a/b"}}, "shards": 5, "parallelism": 2},
    }
    generates |= {"apiVersion": "luthier.dev/v1alpha1"}
    found = [
        pods_at_once(manifest)
        for made in (job(resources={"nodes": 3, "gpusPerNode": 1}), generates)
        for manifest in objects(parse_job(made))
        if manifest["kind"] in OWNED
    ]
    assert found == [1, 3, 1, 2], "of prepare and of run"
