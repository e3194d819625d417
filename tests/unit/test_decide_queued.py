"""Queued, as a table: what Kueue's Workload and the child show, and what the job's conditions and events say of it.

Reasons and messages are those of Kueue v0.19.2, taken from a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cases.observed import (
    BEGIN,
    NOW,
    RUNNING,
    SETTINGS,
    at,
    child,
    decided,
    describe,
    ended,
    fine_tune,
    generate,
    observed,
    pod,
    said,
    status,
    waiting,
)

from luthier_api.kinds import JobKind
from luthier_operator import kueue
from luthier_operator.decide import decide
from luthier_operator.model import Job, Key, KueueCondition, KueueWorkload, Object
from luthier_operator.naming import job_of_child
from luthier_operator.statuses import text

BEGUN = status("Accepted", "Prepared", start_time=text(BEGIN))
JOB = fine_tune(BEGUN, scheduling={"queueName": "gpu"})
SHARDS = generate(BEGUN, scheduling={"queueName": "gpu"})
BOTH = [pod(JOB, "run", rank, state=RUNNING) for rank in (0, 1)]
HELD, LET_GO = child(JOB, "run", suspend=True), child(JOB, "run", resumed=at(-2))
NO_QUOTA = (
    "couldn't assign flavors to pod set node: insufficient unused quota for nvidia.com/gpu in flavor gpu, 2 more needed"
)
PREEMPTED = (
    "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the ClusterQueue; preemptor path:"
    " /gpu; preemptee path: /gpu"
)
TIMEOUT = "Exceeded the PodsReady timeout q-b/jobset-ftj-bot-run-21a0d"
GAVE_UP = "The workload is deactivated due to exceeding the maximum number of re-queuing retries"
SUSPEND_AND_BACK = (
    ". Kueue does not try again. Repair what kept the pods from starting, then set spec.suspend to true and back to"
    " false: the job queues again, and goes on from its checkpoint"
)
OVER_QUOTA = (
    "couldn't assign flavors to pod set node: insufficient quota for nvidia.com/gpu in flavor gpu, previously"
    " considered podsets requests (0) + current podset request (3) > maximum capacity (2)"
)
NOT_COVERED = "couldn't assign flavors to pod set node: resource memory unavailable in ClusterQueue"
ASK_FOR_LESS = "; the quota of the ClusterQueue cannot meet this request at all: ask for less, or have it raised"
WHY = (
    "is Kueue installed, are its integrations jobset.x-k8s.io/jobset and batch/job on, does it manage this namespace,"
    " does the priority class exist?"
)
NO_WORKLOAD = f"JobSet ftj-bot-run is suspended, and Kueue has made no Workload for it: {WHY}"
NOT_HELD = f"JobSet ftj-bot-run was not held back until there is quota, and runs without any: {WHY}"


def workload(of: Object, version: int = 5, **conditions: tuple[bool, str, str]) -> KueueWorkload:
    """A Workload of the child `of`. Type of a condition → whether it is true, reason and message."""
    return KueueWorkload(
        name="jobset-ftj-bot-run-21a0d",
        uid="workload-uid",
        version=version,
        child=of["metadata"]["uid"],
        conditions={name: KueueCondition(*given) for name, given in conditions.items()},
    )


def pending(message: str, reason: str = "Pending") -> dict[str, tuple[bool, str, str]]:
    return {"QuotaReserved": (False, reason, message)}


ADMITTED = {
    "QuotaReserved": (True, "QuotaReserved", "Quota reserved"),
    "Admitted": (True, "Admitted", "The workload is admitted"),
}


@dataclass(frozen=True)
class Case:
    name: str
    child: Object
    says: dict[str, tuple[bool, str, str]] | None
    admitted: str
    running: str
    state: str
    pods: list[Object] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Workload."""


CASES = [
    Case(
        name="no quota is left",
        child=HELD,
        says=pending(NO_QUOTA),
        admitted=f'False Pending: queue "gpu": {NO_QUOTA}',
        running=f'False WaitingForQueue: queue "gpu": {NO_QUOTA}',
        state="Queued",
    ),
    Case(
        name="others come first in a StrictFIFO queue",
        child=HELD,
        says={},
        admitted='False Pending: queue "gpu": it waits behind others in the queue',
        running='False WaitingForQueue: queue "gpu": it waits behind others in the queue',
        state="Queued",
    ),
    Case(
        name="more than the queue ever has",
        child=HELD,
        says=pending(OVER_QUOTA),
        admitted=f'False Unsatisfiable: queue "gpu": {OVER_QUOTA}{ASK_FOR_LESS}',
        running=f'False WaitingForQueue: queue "gpu": {OVER_QUOTA}{ASK_FOR_LESS}',
        state="Unsatisfiable",
    ),
    Case(
        name="a resource that the queue does not cover",
        child=HELD,
        says=pending(NOT_COVERED),
        admitted=f'False Unsatisfiable: queue "gpu": {NOT_COVERED}{ASK_FOR_LESS}',
        running=f'False WaitingForQueue: queue "gpu": {NOT_COVERED}{ASK_FOR_LESS}',
        state="Unsatisfiable",
    ),
    Case(
        name="a queue that does not exist",
        child=HELD,
        says=pending("LocalQueue gpu doesn't exist", reason="Inadmissible"),
        admitted='False Inadmissible: queue "gpu": LocalQueue gpu doesn\'t exist',
        running='False WaitingForQueue: queue "gpu": LocalQueue gpu doesn\'t exist',
        state="Inadmissible",
    ),
    Case(
        name="an admission check is pending",
        child=HELD,
        says={"QuotaReserved": (True, "QuotaReserved", "Quota reserved")},
        changes={"checks": {"capacity": {"name": "capacity", "state": "Pending", "message": "asked for nodes"}}},
        admitted=(
            'False QuotaReserved: queue "gpu": quota is reserved; waiting for the admission checks capacity (Pending:'
            " asked for nodes)"
        ),
        running=(
            'False WaitingForQueue: queue "gpu": quota is reserved; waiting for the admission checks capacity (Pending:'
            " asked for nodes)"
        ),
        state="Queued",
    ),
    Case(
        name="admitted, and the pods are not there yet",
        child=LET_GO,
        says=ADMITTED,
        admitted='True Admitted: queue "gpu": The workload is admitted',
        running="False Starting: waiting for 2 pods on 16 GPUs to start",
        state="Starting",
    ),
    Case(
        name="admitted, and running",
        child=LET_GO,
        says=ADMITTED,
        pods=BOTH,
        admitted='True Admitted: queue "gpu": The workload is admitted',
        running="True Running: 2 pods on 16 GPUs",
        state="Running",
    ),
    Case(
        name="preempted a moment ago: Admitted stays True until the pods have saved and ended",
        child=HELD,
        says=ADMITTED | {"Evicted": (True, "Preempted", PREEMPTED)},
        pods=[pod(JOB, "run", rank, state=RUNNING, deleting=True) for rank in (0, 1)],
        admitted=f'False Preempted: queue "gpu": {PREEMPTED}',
        running=f'False WaitingForQueue: queue "gpu": {PREEMPTED}',
        state="Queued",
    ),
    Case(
        name="preempted, and waiting for quota again",
        child=HELD,
        says={"Evicted": (True, "Preempted", PREEMPTED)} | pending(NO_QUOTA),
        admitted=f'False Preempted: queue "gpu": {PREEMPTED}. Now: {NO_QUOTA}',
        running=f'False WaitingForQueue: queue "gpu": {PREEMPTED}. Now: {NO_QUOTA}',
        state="Queued",
    ),
    Case(
        name="admitted again after a preemption",
        child=LET_GO,
        says=ADMITTED | {"Evicted": (False, "QuotaReserved", f"Previously: {PREEMPTED}")},
        pods=BOTH,
        admitted='True Admitted: queue "gpu": The workload is admitted',
        running="True Running: 2 pods on 16 GPUs",
        state="Running",
    ),
    Case(
        name="the pods did not start in time",
        child=HELD,
        says={"Evicted": (True, "PodsReadyTimeout", TIMEOUT)},
        changes={"requeue_at": "2026-03-01T12:00:05Z"},
        admitted=f'False PodsReadyTimeout: queue "gpu": {TIMEOUT}; it queues again at 2026-03-01T12:00:05Z',
        running=f'False WaitingForQueue: queue "gpu": {TIMEOUT}; it queues again at 2026-03-01T12:00:05Z',
        state="Queued",
    ),
    Case(
        name="the pods did not start, too often",
        child=HELD,
        says={"Evicted": (True, "DeactivatedDueToRequeuingLimitExceeded", GAVE_UP)},
        admitted=f'False DeactivatedDueToRequeuingLimitExceeded: queue "gpu": {GAVE_UP}{SUSPEND_AND_BACK}',
        running=f'False WaitingForQueue: queue "gpu": {GAVE_UP}{SUSPEND_AND_BACK}',
        state="Deactivated",
    ),
    Case(
        name="deactivated by somebody",
        child=HELD,
        says={"Evicted": (True, "Deactivated", "The workload is deactivated")},
        admitted=(
            'False Deactivated: queue "gpu": The workload is deactivated: set spec.active of Workload'
            " jobset-ftj-bot-run-21a0d to true to go on"
        ),
        running=(
            'False WaitingForQueue: queue "gpu": The workload is deactivated: set spec.active of Workload'
            " jobset-ftj-bot-run-21a0d to true to go on"
        ),
        state="Deactivated",
    ),
    Case(
        name="suspended, and Kueue makes no Workload: its priority class does not exist, for one",
        child=HELD,
        says=None,
        admitted=f'False WaitingForKueue: queue "gpu": {NO_WORKLOAD}',
        running=f'False WaitingForQueue: queue "gpu": {NO_WORKLOAD}',
        state="Queued",
    ),
    Case(
        name="never held: Kueue is not installed, or does not manage the namespace",
        child=child(JOB, "run"),
        says=None,
        pods=BOTH,
        admitted=f'Unknown NotQueued: queue "gpu": {NOT_HELD}',
        running="True Running: 2 pods on 16 GPUs",
        state="Running",
    ),
    Case(
        name="let go, and the Workload is not seen yet",
        child=LET_GO,
        says=None,
        pods=BOTH,
        admitted='True Admitted: queue "gpu": JobSet ftj-bot-run was admitted',
        running="True Running: 2 pods on 16 GPUs",
        state="Running",
    ),
    Case(
        name="run by MultiKueue in another cluster: there are no pods to wait for",
        child=LET_GO | {"spec": {"managedBy": "kueue.x-k8s.io/multikueue"}},
        says=ADMITTED,
        admitted='True Admitted: queue "gpu": The workload is admitted',
        running=(
            "False RunsElsewhere: JobSet ftj-bot-run is run by kueue.x-k8s.io/multikueue (spec.managedBy), in another"
            " cluster. Its pods need the claim of the workspace and the ConfigMap of this job there, too"
        ),
        state="RunsElsewhere",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queued(case: Case) -> None:
    says = None if case.says is None else replace(workload(case.child, **case.says), **case.changes)
    decision = decided(JOB, case.child, pods=case.pods, admission=says, kueue_readable=True)
    assert said(decision, "Admitted") == case.admitted
    assert said(decision, "Running") == case.running
    assert decision.status.state == case.state
    assert not decision.apply
    assert not decision.delete


def test_a_workload_takes_a_moment() -> None:
    """Kueue suspends a child when it is created, and makes its Workload a moment later."""
    new = child(JOB, "run", suspend=True, born=at(-1))
    decision = decided(JOB, new, kueue_readable=True)
    assert said(decision, "Admitted") == "absent"
    assert said(decision, "Running").startswith("False WaitingForQueue: JobSet ftj-bot-run is suspended by a queue")
    assert describe(decision) == "again in 9 s"
    assert [event.reason for event in decision.events] == ["WaitingForQueue"]


def test_without_the_right_to_read_workloads_the_child_tells() -> None:
    decision = decided(JOB, HELD)
    assert said(decision, "Admitted") == (
        'False Pending: queue "gpu": JobSet ftj-bot-run is suspended; see `kubectl describe workloads`'
    )
    assert said(decided(JOB, LET_GO, pods=BOTH), "Admitted").startswith("True Admitted")


def test_a_job_without_a_queue_has_no_such_condition() -> None:
    job = fine_tune(BEGUN)
    assert said(decided(job, child(job, "run"), pods=BOTH, kueue_readable=True), "Admitted") == "absent"


def test_shards_are_queued_as_well() -> None:
    held = child(SHARDS, "run", suspend=True)
    decision = decided(SHARDS, held, admission=workload(held, **pending(NO_QUOTA)), kueue_readable=True)
    assert said(decision, "Admitted") == f'False Pending: queue "gpu": {NO_QUOTA}'


def test_why_the_pods_did_not_start_is_kept_when_kueue_deletes_them() -> None:
    """Each eviction deletes the pod that showed the reason."""
    pulling = [pod(JOB, "run", rank, state=waiting("ErrImagePull", "not found")) for rank in (0, 1)]
    job = after(JOB, LET_GO, pods=pulling, admission=workload(LET_GO, **ADMITTED))
    reason = (
        "False ImagePullFailed: the trainer image cannot be pulled for pod ftj-bot-run-0-0. An administrator sets it by"
        " trainer.image (chart), and imagePullSecrets for a registry that asks who pulls: not found"
    )
    for says in (
        {"Evicted": (True, "PodsReadyTimeout", TIMEOUT)},
        {"Evicted": (True, "PodsReadyTimeout", TIMEOUT)} | pending(NO_QUOTA),
        {"Evicted": (True, "DeactivatedDueToRequeuingLimitExceeded", GAVE_UP)},
    ):
        decision = decided(job, HELD, admission=workload(HELD, **says), kueue_readable=True)
        assert said(decision, "Running") == reason
        job = job.model_copy(update={"status": decision.status})
    assert decision.status.state == "Deactivated"
    # Admitted again, the pods tell anew.
    decision = decided(job, LET_GO, pods=BOTH, admission=workload(LET_GO, **ADMITTED), kueue_readable=True)
    assert said(decision, "Running") == "True Running: 2 pods on 16 GPUs"


def after(job: Job, *children: Object, **more: Any) -> Job:
    """The job with the status that follows."""
    return job.model_copy(update={"status": decided(job, *children, kueue_readable=True, **more).status})


@dataclass(frozen=True)
class EventCase:
    name: str
    says: dict[str, tuple[bool, str, str]]
    child: Object
    events: list[str]


EVENTS = [
    EventCase(
        name="waits",
        says=pending(NO_QUOTA),
        child=HELD,
        events=["Normal WaitingForQueue"],
    ),
    EventCase(
        name="admitted",
        says=ADMITTED,
        child=LET_GO,
        events=["Normal Admitted"],
    ),
    EventCase(
        name="preempted",
        says={"Evicted": (True, "Preempted", PREEMPTED)},
        child=HELD,
        events=["Warning Evicted", "Normal WaitingForQueue"],
    ),
    EventCase(
        name="given up",
        says={"Evicted": (True, "DeactivatedDueToRequeuingLimitExceeded", GAVE_UP)},
        child=HELD,
        events=["Warning Deactivated", "Normal WaitingForQueue"],
    ),
    EventCase(
        name="no such queue",
        says=pending("LocalQueue gpu doesn't exist", reason="Inadmissible"),
        child=HELD,
        events=["Warning Inadmissible", "Normal WaitingForQueue"],
    ),
]


@pytest.mark.parametrize("case", EVENTS, ids=lambda case: case.name)
def test_events(case: EventCase) -> None:
    decision = decided(JOB, case.child, admission=workload(case.child, **case.says), kueue_readable=True)
    assert [f"{event.type} {event.reason}" for event in decision.events if event.reason != "Started"] == case.events


def test_a_suspended_job_leaves_the_queue_and_comes_back_anew() -> None:
    """The way out of a deactivation: the child is deleted, and Kueue makes another Workload for the next one."""
    gave_up = workload(HELD, Evicted=(True, "DeactivatedDueToRequeuingLimitExceeded", GAVE_UP))
    job = after(JOB, HELD, admission=gave_up)
    suspended = job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": True})})
    decision = decided(suspended, HELD, admission=gave_up, kueue_readable=True)
    assert describe(decision) == "deletes JobSet ftj-bot-run"
    assert said(decision, "Admitted") == "absent"
    resumed = job.model_copy(update={"status": decision.status})
    assert describe(decided(resumed, kueue_readable=True)) == "repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run"


@dataclass(frozen=True)
class EvictedBefore:
    name: str
    restarted: bool
    """The operator, between the eviction and the failure: it does not know the evicted pods any more."""


@pytest.mark.parametrize(
    "case",
    [EvictedBefore("one operator", restarted=False), EvictedBefore("another operator", restarted=True)],
    ids=lambda case: case.name,
)
def test_an_eviction_does_not_hide_the_failure_after_it(case: EvictedBefore) -> None:
    """JobSet numbers the pods of both starts 0: it counts only the restarts that it makes itself."""
    evicted = [ended(JOB, "run", 75, rank, suffix="-a", when=-600, step=40) for rank in (0, 1)]
    failed = [ended(JOB, "run", 66, 0, suffix="-b", when=-60, message="spec.model.id: not found")]
    job = after(JOB, HELD, ends=evicted, admission=workload(HELD, Evicted=(True, "Preempted", PREEMPTED)))
    assert [attempt.reason for attempt in job.status.attempts] == ["Preempted"]
    over = child(JOB, "run", "Failed", reason="FailJobSetFailurePolicyAction", since=at(-50))
    seen = failed if case.restarted else evicted + failed
    decision = decide(observed(job, over, ends=seen, kueue_readable=True), SETTINGS, NOW)
    assert said(decision, "Failed").startswith("True NotFound: spec.model.id: not found")
    assert [attempt.reason for attempt in decision.status.attempts] == ["NotFound"]


def test_an_eviction_that_jobset_takes_for_a_failure_is_free() -> None:
    """One in ten: the Job controller still sees the pod that ended with 75, and its rule fails the suspended Job."""
    restarted = child(JOB, "run", suspend=True, restarts=1)
    ends = [ended(JOB, "run", 75, rank, when=-30, step=40) for rank in (0, 1)]
    says = workload(restarted, Evicted=(True, "Preempted", PREEMPTED))
    decision = decided(JOB, restarted, ends=ends, admission=says, kueue_readable=True)
    assert (decision.status.restarts, decision.status.restarts_charged) == (1, 0)
    assert decision.status.state == "Queued"
    assert describe(decision) == "waits"


def test_evictions_in_a_row_are_charged_to_nobody() -> None:
    job = JOB
    for number in range(6):
        ends = [ended(JOB, "run", 75, rank, suffix=f"-{number}", when=-600 + 60 * number) for rank in (0, 1)]
        job = after(job, HELD, ends=ends, admission=workload(HELD, Evicted=(True, "Preempted", PREEMPTED)))
    assert not job.status.finished
    assert job.status.restarts_charged == 0
    assert [attempt.charged for attempt in job.status.attempts] == [False]


@dataclass(frozen=True)
class NameCase:
    name: str
    job: tuple[JobKind, str] | None


@pytest.mark.parametrize(
    "case",
    [
        NameCase("ftj-bot-run", (JobKind.FINE_TUNE, "bot")),
        NameCase("gj-a-run-b-run", (JobKind.GENERATE, "a-run-b")),
        NameCase("ftj-bot-prepare", None),
        NameCase("ftj--run", None),
        NameCase("ftj-run", None),
        NameCase("other-bot-run", None),
    ],
    ids=lambda case: case.name,
)
def test_whose_child_has_this_name(case: NameCase) -> None:
    assert job_of_child(case.name, "run") == case.job


def raw(version: int = 5, reason: str = "Pending", owner: str = "ftj-bot-run", uid: str = "workload-uid") -> Object:
    """A Workload as the API server sends it."""
    return {
        "kind": "Workload",
        "metadata": {
            "name": f"jobset-{owner}-21a0d",
            "namespace": "ml",
            "uid": uid,
            "resourceVersion": str(version),
            "ownerReferences": [{"kind": "JobSet", "name": owner, "uid": f"{owner}-uid", "controller": True}],
        },
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "reason": reason, "message": "none"}]},
    }


KEY = Key(JobKind.FINE_TUNE, "ml", "bot")


def test_only_news_of_our_own_workloads_wakes_a_job() -> None:
    workloads = kueue.Workloads()
    assert workloads.put(raw(owner="somebody-elses")) == set()
    assert workloads.put(raw(5)) == {KEY}
    assert workloads.put(raw(6)) == set()
    assert workloads.put(raw(7, reason="Inadmissible")) == {KEY}
    assert workloads.put(raw(6)) == set()
    found = workloads.of(HELD)
    assert found is not None
    assert found.conditions["QuotaReserved"].reason == "Inadmissible"


def test_a_workload_that_is_gone_is_forgotten() -> None:
    workloads = kueue.Workloads()
    workloads.put(raw(5))
    assert workloads.remove(raw(9, uid="another")) == set()
    assert workloads.prune("elsewhere", set(), 100) == set()
    assert workloads.prune(None, set(), 4) == set()
    assert workloads.prune("ml", set(), 5) == {KEY}
    assert workloads.of(HELD) is None
    workloads.put(raw(6))
    assert workloads.remove(raw(9)) == {KEY}
    assert workloads.of(HELD) is None
