"""Run, as a table: groups that train, shards that generate, and what their ends mean."""

from __future__ import annotations

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

from luthier_api.status import Attempt, Checkpoint, Progress
from luthier_operator.decide import decide
from luthier_operator.model import Object, PodEnd
from luthier_operator.statuses import at_end, text
from luthier_operator.workloads import workload

BEGUN = status("Accepted", "Prepared", start_time=text(BEGIN))
JOB, SHARDS, CPU = fine_tune(BEGUN), generate(BEGUN), fine_tune(BEGUN, resources={"gpusPerNode": 0})
QUEUED = fine_tune(BEGUN, scheduling={"queueName": "team-a"})
BOTH = [pod(JOB, "run", 0, state=RUNNING), pod(JOB, "run", 1, state=RUNNING)]
EXIT_66 = (
    "Container trainer for pod ml/ftj-bot-run-node-0-0-x failed with exit code 66 matching FailJob rule at index 0"
)


def group(**given: Any) -> Object:
    return child(JOB, "run", **given)


def case(*children: Object, job: Any = JOB, **more: Any) -> Any:
    return job, children, more


CASES = [
    ("prepare is still at work", case(child(JOB, "prepare"), job=fine_tune(status("Accepted"))), "waits", "absent"),
    ("prepared", case(), "applies JobSet ftj-bot-run", "False Starting: waiting for 2 pods on 16 GPUs to start"),
    (
        "prepared, on CPU",
        case(job=CPU),
        "applies JobSet ftj-bot-run",
        "False Starting: waiting for 1 pod on CPU to start",
    ),
    (
        "prepared, to generate",
        case(job=SHARDS),
        "applies Job gj-lutes-run",
        "False Starting: waiting for 2 shards on 2 GPUs to start",
    ),
    (
        "no pod yet",
        case(group(born=at(-2))),
        "again in 28.2 s",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "still no pod",
        case(group(born=at(-31))),
        "waits",
        (
            "False NoPods: the cluster has made no pod of JobSet ftj-bot-run so far; `kubectl describe jobset"
            " ftj-bot-run`, or `kubectl describe job ftj-bot-run-node-0`, says why: a quota, a priority class, a node"
            " selector, an admission policy"
        ),
    ),
    (
        "still one of two pods",
        case(group(), pods=BOTH[:1]),
        "waits",
        (
            "False NoPods: the cluster has made only 1 of 2 pods of JobSet ftj-bot-run so far; `kubectl describe jobset"
            " ftj-bot-run`, or `kubectl describe job ftj-bot-run-node-0`, says why: a quota, a priority class, a node"
            " selector, an admission policy"
        ),
    ),
    (
        "still no shard",
        case(child(SHARDS, "run"), job=SHARDS),
        "waits",
        (
            "False NoPods: the cluster has made no pod of Job gj-lutes-run so far; `kubectl describe job gj-lutes-run`"
            " says why: a quota, a priority class, a node selector, an admission policy"
        ),
    ),
    (
        "one of two runs",
        case(group(), pods=[BOTH[0], pod(JOB, "run", 1, over="Pending")]),
        "waits",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "one of two runs, and prepare has ended well",
        case(group(), pods=[BOTH[0], pod(JOB, "run", 1, over="Pending")], ends=[prepared_end(JOB)]),
        "waits",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "one of two has a node, the other is not there: what is due first",
        case(group(born=at(-2)), pods=[pod(JOB, "run", 0, scheduled=at(-10))]),
        "again in 20 s",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "one of two runs, the other waits for its volume",
        case(group(), pods=[BOTH[0], pod(JOB, "run", 1, state=waiting("ContainerCreating"), scheduled=at(-40))]),
        "waits",
        (
            "False ContainerCreating: pod ftj-bot-run-1-0 has a node, but no container after 30 s: it waits for its"
            " image or for a volume (spec.volumes, spec.workspace); `kubectl describe pod ftj-bot-run-1-0` says for"
            " which"
        ),
    ),
    (
        "JobSet is gone from the cluster",
        case(jobset_installed=False),
        "again in 30 s",
        (
            "False JobSetMissing: FineTuneJobs need JobSet, which this cluster does not have. Install it: kubectl apply"
            " --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
        ),
    ),
    ("all run", case(group(), pods=BOTH), "waits", "True Running: 2 pods on 16 GPUs"),
    (
        "one shard of two runs",
        case(child(SHARDS, "run"), job=SHARDS, pods=[pod(SHARDS, "run", 1, state=RUNNING)]),
        "waits",
        "True Running: 2 shards on 2 GPUs",
    ),
    (
        "one runs, one has ended well",
        case(group(), pods=BOTH[:1], ends=[ended(JOB, "run", 0, 1)]),
        "waits",
        "True Running: 2 pods on 16 GPUs",
    ),
    (
        "all have ended well, the JobSet not yet",
        case(group(), ends=[ended(JOB, "run", 0, i) for i in (0, 1)]),
        "waits",
        "True Running: 2 pods on 16 GPUs",
    ),
    (
        "one ended well in the attempt before",
        case(group(restarts=1), pods=[pod(JOB, "run", 0, 1, RUNNING)], ends=[ended(JOB, "run", 0, 1)]),
        "waits",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "one shard has ended, the other finds no node",
        case(
            child(SHARDS, "run"),
            job=SHARDS,
            ends=[ended(SHARDS, "run", 0)],
            pods=[pod(SHARDS, "run", 1, unschedulable="none")],
        ),
        "waits",
        "False Unschedulable: pod gj-lutes-run-1-0: none",
    ),
    (
        "held by the queue",
        case(child(QUEUED, "run", suspend=True), job=QUEUED),
        "waits",
        'False WaitingForQueue: waiting for quota in queue "team-a"; see `kubectl describe workloads`',
    ),
    (
        "let go by the queue a moment ago",
        case(child(QUEUED, "run", resumed=at(-2)), job=QUEUED),
        "again in 28.2 s",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "let go by the queue this moment",
        case(child(QUEUED, "run", suspend=True) | {"spec": {"suspend": False}}, job=QUEUED),
        "waits",
        "False Starting: waiting for 2 pods on 16 GPUs to start",
    ),
    (
        "preempted by the queue, still saving",
        case(
            child(QUEUED, "run", suspend=True),
            job=QUEUED,
            pods=[pod(QUEUED, "run", i, state=RUNNING, deleting=True) for i in (0, 1)],
        ),
        "waits",
        'False WaitingForQueue: waiting for quota in queue "team-a"; see `kubectl describe workloads`',
    ),
    (
        "no node has the GPUs",
        case(
            group(), pods=[pod(JOB, "run", 1, unschedulable="0/4 nodes are available: 4 Insufficient nvidia.com/gpu.")]
        ),
        "waits",
        "False Unschedulable: pod ftj-bot-run-1-0: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu.",
    ),
    (
        "no node has the GPUs of the second",
        case(
            group(),
            pods=[BOTH[0], pod(JOB, "run", 1, unschedulable="0/4 nodes are available: 4 Insufficient nvidia.com/gpu.")],
        ),
        "waits",
        "False Unschedulable: pod ftj-bot-run-1-0: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu.",
    ),
    (
        "the image does not come",
        case(group(), pods=[pod(JOB, "run", 0, state=waiting("ImagePullBackOff", "not found"))]),
        "waits",
        "False ImagePullFailed: pod ftj-bot-run-0-0: ImagePullBackOff: not found",
    ),
    (
        "a peer was lost",
        case(
            group(),
            ends=[
                ended(JOB, "run", 81, 0, message="peer 1 is gone"),
                ended(JOB, "run", 71, 1, message="XID 79", when=-50),
            ],
        ),
        "waits",
        (
            "False Restarting: after InfrastructureError: XID 79 (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit"
            " code 71)"
        ),
    ),
    (
        "restarted, the pods of before still leave",
        case(group(restarts=1), pods=BOTH, ends=[ended(JOB, "run", 71, 1, message="XID 79")]),
        "waits",
        (
            "False Restarting: after InfrastructureError: XID 79 (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit"
            " code 71)"
        ),
    ),
    (
        "restarted, and at work",
        case(group(restarts=1), pods=[pod(JOB, "run", i, 1, RUNNING) for i in (0, 1)], ends=[ended(JOB, "run", 71)]),
        "waits",
        "True Running: 2 pods on 16 GPUs",
    ),
    (
        "out of GPU memory",
        case(
            group(state="Failed", reason="FailJobSetFailurePolicyAction"),
            ends=[ended(JOB, "run", 79, message="The GPU is full: set ...")],
        ),
        "Failed CudaOutOfMemory",
        "False CudaOutOfMemory: The GPU is full: set ... (run, rank 0, pod ftj-bot-run-0-0 on node-a, exit code 79)",
    ),
    (
        "a mistake, though a pod was evicted with it",
        case(
            group(state="Failed", reason="FailJobSetFailurePolicyAction"),
            ends=[ended(JOB, "run", 75, 0, disrupted=True), ended(JOB, "run", 82, 1, message="loss is NaN")],
        ),
        "Failed Diverged",
        "False Diverged: loss is NaN (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit code 82)",
    ),
    (
        "killed for its memory, whatever the exit code",
        case(
            group(state="Failed", reason="ReachedMaxRestarts"),
            ends=[ended(JOB, "run", 1, kubernetes="OOMKilled", silent=True)],
        ),
        "Failed HostOutOfMemory",
        (
            "False HostOutOfMemory: the pod used more memory than its limit; raise spec.resources.memory, or use"
            " smaller batches (run, rank 0, pod ftj-bot-run-0-0 on node-a, exit code 1). That was the last of 3"
            " restarts (spec.restarts.max)"
        ),
    ),
    (
        "killed whole for its memory: the same would come again",
        case(group(), ends=[ended(JOB, "run", 137, 1, kubernetes="OOMKilled", silent=True)], pods=BOTH[:1]),
        "deletes JobSet ftj-bot-run; Failed HostOutOfMemory",
        (
            "False HostOutOfMemory: the pod used more memory than its limit; raise spec.resources.memory, "
            "or use smaller batches (run, rank 1, pod ftj-bot-run-1-0 on node-a, exit code 137)"
        ),
    ),
    (
        "killed whole for its memory, restarted before we looked",
        case(group(restarts=1, charged=1), ends=[ended(JOB, "run", 137, kubernetes="OOMKilled", silent=True)]),
        "deletes JobSet ftj-bot-run; Failed HostOutOfMemory",
        (
            "False HostOutOfMemory: the pod used more memory than its limit; raise spec.resources.memory, "
            "or use smaller batches (run, rank 0, pod ftj-bot-run-0-0 on node-a, exit code 137)"
        ),
    ),
    (
        "evicted by a node that ran out of memory",
        case(group(), ends=[ended(JOB, "run", 137, kubernetes="OOMKilled", silent=True, disrupted=True)]),
        "waits",
        (
            "False Restarting: after HostOutOfMemory: the pod used more memory than its limit; raise"
            " spec.resources.memory, or use smaller batches (run, rank 0, pod ftj-bot-run-0-0 on node-a, exit code 137)"
        ),
    ),
    (
        "killed by somebody",
        case(group(), ends=[ended(JOB, "run", 137, silent=True)]),
        "waits",
        (
            "False Restarting: after InfrastructureError: the process ended without an error message (run, rank 0, pod"
            " ftj-bot-run-0-0 on node-a, exit code 137)"
        ),
    ),
    (
        "a shard killed whole for its memory stops no other",
        case(child(SHARDS, "run"), job=SHARDS, ends=[ended(SHARDS, "run", 137, kubernetes="OOMKilled", silent=True)]),
        "waits",
        (
            "False Restarting: after HostOutOfMemory: the pod used more memory than its limit; raise"
            " spec.resources.memory, or use smaller batches (run, rank 0, pod gj-lutes-run-0-0 on node-a, exit code"
            " 137)"
        ),
    ),
    (
        "failed while the operator was away, its Job still tells",
        case(group(state="Failed", message=EXIT_66)),
        "Failed NotFound",
        (
            f"False NotFound: {EXIT_66}; the pod's own message was not seen. See `kubectl logs"
            " ftj-bot-run-node-0-0-x -c trainer`"
        ),
    ),
    ("failed a moment ago", case(group(state="Failed", since=at(-2))), "again in 3 s", "absent"),
    (
        "failed a moment ago, only the failure before is known",
        case(group(state="Failed", since=at(-2), restarts=1), ends=[ended(JOB, "run", 70)]),
        "again in 3 s",
        "absent",
    ),
    (
        "failed a moment ago, and why is known",
        case(group(state="Failed", since=at(-2), restarts=1), ends=[ended(JOB, "run", 70, attempt=1, message="no")]),
        "Failed TrainingError",
        "False TrainingError: no (run, rank 0, pod ftj-bot-run-0-1 on node-a, exit code 70)",
    ),
    (
        "some shards cannot succeed",
        case(
            child(SHARDS, "run", "Failed", reason="FailedIndexes"),
            job=SHARDS,
            ends=[
                ended(SHARDS, "run", 79, 1, message="The GPU is full"),
                ended(SHARDS, "run", 71, 0, when=-10, suffix="-b"),
            ],
        ),
        "Failed CudaOutOfMemory",
        "False CudaOutOfMemory: The GPU is full (run, rank 1, pod gj-lutes-run-1-0 on node-a, exit code 79)",
    ),
    ("trained", case(group(state="Complete")), "Complete Completed", "False Trained: the pods have ended"),
    (
        "generated",
        case(child(SHARDS, "run", "Complete"), job=SHARDS),
        "Complete Completed",
        "False Generated: the pods have ended",
    ),
    (
        "trained, and the JobSet is gone",
        case(job=fine_tune(status("Accepted", "Prepared", "Trained"))),
        "Complete Completed",
        "absent",
    ),
]


@pytest.mark.parametrize(("given", "expect", "condition"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_run(given: Any, expect: str, condition: str) -> None:
    job, children, more = given
    decision = decided(job, *children, **more)
    assert describe(decision) == expect
    assert said(decision, "Running") == condition


STATES = [
    ("Pending pods", [pod(JOB, "run", 0, unschedulable="none")], "Unschedulable"),
    ("no pods", [], "NoPods"),
    ("a pod each, not yet with a node", [pod(JOB, "run", i, over="Pending") for i in (0, 1)], "Starting"),
    ("all", BOTH, "Running"),
]


@pytest.mark.parametrize(("pods", "state"), [c[1:] for c in STATES], ids=[c[0] for c in STATES])
def test_the_state_is_one_word_for_people(pods: list[Object], state: str) -> None:
    assert decided(JOB, group(), pods=pods).status.state == state


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
        ("Warning", "Restarting", "restart 1, at no charge ")
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


def stopped(number: int, step: int | None) -> Attempt:
    return Attempt(
        phase="run",
        attempt=number,
        reason="Preempted",
        exit_code=75,
        pod=f"p{number}",
        step=step,
        message="saved",
        time=text(at(number - 100)),
    )


NO_PROGRESS = [
    ("a checkpoint each time", [stopped(i, 10 * i) for i in range(4)], "waits"),
    ("two restarts without", [stopped(0, 10), stopped(1, 10), stopped(2, 10)], "waits"),
    (
        "three restarts without",
        [stopped(0, 10), stopped(1, 10), stopped(2, 10), stopped(3, 10)],
        "deletes JobSet ftj-bot-run; Failed NoProgress",
    ),
    (
        "never a checkpoint at all",
        [stopped(i, None) for i in range(4)],
        "deletes JobSet ftj-bot-run; Failed NoProgress",
    ),
    ("one went unseen", [stopped(i, 10) for i in (0, 1, 3, 4)], "waits"),
]


@pytest.mark.parametrize(("attempts", "expect"), [c[1:] for c in NO_PROGRESS], ids=[c[0] for c in NO_PROGRESS])
def test_restarts_that_make_no_progress_end_the_job(attempts: list[Attempt], expect: str) -> None:
    decision = decided(fine_tune(BEGUN.model_copy(update={"attempts": attempts})), group(restarts=len(attempts)))
    assert describe(decision) == expect
    if "Failed" in expect:
        assert said(decision, "Failed").startswith(
            "True NoProgress: 3 restarts in a row brought no checkpoint after step "
        )


def shards(*steps: tuple[int, int | None]) -> list[PodEnd]:
    """Shards, by index and outputs, that were stopped one after another."""
    return [
        ended(SHARDS, "run", 75, index, when=n - 100, suffix=f"-{n}", step=step)
        for n, (index, step) in enumerate(steps)
    ]


KILLED = ended(SHARDS, "run", 137, 0, when=-50, suffix="-killed", silent=True)
NO_OUTPUT = [
    ("more outputs each time", shards((0, 8), (0, 16), (0, 24), (0, 32)), "waits"),
    ("two restarts without", shards((0, 8), (0, 8), (0, 8)), "waits"),
    ("three restarts without", shards((0, 8), (0, 8), (0, 8), (0, 8)), "deletes Job gj-lutes-run; Failed NoProgress"),
    (
        "never an output",
        shards((1, None), (1, None), (1, None), (1, None)),
        "deletes Job gj-lutes-run; Failed NoProgress",
    ),
    ("of two shards each", shards((0, 8), (1, 8), (0, 8), (1, 8), (0, 8), (1, 8)), "waits"),
    ("the last was killed, and does not say", [*shards((0, 8), (0, 8), (0, 8)), KILLED], "waits"),
]


@pytest.mark.parametrize(("ends", "expect"), [c[1:] for c in NO_OUTPUT], ids=[c[0] for c in NO_OUTPUT])
def test_shards_that_make_no_progress_end_the_job(ends: list[PodEnd], expect: str) -> None:
    decision = decided(SHARDS, child(SHARDS, "run"), ends=ends)
    assert describe(decision) == expect
    if "Failed" in expect:
        assert said(decision, "Failed").startswith("True NoProgress: 3 restarts in a row of shard ")
        assert f"brought no output after the first {ends[-1].message.step or 0}; " in said(decision, "Failed")  # type: ignore[union-attr]
    assert decision.status.checkpoint is None


RESTARTS = [
    ("each at its first attempt", [(0, 0, 0), (1, 0, 0)], [], (0, 0)),
    ("one was started again", [(0, 0, 0), (1, 1, 0)], [(1, 0, 0)], (1, 1)),
    ("one was evicted, which is free", [(0, 0, 0), (1, 1, 1)], [(1, 0, 0)], (1, 0)),
    ("both, one of them twice", [(0, 2, 1), (1, 1, 0)], [(0, 0, 0), (0, 1, 0), (1, 0, 0)], (3, 2)),
    ("one has failed, its next pod is not there", [(0, 0, 0)], [(1, 0, 0)], (0, 0)),
    ("one has ended at its second attempt", [(0, 0, 0)], [(1, 1, 0)], (1, 1)),
]


@pytest.mark.parametrize(("living", "over", "expect"), [c[1:] for c in RESTARTS], ids=[c[0] for c in RESTARTS])
def test_restarts_of_shards_are_counted(
    living: list[tuple[int, int, int]], over: list[tuple[int, int, int]], expect: tuple[int, int]
) -> None:
    pods = [pod(SHARDS, "run", index, attempt, RUNNING, free=free) for index, attempt, free in living]
    ends = [ended(SHARDS, "run", 71, index, attempt, free=free) for index, attempt, free in over]
    status = decided(SHARDS, child(SHARDS, "run"), pods=pods, ends=ends).status
    assert (status.restarts, status.restarts_charged) == expect
    later = decided(generate(status), child(SHARDS, "run")).status
    assert (later.restarts, later.restarts_charged) == expect, "another operator, which has seen none of it"


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
NEWEST: list[tuple[str, list[PodEnd], int | None, int | None]] = [
    ("nothing is heard", [], None, 20),
    ("a newer one", [], 30, 30),
    ("20 was broken, as rank 0 says", [], 10, 10),
    ("every one was broken, as rank 0 says", [], 0, None),
    ("20 was broken, as a pod said when it ended", [ended(JOB, "run", 71, attempt=1, step=10)], None, 10),
    (
        "what two nodes said, one of them before",
        [ended(JOB, "run", 75, i, 1, step=30 - 10 * i) for i in (0, 1)],
        None,
        30,
    ),
    (
        "an older attempt's word is no news",
        [ended(JOB, "run", 71, step=10), ended(JOB, "run", 137, attempt=1, silent=True)],
        None,
        20,
    ),
    ("a pod that runs knows better than one that ended", [ended(JOB, "run", 71, attempt=0, step=20)], 10, 10),
]


@pytest.mark.parametrize(("ends", "served", "expect"), [c[1:] for c in NEWEST], ids=[c[0] for c in NEWEST])
def test_the_newest_word_on_the_checkpoint_counts(ends: list[PodEnd], served: int | None, expect: int | None) -> None:
    decision = decided(fine_tune(KNOWN_20), group(restarts=1, charged=1), ends=ends, pods=AGAIN, checkpoint_step=served)
    assert (decision.status.checkpoint.step if decision.status.checkpoint else None) == expect


BROKEN = [
    # set aside: known  served   checkpoint  expect
    (None, None, 10, []),
    (None, 0, 10, []),
    (None, 1, 10, ["; the run goes on from step 10"]),
    (None, 2, 0, ["; the run begins anew"]),
    (1, 1, 10, []),
    (1, None, 10, []),
    (1, 2, 10, ["; the run goes on from step 10"]),
    (1, 0, 10, []),
]


@pytest.mark.parametrize(("known", "served", "step", "expect"), BROKEN)
def test_a_checkpoint_that_is_set_aside_is_an_event(
    known: int | None, served: int | None, step: int, expect: list[str]
) -> None:
    job = fine_tune(KNOWN_20.model_copy(update={"broken_checkpoints": known}))
    decision = decided(job, group(restarts=1), pods=AGAIN, checkpoint_step=step, broken_checkpoints=served)
    where = (
        "a checkpoint does not match its manifest and is set aside as .corrupt-checkpoint-* in"
        " ftj-bot-f00dcafe/checkpoints of claim ftj-bot"
    )
    told = [e for e in decision.events if e.reason == "CheckpointBroken"]
    assert [(e.type, e.message) for e in told] == [("Warning", where + words) for words in expect]
    assert decision.status.broken_checkpoints == (known if served is None else served or None)


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


AT_END = [
    (
        "read on the way",
        Progress(step=18, max_steps=20, loss=2.0),
        {"steps": 20.0, "lastLoss": 1.51239},
        Progress(step=20, max_steps=20, loss=1.512, percent=100, eta_seconds=0),
    ),
    ("too quick to be read", None, {"steps": 4.0}, Progress(step=4, max_steps=4, percent=100, eta_seconds=0)),
    ("rows, too quick to be read", None, {"rows": 3.0}, Progress(rows=3, max_rows=3, percent=100, eta_seconds=0)),
    (
        "rows, the pods' last words lost",
        Progress(rows=2, max_rows=3),
        None,
        Progress(rows=3, max_rows=3, percent=100, eta_seconds=0),
    ),
    ("nothing known", None, None, None),
]


@pytest.mark.parametrize(("name", "read", "metrics", "expect"), AT_END, ids=[c[0] for c in AT_END])
def test_progress_of_a_run_that_has_ended(
    name: str, read: Progress | None, metrics: dict[str, float] | None, expect: Progress | None
) -> None:
    assert at_end(read, metrics) == expect
