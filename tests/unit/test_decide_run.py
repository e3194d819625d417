"""Run, as a table: groups that train, shards that generate, and what their ends mean."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    prepared_end,
    said,
    status,
    waiting,
)

from luthier_api.status import (
    Attempt,
    Checkpoint,
    Plan,
    Prepared,
    Progress,
    ResolvedDataset,
    ResolvedSource,
    TrackedRun,
)
from luthier_operator.decide import decide
from luthier_operator.model import Object, PodEnd
from luthier_operator.statuses import at_end, text
from luthier_operator.workloads import workload

BEGUN = status("Accepted", "Prepared", start_time=text(BEGIN))
ONE_AT_ONCE = generate(BEGUN, shards=8, parallelism=1)
JOB, SHARDS, CPU = fine_tune(BEGUN), generate(BEGUN), fine_tune(BEGUN, resources={"gpusPerNode": 0})
VOLCANO = generate(BEGUN, scheduling={"schedulerName": "volcano"})
QUEUED = fine_tune(BEGUN, scheduling={"queueName": "team-a"})
BOTH = [pod(JOB, "run", 0, state=RUNNING), pod(JOB, "run", 1, state=RUNNING)]
EXIT_66 = (
    "Container trainer for pod ml/ftj-bot-run-node-0-0-x failed with exit code 66 matching FailJob rule at index 0"
)


def group(**given: Any) -> Object:
    return child(JOB, "run", **given)


def failed_shards(indexes: str, reason: str) -> Object:
    """The Job of SHARDS after these shards have failed for good."""
    found = child(SHARDS, "run", "Failed", reason=reason)
    return found | {"status": found["status"] | {"failedIndexes": indexes}}


def situation(*children: Object, job: Any = JOB, **more: Any) -> Any:
    return job, children, more


@dataclass(frozen=True)
class Case:
    name: str
    given: Any
    expect: str
    condition: str


CASES = [
    Case(
        name="prepare is still at work",
        given=situation(child(JOB, "prepare"), job=fine_tune(status("Accepted"))),
        expect="waits",
        condition="absent",
    ),
    Case(
        name="prepared",
        given=situation(),
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="prepared, on CPU",
        given=situation(job=CPU),
        expect="repairs ConfigMap ftj-bot; applies JobSet ftj-bot-run",
        condition="False Starting: waiting for 1 pod on CPU to start",
    ),
    Case(
        name="prepared, to generate",
        given=situation(job=SHARDS),
        expect="repairs ConfigMap gj-lutes; applies Job gj-lutes-run",
        condition="False Starting: waiting for 2 shards on 2 GPUs to start",
    ),
    Case(
        name="no pod yet",
        given=situation(group(born=at(-2))),
        expect="again in 28.2 s",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="still no pod",
        given=situation(group(born=at(-31))),
        expect="waits",
        condition=(
            "False NoPods: the cluster has created no pods for JobSet ftj-bot-run so far; see `kubectl describe jobset"
            " ftj-bot-run` and `kubectl describe job ftj-bot-run-node-0`"
        ),
    ),
    Case(
        name="still one of two pods",
        given=situation(group(), pods=BOTH[:1]),
        expect="waits",
        condition=(
            "False NoPods: the cluster has created only 1 of 2 pods for JobSet ftj-bot-run so far; see `kubectl"
            " describe jobset ftj-bot-run` and `kubectl describe job ftj-bot-run-node-0`"
        ),
    ),
    Case(
        name="still no shard",
        given=situation(child(SHARDS, "run"), job=SHARDS),
        expect="waits",
        condition=(
            "False NoPods: the cluster has created no pods for Job gj-lutes-run so far; see `kubectl describe job"
            " gj-lutes-run`"
        ),
    ),
    Case(
        name="one of two runs",
        given=situation(group(), pods=[BOTH[0], pod(JOB, "run", 1, over="Pending")]),
        expect="waits",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="one of two runs, and prepare has ended well",
        given=situation(group(), pods=[BOTH[0], pod(JOB, "run", 1, over="Pending")], ends=[prepared_end(JOB)]),
        expect="waits",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="one of two has a node, the other is not there: what is due first",
        given=situation(group(born=at(-2)), pods=[pod(JOB, "run", 0, scheduled=at(-10))]),
        expect="again in 20 s",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="one of two runs, the other waits for its volume or for its config map",
        given=situation(
            group(), pods=[BOTH[0], pod(JOB, "run", 1, state=waiting("ContainerCreating"), scheduled=at(-40))]
        ),
        expect="repairs ConfigMap ftj-bot",
        condition=(
            "False ContainerCreating: pod ftj-bot-run-1-0 was scheduled, but its container has not started after 30"
            " s: it waits for its image or for a volume (spec.volumes, spec.workspace); see `kubectl describe pod"
            " ftj-bot-run-1-0`"
        ),
    ),
    Case(
        name="no scheduler has tried to give one a node, for some time",
        given=situation(group(), pods=[BOTH[0], pod(JOB, "run", 1, over="Pending", node="", born=at(-299))]),
        expect="waits",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="no scheduler has tried to give one a node, for long",
        given=situation(group(), pods=[BOTH[0], pod(JOB, "run", 1, over="Pending", node="", born=at(-301))]),
        expect="waits",
        condition=(
            "False Unschedulable: pod ftj-bot-run-1-0 has no node, and no scheduler has said why for 300 s: the"
            " scheduler does not run in this cluster, or is behind"
        ),
    ),
    Case(
        name="a scheduler that nobody runs",
        given=situation(
            child(VOLCANO, "run"),
            job=VOLCANO,
            pods=[pod(VOLCANO, "run", i, over="Pending", node="", born=at(-301)) for i in (0, 1)],
        ),
        expect="waits",
        condition=(
            "False Unschedulable: pod gj-lutes-run-0-0 has no node, and no scheduler has said why for 300 s: volcano"
            " (spec.scheduling.schedulerName) does not run in this cluster, or is behind"
        ),
    ),
    Case(
        name="JobSet is gone from the cluster",
        given=situation(jobset_installed=False),
        expect="again in 30 s",
        condition=(
            "False JobSetMissing: FineTuneJobs need JobSet, which this cluster does not have. Install it: kubectl apply"
            " --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
        ),
    ),
    Case(
        name="all run",
        given=situation(group(), pods=BOTH),
        expect="waits",
        condition="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="one shard of two runs",
        given=situation(child(SHARDS, "run"), job=SHARDS, pods=[pod(SHARDS, "run", 1, state=RUNNING)]),
        expect="waits",
        condition="True Running: 2 shards on 2 GPUs",
    ),
    Case(
        name="one runs, one has ended well",
        given=situation(group(), pods=BOTH[:1], ends=[ended(JOB, "run", 0, 1)]),
        expect="waits",
        condition="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="all have ended well, the JobSet not yet",
        given=situation(group(), ends=[ended(JOB, "run", 0, i) for i in (0, 1)]),
        expect="waits",
        condition="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="one ended well in the attempt before",
        given=situation(group(restarts=1), pods=[pod(JOB, "run", 0, 1, RUNNING)], ends=[ended(JOB, "run", 0, 1)]),
        expect="waits",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="one shard has ended, the other finds no node",
        given=situation(
            child(SHARDS, "run"),
            job=SHARDS,
            ends=[ended(SHARDS, "run", 0)],
            pods=[pod(SHARDS, "run", 1, unschedulable="none")],
        ),
        expect="waits",
        condition="False Unschedulable: pod gj-lutes-run-1-0: none",
    ),
    Case(
        name="held by the queue",
        given=situation(child(QUEUED, "run", suspend=True), job=QUEUED),
        expect="waits",
        condition=(
            'False WaitingForQueue: queue "team-a": JobSet ftj-bot-run is suspended; see `kubectl describe workloads`'
        ),
    ),
    Case(
        name="let go by the queue a moment ago",
        given=situation(child(QUEUED, "run", resumed=at(-2)), job=QUEUED),
        expect="again in 28.2 s",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="let go by the queue this moment",
        given=situation(child(QUEUED, "run", suspend=True) | {"spec": {"suspend": False}}, job=QUEUED),
        expect="waits",
        condition="False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    Case(
        name="preempted by the queue, still saving",
        given=situation(
            child(QUEUED, "run", suspend=True),
            job=QUEUED,
            pods=[pod(QUEUED, "run", i, state=RUNNING, deleting=True) for i in (0, 1)],
        ),
        expect="waits",
        condition=(
            'False WaitingForQueue: queue "team-a": JobSet ftj-bot-run is suspended; see `kubectl describe workloads`'
        ),
    ),
    Case(
        name="no node has the GPUs",
        given=situation(
            group(), pods=[pod(JOB, "run", 1, unschedulable="0/4 nodes are available: 4 Insufficient nvidia.com/gpu.")]
        ),
        expect="waits",
        condition=(
            "False Unschedulable: spec.resources.gpusPerNode: pod ftj-bot-run-1-0: 0/4 nodes are available: 4"
            " Insufficient nvidia.com/gpu. To solve it: ask for no more than one node has, or wait until other pods"
            " have ended"
        ),
    ),
    Case(
        name="no node has the GPUs of the second",
        given=situation(
            group(),
            pods=[BOTH[0], pod(JOB, "run", 1, unschedulable="0/4 nodes are available: 4 Insufficient nvidia.com/gpu.")],
        ),
        expect="waits",
        condition=(
            "False Unschedulable: spec.resources.gpusPerNode: pod ftj-bot-run-1-0: 0/4 nodes are available: 4"
            " Insufficient nvidia.com/gpu. To solve it: ask for no more than one node has, or wait until other pods"
            " have ended"
        ),
    ),
    Case(
        name="the image does not come",
        given=situation(group(), pods=[pod(JOB, "run", 0, state=waiting("ImagePullBackOff", "not found"))]),
        expect="waits",
        condition=(
            "False ImagePullFailed: the trainer image cannot be pulled for pod ftj-bot-run-0-0. An administrator sets"
            " it by trainer.image (chart), and imagePullSecrets for a registry that asks who pulls: not found"
        ),
    ),
    Case(
        name="a peer was lost",
        given=situation(
            group(),
            ends=[
                ended(JOB, "run", 81, 0, message="peer 1 is gone"),
                ended(JOB, "run", 71, 1, message="XID 79", when=-50),
            ],
        ),
        expect="waits",
        condition=(
            "False Restarting: after InfrastructureError: XID 79 (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit"
            " code 71)"
        ),
    ),
    Case(
        name="restarted, the pods of before still leave",
        given=situation(group(restarts=1), pods=BOTH, ends=[ended(JOB, "run", 71, 1, message="XID 79")]),
        expect="waits",
        condition=(
            "False Restarting: after InfrastructureError: XID 79 (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit"
            " code 71)"
        ),
    ),
    Case(
        name="restarted, and at work",
        given=situation(
            group(restarts=1), pods=[pod(JOB, "run", i, 1, RUNNING) for i in (0, 1)], ends=[ended(JOB, "run", 71)]
        ),
        expect="waits",
        condition="True Running: 2 pods on 16 GPUs",
    ),
    Case(
        name="out of GPU memory",
        given=situation(
            group(state="Failed", reason="FailJobSetFailurePolicyAction"),
            ends=[ended(JOB, "run", 79, message="The GPU is full: set ...")],
        ),
        expect="Failed CudaOutOfMemory",
        condition=(
            "False CudaOutOfMemory: The GPU is full: set ... (run, rank 0, pod ftj-bot-run-0-0 on node-a, exit code 79)"
        ),
    ),
    Case(
        name="a mistake, though a pod was evicted with it",
        given=situation(
            group(state="Failed", reason="FailJobSetFailurePolicyAction"),
            ends=[ended(JOB, "run", 75, 0, disrupted=True), ended(JOB, "run", 82, 1, message="loss is NaN")],
        ),
        expect="Failed Diverged",
        condition="False Diverged: loss is NaN (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit code 82)",
    ),
    Case(
        name="killed for its memory, whatever the exit code",
        given=situation(
            group(state="Failed", reason="ReachedMaxRestarts"),
            ends=[ended(JOB, "run", 1, kubernetes="OOMKilled", silent=True)],
        ),
        expect="Failed HostOutOfMemory",
        condition=(
            "False HostOutOfMemory: the pod used more memory than its limit of 16Gi. Raise spec.resources.memory, or"
            " use smaller batches (run, pod ftj-bot-run-0-0 on node-a, exit code 1). That was the last of 3"
            " restarts (spec.restarts.max)"
        ),
    ),
    Case(
        name="killed whole for its memory: the same would come again",
        given=situation(group(), ends=[ended(JOB, "run", 137, 1, kubernetes="OOMKilled", silent=True)], pods=BOTH[:1]),
        expect="deletes JobSet ftj-bot-run; Failed HostOutOfMemory",
        condition=(
            "False HostOutOfMemory: the pod used more memory than its limit of 16Gi. Raise spec.resources.memory, "
            "or use smaller batches (run, pod ftj-bot-run-1-0 on node-a, exit code 137)"
        ),
    ),
    Case(
        name="killed whole for its memory, restarted before we looked",
        given=situation(
            group(restarts=1, charged=1), ends=[ended(JOB, "run", 137, kubernetes="OOMKilled", silent=True)]
        ),
        expect="deletes JobSet ftj-bot-run; Failed HostOutOfMemory",
        condition=(
            "False HostOutOfMemory: the pod used more memory than its limit of 16Gi. Raise spec.resources.memory, "
            "or use smaller batches (run, pod ftj-bot-run-0-0 on node-a, exit code 137)"
        ),
    ),
    Case(
        name="evicted by a node that ran out of memory",
        given=situation(group(), ends=[ended(JOB, "run", 137, kubernetes="OOMKilled", silent=True, disrupted=True)]),
        expect="waits",
        condition=(
            "False Restarting: after HostOutOfMemory: the pod used more memory than its limit of 16Gi. Raise"
            " spec.resources.memory, or use smaller batches (run, pod ftj-bot-run-0-0 on node-a, exit code 137)"
        ),
    ),
    Case(
        name="killed by somebody",
        given=situation(group(), ends=[ended(JOB, "run", 137, silent=True)]),
        expect="waits",
        condition=(
            "False Restarting: after InfrastructureError: the process was killed by SIGKILL, which Luthier did not"
            " send: by the kernel, or by somebody (run, pod"
            " ftj-bot-run-0-0 on node-a, exit code 137)"
        ),
    ),
    Case(
        name="a shard killed whole for its memory stops no other",
        given=situation(
            child(SHARDS, "run"), job=SHARDS, ends=[ended(SHARDS, "run", 137, kubernetes="OOMKilled", silent=True)]
        ),
        expect="waits",
        condition=(
            "False Restarting: after HostOutOfMemory: the pod used more memory than its limit of 16Gi. Raise"
            " spec.resources.memory, or use smaller batches (run, rank 0, pod gj-lutes-run-0-0 on node-a, exit code"
            " 137)"
        ),
    ),
    Case(
        name="failed while the operator was away, its Job still tells",
        given=situation(group(state="Failed", message=EXIT_66)),
        expect="Failed NotFound",
        condition=(
            f"False NotFound: {EXIT_66}; the pod's own message was not seen. See `kubectl logs"
            " ftj-bot-run-node-0-0-x -c trainer`"
        ),
    ),
    Case(
        name="failed a moment ago",
        given=situation(group(state="Failed", since=at(-2))),
        expect="again in 3 s",
        condition="absent",
    ),
    Case(
        name="failed a moment ago, only the failure before is known",
        given=situation(group(state="Failed", since=at(-2), restarts=1), ends=[ended(JOB, "run", 70)]),
        expect="again in 3 s",
        condition="absent",
    ),
    Case(
        name="failed a moment ago, and why is known",
        given=situation(
            group(state="Failed", since=at(-2), restarts=1), ends=[ended(JOB, "run", 70, attempt=1, message="no")]
        ),
        expect="Failed TrainingError",
        condition="False TrainingError: no (run, rank 0, pod ftj-bot-run-0-1 on node-a, exit code 70)",
    ),
    Case(
        name="some shards cannot succeed",
        given=situation(
            failed_shards("1", "FailedIndexes"),
            job=SHARDS,
            ends=[
                ended(SHARDS, "run", 79, 1, message="The GPU is full"),
                ended(SHARDS, "run", 71, 0, when=-10, suffix="-b"),
            ],
        ),
        expect="Failed CudaOutOfMemory",
        condition=(
            "False CudaOutOfMemory: The GPU is full (run, rank 1, pod gj-lutes-run-1-0 on node-a, exit code 79). This"
            " ended shard 1 of 2 for good; the others are complete, and what was generated stays in the workspace"
        ),
    ),
    Case(
        name="the first shard that cannot succeed stops the others",
        given=situation(
            failed_shards("0,1", "MaxFailedIndexesExceeded"),
            job=SHARDS,
            ends=[ended(SHARDS, "run", 79, 1, message="The GPU is full")],
        ),
        expect="Failed CudaOutOfMemory",
        condition=(
            "False CudaOutOfMemory: The GPU is full (run, rank 1, pod gj-lutes-run-1-0 on node-a, exit code 79). This"
            " ended shards 0,1 of 2 for good, and spec.maxFailedShards: 0 stopped the others; what was generated stays"
            " in the workspace"
        ),
    ),
    Case(
        name="not all shards work at once, and none is missing",
        given=situation(
            child(ONE_AT_ONCE, "run"),
            job=ONE_AT_ONCE,
            pods=[pod(ONE_AT_ONCE, "run", 0, state=waiting("PodInitializing"), over="Pending")],
        ),
        expect="waits",
        condition="False Starting: waiting for 8 shards, 1 at once, on 1 GPU to start",
    ),
    Case(
        name="trained",
        given=situation(group(state="Complete")),
        expect="Complete Completed",
        condition="False Trained: all pods have succeeded",
    ),
    Case(
        name="generated",
        given=situation(child(SHARDS, "run", "Complete"), job=SHARDS),
        expect="Complete Completed",
        condition="False Generated: all pods have succeeded",
    ),
    Case(
        name="trained, and the JobSet is gone",
        given=situation(job=fine_tune(status("Accepted", "Prepared", "Trained"))),
        expect="Complete Completed",
        condition="absent",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run(case: Case) -> None:
    job, children, more = case.given
    decision = decided(job, *children, **more)
    assert describe(decision) == case.expect
    assert said(decision, "Running") == case.condition


@dataclass(frozen=True)
class StateCase:
    name: str
    pods: list[Object]
    state: str


STATES = [
    StateCase(
        name="Pending pods",
        pods=[pod(JOB, "run", 0, unschedulable="none")],
        state="Unschedulable",
    ),
    StateCase(
        name="no pods",
        pods=[],
        state="NoPods",
    ),
    StateCase(
        name="a pod each, not yet with a node",
        pods=[pod(JOB, "run", i, over="Pending") for i in (0, 1)],
        state="Starting",
    ),
    StateCase(
        name="all",
        pods=BOTH,
        state="Running",
    ),
]


@pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)
def test_the_state_is_one_word_for_people(case: StateCase) -> None:
    assert decided(JOB, group(), pods=case.pods).status.state == case.state


def test_each_new_trouble_is_an_event_and_none_twice() -> None:
    nowhere = [pod(JOB, "run", 0, unschedulable="no GPUs")]
    no_image = [pod(JOB, "run", 0, state=waiting("ErrImagePull", "no such host"))]
    job, seen = fine_tune(decided(JOB, group()).status), []
    for pods in (
        nowhere,
        nowhere,
        no_image,
        [pod(JOB, "run", 0, state=waiting("ImagePullBackOff", "back-off"))],
        BOTH,
        BOTH,
    ):
        decision = decided(job, group(), pods=pods)
        seen.append([(e.type, e.reason) for e in decision.events])
        job = fine_tune(decision.status)
    assert seen == [
        [("Warning", "Unschedulable")],
        [],
        [("Warning", "ImagePullFailed")],
        [],
        [("Normal", "Started")],
        [],
    ]


def test_the_counters_are_those_of_the_jobset() -> None:
    counted = decided(JOB, group(restarts=3, charged=1)).status
    assert (counted.restarts, counted.restarts_charged) == (3, 1)


def test_the_jobset_knows_better_what_it_charged() -> None:
    """The pod said 137, which would be charged; JobSet saw a disrupted pod first, and did not."""
    before = decided(JOB, group(), ends=[ended(JOB, "run", 137, silent=True)]).status
    assert [a.charged for a in before.attempts] == [True]
    after = decided(fine_tune(before), group(restarts=1), ends=[ended(JOB, "run", 137, silent=True)])
    assert [a.charged for a in after.status.attempts] == [False]
    assert [(e.type, e.reason, e.message[:24]) for e in after.events] == [
        ("Warning", "Restarting", "restart 1 (not charged) ")
    ]
    again = decided(fine_tune(after.status), group(restarts=1), ends=[ended(JOB, "run", 137, silent=True)])
    assert (again.status, again.events) == (after.status, ())


def test_better_evidence_replaces_worse_and_older_evidence_stays() -> None:
    lost, broken = ended(JOB, "run", 81, 0, when=-60), ended(JOB, "run", 71, 1, when=-40)
    first = decided(JOB, group(), ends=[lost]).status
    assert [(a.rank, a.reason) for a in first.attempts] == [(0, "PeerLost")]
    second = decided(fine_tune(first), group(), ends=[lost, broken]).status
    assert [(a.rank, a.reason) for a in second.attempts] == [(1, "InfrastructureError")]
    restarted = decided(fine_tune(second), group(), ends=[lost]).status
    assert restarted.attempts == second.attempts, "another operator has seen only one of the pods"


def crashed(number: int, step: int | None) -> Attempt:
    """An attempt after which the restart was charged."""
    return Attempt(
        phase="run",
        attempt=number,
        reason="TrainingError",
        exit_code=70,
        pod=f"p{number}",
        step=step,
        message="boom",
        charged=True,
        time=text(at(number - 100)),
    )


def preempted(number: int, step: int | None) -> Attempt:
    """An attempt after which the restart was not charged."""
    fields = {"reason": "Preempted", "exit_code": 75, "message": "saved", "charged": False}
    return crashed(number, step).model_copy(update=fields)


@dataclass(frozen=True)
class NoProgressCase:
    name: str
    attempts: list[Attempt]
    expect: str


NO_PROGRESS = [
    NoProgressCase(
        name="a checkpoint each time",
        attempts=[crashed(i, 10 * i) for i in range(4)],
        expect="waits",
    ),
    NoProgressCase(
        name="two restarts without",
        attempts=[crashed(0, 10), crashed(1, 10), crashed(2, 10)],
        expect="waits",
    ),
    NoProgressCase(
        name="three restarts without",
        attempts=[crashed(0, 10), crashed(1, 10), crashed(2, 10), crashed(3, 10)],
        expect="deletes JobSet ftj-bot-run; Failed NoProgress",
    ),
    NoProgressCase(
        name="never a checkpoint at all",
        attempts=[crashed(i, None) for i in range(4)],
        expect="deletes JobSet ftj-bot-run; Failed NoProgress",
    ),
    NoProgressCase(
        name="one went unseen",
        attempts=[crashed(i, 10) for i in (0, 1, 3, 4)],
        expect="waits",
    ),
    NoProgressCase(
        name="preemptions are not counted, however many there are",
        attempts=[preempted(i, 10) for i in range(8)],
        expect="waits",
    ),
    NoProgressCase(
        name="three counted ones among preemptions",
        attempts=[crashed(0, 10), preempted(1, 10), crashed(2, 10), preempted(3, 10), crashed(4, 10), crashed(5, 10)],
        expect="deletes JobSet ftj-bot-run; Failed NoProgress",
    ),
    NoProgressCase(
        name="a preempted attempt between them got further",
        attempts=[crashed(0, 10), crashed(1, 10), preempted(2, 20), crashed(3, 20), crashed(4, 20)],
        expect="waits",
    ),
]


@pytest.mark.parametrize("case", NO_PROGRESS, ids=lambda case: case.name)
def test_restarts_that_make_no_progress_end_the_job(case: NoProgressCase) -> None:
    decision = decided(
        fine_tune(BEGUN.model_copy(update={"attempts": case.attempts})), group(restarts=len(case.attempts))
    )
    assert describe(decision) == case.expect
    if "Failed" in case.expect:
        assert said(decision, "Failed").startswith(
            "True NoProgress: 3 counted restarts brought no checkpoint after step "
        )


def shards(*steps: tuple[int, int | None], code: int = 70) -> list[PodEnd]:
    """Shards, by index and outputs, that failed one after another."""
    return [
        ended(SHARDS, "run", code, index, when=n - 100, suffix=f"-{n}", step=step)
        for n, (index, step) in enumerate(steps)
    ]


KILLED = ended(SHARDS, "run", 137, 0, when=-50, suffix="-killed", silent=True)


@dataclass(frozen=True)
class NoOutputCase:
    name: str
    ends: list[PodEnd]
    expect: str


NO_OUTPUT = [
    NoOutputCase(
        name="more outputs each time",
        ends=shards((0, 8), (0, 16), (0, 24), (0, 32)),
        expect="waits",
    ),
    NoOutputCase(
        name="two restarts without",
        ends=shards((0, 8), (0, 8), (0, 8)),
        expect="waits",
    ),
    NoOutputCase(
        name="three restarts without",
        ends=shards((0, 8), (0, 8), (0, 8), (0, 8)),
        expect="deletes Job gj-lutes-run; Failed NoProgress",
    ),
    NoOutputCase(
        name="preemptions are not counted, however many there are",
        ends=shards(*[(0, 8)] * 8, code=75),
        expect="waits",
    ),
    NoOutputCase(
        name="never an output",
        ends=shards((1, None), (1, None), (1, None), (1, None)),
        expect="deletes Job gj-lutes-run; Failed NoProgress",
    ),
    NoOutputCase(
        name="of two shards each",
        ends=shards((0, 8), (1, 8), (0, 8), (1, 8), (0, 8), (1, 8)),
        expect="waits",
    ),
    NoOutputCase(
        name="the last was killed, and does not say",
        ends=[*shards((0, 8), (0, 8), (0, 8)), KILLED],
        expect="waits",
    ),
]


@pytest.mark.parametrize("case", NO_OUTPUT, ids=lambda case: case.name)
def test_shards_that_make_no_progress_end_the_job(case: NoOutputCase) -> None:
    decision = decided(SHARDS, child(SHARDS, "run"), ends=case.ends)
    assert describe(decision) == case.expect
    if "Failed" in case.expect:
        assert said(decision, "Failed").startswith("True NoProgress: 3 counted restarts of shard ")
        assert f"brought no output after the first {case.ends[-1].message.step or 0}; " in said(decision, "Failed")  # type: ignore[union-attr]
    assert decision.status.checkpoint is None


@dataclass(frozen=True)
class RestartCase:
    name: str
    running: list[tuple[int, int, int]]  # index, attempt and uncharged failures of each pod
    ended: list[tuple[int, int, int]]  # likewise
    expect: tuple[int, int]  # restarts, charged restarts


RESTARTS = [
    RestartCase(
        name="each at its first attempt",
        running=[(0, 0, 0), (1, 0, 0)],
        ended=[],
        expect=(0, 0),
    ),
    RestartCase(
        name="one was started again",
        running=[(0, 0, 0), (1, 1, 0)],
        ended=[(1, 0, 0)],
        expect=(1, 1),
    ),
    RestartCase(
        name="one was evicted, which is free",
        running=[(0, 0, 0), (1, 1, 1)],
        ended=[(1, 0, 0)],
        expect=(1, 0),
    ),
    RestartCase(
        name="both, one of them twice",
        running=[(0, 2, 1), (1, 1, 0)],
        ended=[(0, 0, 0), (0, 1, 0), (1, 0, 0)],
        expect=(3, 2),
    ),
    RestartCase(
        name="one has failed, its next pod is not there",
        running=[(0, 0, 0)],
        ended=[(1, 0, 0)],
        expect=(0, 0),
    ),
    RestartCase(
        name="one has ended at its second attempt",
        running=[(0, 0, 0)],
        ended=[(1, 1, 0)],
        expect=(1, 1),
    ),
]


@pytest.mark.parametrize("case", RESTARTS, ids=lambda case: case.name)
def test_restarts_of_shards_are_counted(case: RestartCase) -> None:
    pods = [pod(SHARDS, "run", index, attempt, RUNNING, free=free) for index, attempt, free in case.running]
    ends = [ended(SHARDS, "run", 71, index, attempt, free=free) for index, attempt, free in case.ended]
    status = decided(SHARDS, child(SHARDS, "run"), pods=pods, ends=ends).status
    assert (status.restarts, status.restarts_charged) == case.expect
    later = decided(generate(status), child(SHARDS, "run")).status
    assert (later.restarts, later.restarts_charged) == case.expect, "another operator, which has seen none of it"


SHAPES = [(JOB, "2×8"), (CPU, "1×CPU"), (SHARDS, "2×1"), (generate(resources={"gpus": 0}), "2×CPU")]


@pytest.mark.parametrize(("job", "expect"), SHAPES, ids=[c[1] for c in SHAPES])
def test_the_shape_is_pods_times_the_gpus_of_each(job: Any, expect: str) -> None:
    assert decided(job).status.shape == expect


def test_when_the_pods_first_ran_is_written_down_once() -> None:
    first = decided(JOB, group(), pods=BOTH).status
    assert first.run_start_time == text(NOW)
    broken = decided(fine_tune(first), group(restarts=1), ends=[ended(JOB, "run", 71)]).status
    again = decide(
        observed(fine_tune(broken), group(restarts=1), pods=[pod(JOB, "run", i, 1, RUNNING) for i in (0, 1)]),
        SETTINGS,
        at(60),
    ).status
    assert (again.is_true("Running"), again.run_start_time) == (True, text(NOW))


def test_sums_over_shards_stay_finite() -> None:
    ends = [ended(SHARDS, "run", 0, i, metrics={"rows": 10, "seconds": 1.7e308}) for i in (0, 1)]
    assert decided(SHARDS, child(SHARDS, "run", "Complete"), ends=ends).status.metrics == {"rows": 20}


def test_progress_and_checkpoint_are_copied() -> None:
    job = fine_tune(BEGUN)
    seen = decided(
        job, group(), pods=BOTH, progress=Progress(step=20, max_steps=40, loss=2.5), checkpoint_step=10
    ).status
    assert (seen.progress, seen.checkpoint) == (
        Progress(step=20, max_steps=40, loss=2.5),
        Checkpoint(step=10, time="2026-03-01T12:00:00Z"),
    )
    kept = decided(fine_tune(seen), group(), pods=BOTH).status
    assert (kept.progress, kept.checkpoint) == (seen.progress, seen.checkpoint), "nothing was read this time"


def test_a_training_that_goes_other_than_planned_is_noticed_while_it_runs() -> None:
    plan = Plan(strategy="ddp", seconds=7200, gpu_hours=4.0)
    found = Prepared(model=ResolvedSource(source="m"), dataset=ResolvedDataset(source="d", rows=9), plan=plan)
    job = fine_tune(BEGUN.model_copy(update={"prepared": found}))
    decision = decided(job, group(), pods=BOTH, progress=Progress(step=20, max_steps=400, plan_seconds_ratio=1.5))
    (text,) = [text for text in decision.status.notices if text.startswith("plan.seconds: ")]
    assert "a step takes 1.50 times as long as planned" in text
    assert "6 GPU-hours instead of 4" in text
    assert ("Normal", "Notice", text) in [(event.type, event.reason, event.message) for event in decision.events]
    again = decided(fine_tune(decision.status), group(), pods=BOTH, progress=decision.status.progress)
    assert again.status.notices == decision.status.notices
    assert [event for event in again.events if event.reason == "Notice"] == []


def test_a_later_checkpoint_takes_the_place_of_the_one_before() -> None:
    job = fine_tune(BEGUN.model_copy(update={"checkpoint": Checkpoint(step=10, time=text(BEGIN))}))
    steps = {step: decided(job, group(), pods=BOTH, checkpoint_step=step).status.checkpoint for step in (10, 20, None)}
    kept = Checkpoint(step=10, time=text(BEGIN))
    assert steps == {10: kept, 20: Checkpoint(step=20, time=text(NOW)), None: kept}


def test_a_pod_that_ends_says_what_it_saved() -> None:
    assert decided(JOB, group(), ends=[ended(JOB, "run", 75, step=30)]).status.checkpoint == Checkpoint(
        step=30, time="2026-03-01T12:00:00Z"
    )


KNOWN_20 = BEGUN.model_copy(update={"checkpoint": Checkpoint(step=20, time=text(BEGIN)), "restarts": 1})
AGAIN = [pod(JOB, "run", i, 2, RUNNING) for i in (0, 1)]


@dataclass(frozen=True)
class NewestCase:
    name: str
    served_step: int | None
    expect: int | None
    ends: list[PodEnd] = field(default_factory=list)


NEWEST = [
    NewestCase(
        name="nothing is heard",
        served_step=None,
        expect=20,
    ),
    NewestCase(
        name="a newer one",
        served_step=30,
        expect=30,
    ),
    NewestCase(
        name="20 was broken, as rank 0 says",
        served_step=10,
        expect=10,
    ),
    NewestCase(
        name="every one was broken, as rank 0 says",
        served_step=0,
        expect=None,
    ),
    NewestCase(
        name="20 was broken, as a pod said when it ended",
        ends=[ended(JOB, "run", 71, attempt=1, step=10)],
        served_step=None,
        expect=10,
    ),
    NewestCase(
        name="what two nodes said, one of them before",
        ends=[ended(JOB, "run", 75, i, 1, step=30 - 10 * i) for i in (0, 1)],
        served_step=None,
        expect=30,
    ),
    NewestCase(
        name="an older attempt's word is no news",
        ends=[ended(JOB, "run", 71, step=10), ended(JOB, "run", 137, attempt=1, silent=True)],
        served_step=None,
        expect=20,
    ),
    NewestCase(
        name="a pod that runs knows better than one that ended",
        ends=[ended(JOB, "run", 71, attempt=0, step=20)],
        served_step=10,
        expect=10,
    ),
]


@pytest.mark.parametrize("case", NEWEST, ids=lambda case: case.name)
def test_the_newest_word_on_the_checkpoint_counts(case: NewestCase) -> None:
    decision = decided(
        fine_tune(KNOWN_20), group(restarts=1, charged=1), ends=case.ends, pods=AGAIN, checkpoint_step=case.served_step
    )
    assert (decision.status.checkpoint.step if decision.status.checkpoint else None) == case.expect


@dataclass(frozen=True)
class BrokenCase:
    known_broken: int | None  # as the status says
    served_broken: int | None  # as the metrics say
    checkpoint_step: int
    expect: list[str]


BROKEN = [
    BrokenCase(
        known_broken=None,
        served_broken=None,
        checkpoint_step=10,
        expect=[],
    ),
    BrokenCase(
        known_broken=None,
        served_broken=0,
        checkpoint_step=10,
        expect=[],
    ),
    BrokenCase(
        known_broken=None,
        served_broken=1,
        checkpoint_step=10,
        expect=["; the run resumes from step 10"],
    ),
    BrokenCase(
        known_broken=None,
        served_broken=2,
        checkpoint_step=0,
        expect=["; the run starts from the beginning"],
    ),
    BrokenCase(
        known_broken=1,
        served_broken=1,
        checkpoint_step=10,
        expect=[],
    ),
    BrokenCase(
        known_broken=1,
        served_broken=None,
        checkpoint_step=10,
        expect=[],
    ),
    BrokenCase(
        known_broken=1,
        served_broken=2,
        checkpoint_step=10,
        expect=["; the run resumes from step 10"],
    ),
    BrokenCase(
        known_broken=1,
        served_broken=0,
        checkpoint_step=10,
        expect=[],
    ),
]


@pytest.mark.parametrize(
    "case", BROKEN, ids=lambda case: f"{case.known_broken}-{case.served_broken}-{case.checkpoint_step}"
)
def test_a_checkpoint_that_is_set_aside_is_an_event(case: BrokenCase) -> None:
    job = fine_tune(KNOWN_20.model_copy(update={"broken_checkpoints": case.known_broken}))
    decision = decided(
        job, group(restarts=1), pods=AGAIN, checkpoint_step=case.checkpoint_step, broken_checkpoints=case.served_broken
    )
    where = (
        "a checkpoint does not match its manifest and was set aside as .corrupt-checkpoint-* in"
        " ftj-bot-f00dcafe/checkpoints of claim ftj-bot"
    )
    told = [e for e in decision.events if e.reason == "CheckpointBroken"]
    assert [(e.type, e.message) for e in told] == [("Warning", where + words) for words in case.expect]
    assert decision.status.broken_checkpoints == (
        case.known_broken if case.served_broken is None else case.served_broken or None
    )


def test_notices_of_all_phases_stand_in_the_status_and_are_events_once() -> None:
    known = "spec.dataset.columns.text: 3 rows are blank and left out"
    new = "spec.model: its head is for other labels and starts anew"
    job = fine_tune(BEGUN.model_copy(update={"notices": [known]}))
    ends = [
        ended(job, "prepare", 0, notices=[known]),
        ended(job, "run", 75, notices=[new]),
        ended(job, "run", 0, notices=[new]),
    ]
    decision = decided(job, group(), pods=BOTH, ends=ends)
    assert decision.status.notices == [known, new]
    assert [(e.type, e.message) for e in decision.events if e.reason == "Notice"] == [("Normal", new)]
    many = ended(job, "run", 0, notices=[str(i) for i in range(100)])
    assert len(decided(job, group(), pods=BOTH, ends=[many]).status.notices) == 40, "as many as the CRD allows"


def test_where_trackers_show_the_training_is_what_the_newest_pod_reported() -> None:
    first, second = ([TrackedRun(type="mlflow", url=f"http://mlflow/{name}", run=name)] for name in "ab")
    job = fine_tune(BEGUN)
    ends = [
        ended(job, "run", 0, attempt=1, when=-10, tracking=second),
        ended(job, "run", 75, when=-60, tracking=first),
        ended(job, "run", 71, when=-5),
    ]
    known = decided(job, group(), pods=BOTH, ends=ends).status
    assert known.tracking == second
    assert decided(fine_tune(known), group(), pods=BOTH).status.tracking == second, "kept without the pods"


def test_the_figures_at_the_end_are_those_of_rank_0() -> None:
    job = fine_tune(BEGUN.model_copy(update={"progress": Progress(step=33, max_steps=40)}))
    ends = [ended(job, "run", 0, 0, metrics={"evalLoss": 1.5, "steps": 40}), ended(job, "run", 0, 1)]
    status = decided(job, group(state="Complete"), ends=ends).status
    assert status.metrics == {"evalLoss": 1.5, "steps": 40}
    assert status.progress == Progress(step=40, max_steps=40, percent=100, eta_seconds=0)


def test_the_figures_of_shards_are_added_once_all_have_spoken() -> None:
    one, two = (ended(SHARDS, "run", 0, i, metrics={"rows": 10 + i}) for i in (0, 1))
    assert decided(SHARDS, child(SHARDS, "run"), ends=[one]).status.metrics is None
    assert decided(SHARDS, child(SHARDS, "run", "Complete"), ends=[one, two]).status.metrics == {"rows": 21}
    more = ended(SHARDS, "run", 0, 1, metrics={"rows": 11, "failed": 2})
    assert decided(SHARDS, child(SHARDS, "run", "Complete"), ends=[one, more]).status.metrics == {
        "rows": 21,
        "failed": 2,
    }


def test_the_run_may_have_begun_under_another_setting() -> None:
    """Nothing that exists is applied again: Kueue owns part of it, and JobSet refuses changes."""
    assert SETTINGS.trainer_image
    assert decided(JOB, group(), pods=BOTH).apply == ()
    assert workload(JOB).child("run").kind == "JobSet"


def test_both_prepared_and_begun_at_once() -> None:
    job = fine_tune(status("Accepted"))
    decision = decided(job, child(job, "prepare", "Complete"), ends=[prepared_end(job)])
    assert [(e.type, e.reason) for e in decision.events] == [("Normal", "Prepared")]


@dataclass(frozen=True)
class AtEndCase:
    name: str
    metrics: dict[str, float] | None
    expect: Progress | None
    progress: Progress | None = None


AT_END = [
    AtEndCase(
        name="read on the way",
        progress=Progress(step=18, max_steps=20, loss=2.0),
        metrics={"steps": 20.0, "lastLoss": 1.51239},
        expect=Progress(step=20, max_steps=20, loss=1.512, percent=100, eta_seconds=0),
    ),
    AtEndCase(
        name="too quick to be read",
        metrics={"steps": 4.0},
        expect=Progress(step=4, max_steps=4, percent=100, eta_seconds=0),
    ),
    AtEndCase(
        name="rows, too quick to be read",
        metrics={"rows": 3.0},
        expect=Progress(rows=3, max_rows=3, percent=100, eta_seconds=0),
    ),
    AtEndCase(
        name="rows, the pods' last words lost",
        progress=Progress(rows=2, max_rows=3),
        metrics=None,
        expect=Progress(rows=3, max_rows=3, percent=100, eta_seconds=0),
    ),
    AtEndCase(
        name="nothing known",
        metrics=None,
        expect=None,
    ),
]


@pytest.mark.parametrize("case", AT_END, ids=lambda case: case.name)
def test_progress_of_a_run_that_has_ended(case: AtEndCase) -> None:
    assert at_end(case.progress, case.metrics) == case.expect


@dataclass(frozen=True)
class FinalCase:
    name: str
    end: PodEnd
    spec: dict[str, Any]
    restarts: int
    """Of the JobSet, all charged, when the end is seen."""
    expect: str
    """Reason of the condition Running until the JobSet says how it goes on."""


FINAL = [
    FinalCase(
        name="a mistake",
        end=ended(JOB, "run", 82, 0),
        spec={},
        restarts=0,
        expect="True Running",
    ),
    FinalCase(
        name="the last of the restarts",
        end=ended(JOB, "run", 71, 0, attempt=1),
        spec={"restarts": {"max": 1}},
        restarts=1,
        expect="True Running",
    ),
    FinalCase(
        name="restarts are left",
        end=ended(JOB, "run", 71, 0, attempt=1),
        spec={"restarts": {"max": 2}},
        restarts=1,
        expect="False Restarting",
    ),
    FinalCase(
        name="a preemption costs no restart",
        end=ended(JOB, "run", 75, 0, attempt=1),
        spec={"restarts": {"max": 1}},
        restarts=1,
        expect="False Restarting",
    ),
    FinalCase(
        name="the group was restarted for the last time",
        end=ended(JOB, "run", 71, 0),
        spec={"restarts": {"max": 1}},
        restarts=1,
        expect="False Restarting",
    ),
]


@pytest.mark.parametrize("case", FINAL, ids=lambda case: case.name)
def test_an_end_that_is_final_is_no_restart(case: FinalCase) -> None:
    at_work = status("Accepted", "Prepared", "Running", start_time=text(BEGIN))
    job = fine_tune(at_work, **case.spec)
    decision = decided(job, group(restarts=case.restarts, charged=case.restarts), ends=[case.end])
    assert said(decision, "Running").partition(":")[0] == case.expect


def test_the_status_names_the_image_of_each_phase() -> None:
    """During an upgrade the old operator may create children with the old image."""
    prepared = decide(observed(fine_tune(status("Accepted"))), SETTINGS, NOW).status
    assert prepared.images == {"prepare": SETTINGS.trainer_image}
    later = SETTINGS.model_copy(update={"trainer_image": "registry.example/luthier-trainer:2"})
    done = BEGUN.model_copy(update={"images": prepared.images})
    run = decide(observed(fine_tune(done)), later, NOW).status
    assert run.images == {"prepare": SETTINGS.trainer_image, "run": later.trainer_image}


def test_the_checkpoint_of_a_suspension_is_seen_after_the_jobset_is_gone() -> None:
    given = BEGUN.model_copy(update={"checkpoint": Checkpoint(step=350)})
    job = fine_tune(given, suspend=True)
    stopped = [ended(job, "run", 75, rank, step=378, saved=True) for rank in (0, 1)]
    assert decided(job, ends=stopped).status.checkpoint == Checkpoint(step=378, time=text(NOW))
    resumed = fine_tune(given)
    assert decided(resumed, group(born=at(-10)), ends=stopped).status.checkpoint == Checkpoint(step=350)
