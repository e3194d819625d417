"""From terminated pods to one cause: reading a pod's end, choosing among ends, and what the status keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from cases.observed import BEGIN, NOW, RUNNING, at, child, decided, ended, fine_tune, generate, pod, status, waiting

from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.status import Phase
from luthier_operator.failure.attempts import attempt, attempts_of_group, attempts_of_pods
from luthier_operator.failure.cause import cause
from luthier_operator.failure.pod_end import NO_EXIT_CODE, message, pod_end
from luthier_operator.statuses import text

JOB, SHARDS = fine_tune(status("Accepted", "Prepared", start_time=text(BEGIN))), generate()
KILLED = {"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": "2026-03-01T11:59:00Z"}}
EVICTED = pod(JOB, "run", 1, over="Failed") | {
    "status": {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
}
FOREIGN = {"metadata": {"name": "db", "uid": "1", "labels": {}}, "status": {"phase": "Failed"}}


@dataclass(frozen=True)
class NoEndCase:
    name: str
    given: Any


NO_END = [
    NoEndCase(
        name="it runs",
        given=pod(JOB, "run", state=RUNNING),
    ),
    NoEndCase(
        name="it waits",
        given=pod(JOB, "run", state=waiting("ContainerCreating"), over="Pending"),
    ),
    NoEndCase(
        name="it has no container yet",
        given=pod(JOB, "run", over="Pending"),
    ),
    NoEndCase(
        name="its container has no state yet",
        given=pod(JOB, "run", over="Pending") | {"status": {"containerStatuses": [{"name": "trainer"}]}},
    ),
    NoEndCase(
        name="it is not ours",
        given=FOREIGN,
    ),
]


@pytest.mark.parametrize("case", NO_END, ids=lambda case: case.name)
def test_a_pod_that_may_still_run_has_no_end(case: NoEndCase) -> None:
    assert pod_end(case.given, NOW, was_watched=False) is None


def test_an_end_is_read_as_soon_as_the_container_has_terminated() -> None:
    """The pod's phase comes later, and under a JobSet the pod may be deleted in between."""
    end = pod_end(pod(JOB, "run", 1, 2, KILLED, node="node-b", disrupted=True, deleting=True), NOW, was_watched=False)
    assert end is not None
    assert (end.phase, end.index, end.attempt, end.node, end.exit_code, end.disrupted) == (
        "run",
        1,
        2,
        "node-b",
        137,
        True,
    )
    assert text(end.ended_at) == "2026-03-01T11:59:00Z"


def test_an_evicted_pod_has_no_exit_code() -> None:
    end = pod_end(EVICTED, NOW, was_watched=False)
    assert end is not None
    assert (end.exit_code, end.kubernetes_reason, end.ended_at) == (NO_EXIT_CODE, "Evicted", NOW)
    record = attempt(end, 0, None, None)
    assert (record.exit_code, record.reason, record.message) == (
        None,
        "InfrastructureError",
        "The node was low on resource: memory.",
    )


@dataclass(frozen=True)
class ClockCase:
    name: str
    finished: str
    was_watched: bool
    expect: str


# It is noon by the operator's clock.
CLOCKS = [
    ClockCase(
        name="seen at once, on a node whose clock is behind",
        finished="2026-03-01T11:55:00Z",
        was_watched=True,
        expect="2026-03-01T12:00:00Z",
    ),
    ClockCase(
        name="ended while no operator ran",
        finished="2026-03-01T11:55:00Z",
        was_watched=False,
        expect="2026-03-01T11:55:00Z",
    ),
    ClockCase(
        name="ended while no operator ran, on a node whose clock is ahead",
        finished="2026-03-01T12:05:00Z",
        was_watched=False,
        expect="2026-03-01T12:00:00Z",
    ),
    ClockCase(
        name="ended while no operator ran, on a node whose clock is hours behind",
        finished="2026-03-01T08:00:00Z",
        was_watched=False,
        expect="2026-03-01T11:50:00Z",
    ),
]


@pytest.mark.parametrize("case", CLOCKS, ids=lambda case: case.name)
def test_the_operators_clock_says_when_a_pod_ended(case: ClockCase) -> None:
    state = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": case.finished}}
    given = pod(JOB, "run", state=state)
    given["metadata"]["creationTimestamp"] = "2026-03-01T11:50:00Z"  # by the API server's clock
    end = pod_end(given, NOW, case.was_watched)
    assert end is not None
    assert text(end.ended_at) == case.expect


def test_attempts_of_a_group_are_ordered_by_their_number() -> None:
    """Attempt 1 ran on a node whose clock is five minutes behind."""
    ends = [e(75, 0, -600, attempt=0), e(75, 0, -900, attempt=1), e(81, 0, -300, attempt=2)]
    for seen in (ends, ends[::-1], [ends[0], ends[2], ends[1]]):
        known: list[Any] = []
        for i in range(len(seen)):
            known = attempts_of_group(known, seen[: i + 1], 0, None, fatal=False)
        assert [a.attempt for a in known] == [0, 1, 2]


def test_attempts_of_pods_are_ordered_as_they_were_seen() -> None:
    """Another operator has written the known one. Its clock is ahead."""
    known = [
        attempt(ended(JOB, "prepare", 69, when=600, suffix="a"), 0, None, None).model_copy(
            update={"time": text(at(600))}
        )
    ]
    found = attempts_of_pods(known, [ended(JOB, "prepare", 74, when=-60, suffix="b")], "prepare")
    assert [(a.attempt, a.reason) for a in found] == [(0, "HubUnavailable"), (1, "StorageError")]


def test_attempts_of_a_shard_are_ordered_by_their_number() -> None:
    """Each ran on a node whose clock is further behind. A shard beside it has failed in between."""
    ends = [
        replace(ended(SHARDS, "run", 71, when=when, suffix=f"{index}{number}"), index=index, attempt=number)
        for index, number, when in ((3, 0, -60), (3, 1, -600), (3, 2, -1200), (5, 0, -90))
    ]
    found = attempts_of_pods([], ends[::-1], "run")
    assert [(a.rank, a.attempt) for a in found] == [(5, 0), (3, 0), (3, 1), (3, 2)]
    assert attempts_of_pods(found, ends, "run") == found


def test_a_shard_counts_its_own_failures() -> None:
    given = pod(SHARDS, "run", 1, state=KILLED)
    given["metadata"]["annotations"]["batch.kubernetes.io/job-index-failure-count"] = "2"
    end = pod_end(given, NOW, was_watched=False)
    assert end is not None
    assert (end.index, end.attempt) == (1, 2)


def test_what_was_said_is_read_and_an_output_is_kept_as_it_is() -> None:
    end = ended(JOB, "run", 80, message="no step for 1800 s", last_lines="step 7\n")
    assert end.message is not None
    assert (end.message.message, attempt(end, 0, None, None).last_lines) == ("no step for 1800 s", "step 7\n")
    plain = ended(JOB, "run", 1, message="Traceback\nValueError: no\n\n", silent=True)
    assert plain.message is None
    assert (message(plain), attempt(plain, 0, None, None).last_lines) == (
        "the process ended without a message, with a code that is not Luthier's: ValueError: no",
        "Traceback\nValueError: no\n\n",
    )


@dataclass(frozen=True)
class EndCase:
    name: str
    code: int
    kubernetes_reason: str
    reason: str
    charged: bool
    disrupted: bool = False


ENDS = [
    EndCase(
        name="a mistake",
        code=65,
        kubernetes_reason="Error",
        reason="InvalidDataset",
        charged=False,
    ),
    EndCase(
        name="a mistake of a pod that was evicted as well",
        code=65,
        kubernetes_reason="Error",
        disrupted=True,
        reason="InvalidDataset",
        charged=False,
    ),
    EndCase(
        name="infrastructure",
        code=71,
        kubernetes_reason="Error",
        reason="InfrastructureError",
        charged=True,
    ),
    EndCase(
        name="preempted and saved",
        code=75,
        kubernetes_reason="Error",
        reason="Preempted",
        charged=False,
    ),
    EndCase(
        name="evicted",
        code=137,
        kubernetes_reason="Error",
        disrupted=True,
        reason="Preempted",
        charged=False,
    ),
    EndCase(
        name="evicted in the middle of a collective",
        code=81,
        kubernetes_reason="Error",
        disrupted=True,
        reason="Preempted",
        charged=False,
    ),
    EndCase(
        name="memory, found by the supervisor",
        code=83,
        kubernetes_reason="OOMKilled",
        reason="HostOutOfMemory",
        charged=False,
    ),
    EndCase(
        name="memory, PID 1 itself",
        code=137,
        kubernetes_reason="OOMKilled",
        reason="HostOutOfMemory",
        charged=True,
    ),
    EndCase(
        name="memory, another code",
        code=1,
        kubernetes_reason="OOMKilled",
        reason="HostOutOfMemory",
        charged=True,
    ),
    EndCase(
        name="killed by somebody",
        code=137,
        kubernetes_reason="Error",
        reason="InfrastructureError",
        charged=True,
    ),
    EndCase(
        name="terminated by somebody",
        code=143,
        kubernetes_reason="Error",
        reason="InfrastructureError",
        charged=True,
    ),
    EndCase(
        name="an exception that nobody classified",
        code=1,
        kubernetes_reason="Error",
        reason="TrainingError",
        charged=True,
    ),
]


@pytest.mark.parametrize("case", ENDS, ids=lambda case: case.name)
def test_the_reason_and_the_price(case: EndCase) -> None:
    record = attempt(
        ended(JOB, "run", case.code, kubernetes=case.kubernetes_reason, disrupted=case.disrupted), 0, None, None
    )
    assert (record.reason, record.charged) == (case.reason, case.charged)


@pytest.mark.parametrize("code", [c for c in ExitCode if c], ids=lambda c: c.reason)
def test_every_exit_code_has_its_reason_and_price(code: ExitCode) -> None:
    record = attempt(ended(JOB, "run", int(code)), 0, None, None)
    assert (record.reason, record.charged) == (code.reason, code.retry is Retry.COUNTED)


@dataclass(frozen=True)
class MemoryCase:
    phase: Phase
    limit: str | None
    expect: str


NO_LIMIT = "the pod was killed for its memory, although it has no limit: its node ran out of memory."
MEMORY = [
    MemoryCase(
        phase="run",
        limit="16Gi",
        expect="the pod used more memory than its limit of 16Gi. Raise spec.resources.memory, or use smaller batches",
    ),
    MemoryCase(
        phase="run",
        limit=None,
        expect=f"{NO_LIMIT} Set spec.resources.memory, so that the scheduler chooses a node that has it free",
    ),
    MemoryCase(
        phase="prepare",
        limit="2Gi",
        expect=(
            "the pod used more memory than its limit of 2Gi. Raise spec.prepare.memory, and the LimitRange of the"
            " namespace if it has one"
        ),
    ),
    MemoryCase(
        phase="publish",
        limit=None,
        expect=f"{NO_LIMIT} Set spec.publish.memory, so that the scheduler chooses a node that has it free",
    ),
]


@pytest.mark.parametrize("case", MEMORY, ids=lambda case: f"{case.phase} {case.limit}")
def test_a_pod_that_was_killed_for_its_memory_names_what_decides_it(case: MemoryCase) -> None:
    """The limit is read from the pod: it may be that of a LimitRange."""
    limits = {"limits": {"memory": case.limit}} if case.limit else {}
    given = pod(JOB, case.phase, state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}})
    given["spec"]["containers"] = [{"name": "sidecar"}, {"name": "trainer", "resources": limits}]
    end = pod_end(given, NOW, was_watched=False)
    assert end is not None
    assert message(end) == case.expect


@pytest.mark.parametrize(
    "kubelet",
    [
        'Usage of EmptyDir volume "tmp" exceeds the limit "20Gi". ',
        "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
        'Container trainer exceeded its local ephemeral storage limit "1Gi". ',
    ],
)
@pytest.mark.parametrize(("phase", "block"), [("prepare", "prepare"), ("run", "resources"), ("publish", "publish")])
def test_a_pod_that_was_evicted_for_its_disk_names_what_decides_it(phase: Phase, block: str, kubelet: str) -> None:
    """Words of the kubelet (1.32), in the status of the pod; its container says nothing."""
    found = pod(JOB, phase)
    found["status"] = {"phase": "Failed", "reason": "Evicted", "message": kubelet}
    end = pod_end(found, NOW, was_watched=False)
    assert end is not None
    assert message(end) == f"{kubelet.rstrip('. ')} (/tmp and logs): raise spec.{block}.ephemeralStorage"


def e(code: int, index: int, when: float = -60, **more: Any) -> Any:
    return ended(JOB, "run", code, index, when=when, **more)


@dataclass(frozen=True)
class CauseCase:
    name: str
    ends: list[Any]  # the first is the cause


# The first of each row is the cause, whatever the order in which they were seen and ended.
CAUSES = [
    CauseCase(
        name="an eviction breaks the links of the others",
        ends=[e(75, 1, -10, disrupted=True), e(81, 0, -60), e(71, 2)],
    ),
    CauseCase(
        name="memory before what it broke",
        ends=[e(137, 1, -10, kubernetes="OOMKilled"), e(81, 0), e(79, 2)],
    ),
    CauseCase(
        name="a full GPU leaves its peers alone",
        ends=[e(79, 1, -10), e(81, 0, -60)],
    ),
    CauseCase(
        name="a broken node",
        ends=[e(71, 1, -10), e(70, 2), e(81, 0)],
    ),
    CauseCase(
        name="an exception",
        ends=[e(70, 1, -10), e(81, 0, -60)],
    ),
    CauseCase(
        name="a hang",
        ends=[e(80, 0, -10), e(81, 1)],
    ),
    CauseCase(
        name="a lost peer, when nothing better is known",
        ends=[e(81, 0, -10), e(75, 1, -60)],
    ),
    CauseCase(
        name="the survivors are stopped by the Job controller",
        ends=[e(1, 0, -10), e(75, 1, -60), e(75, 2, -60)],
    ),
    CauseCase(
        name="of equal ends the first",
        ends=[e(81, 1, -60), e(81, 0, -50)],
    ),
    CauseCase(
        name="success explains nothing",
        ends=[e(81, 1, -10), e(0, 0, -60)],
    ),
]


@pytest.mark.parametrize("case", CAUSES, ids=lambda case: case.name)
def test_one_end_explains_the_others(case: CauseCase) -> None:
    assert cause(case.ends) == case.ends[0]
    assert cause(reversed(case.ends)) == case.ends[0]


def test_no_failure_has_no_cause() -> None:
    assert cause([e(0, 0)]) is None


def test_the_last_ten_attempts_are_kept_and_nothing_is_written_twice() -> None:
    ends = [ended(JOB, "run", 71, 0, attempt=i, when=-600 + 10 * i) for i in range(14)]
    group = child(JOB, "run", restarts=14, charged=3)
    first = decided(JOB, group, ends=ends).status
    assert [a.attempt for a in first.attempts] == list(range(4, 14))
    assert decided(fine_tune(first), group, ends=ends).status == first


def test_attempts_of_a_phase_are_numbered_one_by_one_also_when_the_first_are_forgotten() -> None:
    attempts: list[Any] = []
    ends = [ended(JOB, "publish", 69, when=-600 + 10 * i, suffix=str(i)) for i in range(20)]
    for seen in range(1, len(ends) + 1):
        attempts = attempts_of_pods(attempts, ends[:seen], "publish")
        assert attempts_of_pods(attempts, ends[:seen], "publish") == attempts
    assert [a.attempt for a in attempts] == list(range(10, 20))


def test_an_attempt_remembers_the_checkpoint() -> None:
    said = decided(JOB, child(JOB, "run"), ends=[e(81, 0), e(75, 1, step=30)]).status.attempts
    assert [(a.reason, a.step) for a in said] == [("PeerLost", 30)]
    known = decided(JOB, child(JOB, "run"), ends=[e(81, 0)], checkpoint_step=20).status.attempts
    assert [(a.reason, a.step) for a in known] == [("PeerLost", 20)]


def test_long_output_is_cut_from_its_beginning() -> None:
    record = attempt(ended(JOB, "run", 70, last_lines="x" * 2000 + "end"), 0, None, None)
    assert (len(record.last_lines), record.last_lines[-3:]) == (1000, "end")


@dataclass(frozen=True)
class OwnerCase:
    name: str
    child_uid: str
    when: float
    expect: list[str]


WHOSE = [
    OwnerCase(
        name="of an earlier child, by the time",
        child_uid="",
        when=-60,
        expect=[],
    ),
    OwnerCase(
        name="of this child, by the time",
        child_uid="",
        when=-20,
        expect=["InfrastructureError"],
    ),
    OwnerCase(
        name="of an earlier child, by its uid",
        child_uid="another-uid",
        when=-20,
        expect=[],
    ),
    OwnerCase(
        name="of this child, on a node whose clock is behind",
        child_uid="ftj-bot-run-uid",
        when=-60,
        expect=["InfrastructureError"],
    ),
]


@pytest.mark.parametrize("case", WHOSE, ids=lambda case: case.name)
def test_only_the_pods_of_a_child_are_its_failures(case: OwnerCase) -> None:
    end = replace(e(71, 0, case.when), child=case.child_uid)
    decision = decided(JOB, child(JOB, "run", "Failed", born=at(-30), reason="ReachedMaxRestarts"), ends=[end])
    assert [a.reason for a in decision.status.attempts] == case.expect
    assert decision.status.conditions[-1].reason == (case.expect or ["Failed"])[0]


LABELS = {"batch.kubernetes.io/controller-uid": "the Job", "jobset.sigs.k8s.io/jobset-uid": "the JobSet"}


@pytest.mark.parametrize(
    ("labels", "whose"), [(["batch.kubernetes.io/controller-uid"], "the Job"), (list(LABELS), "the JobSet"), ([], "")]
)
def test_a_pod_says_whose_it_was(labels: list[str], whose: str) -> None:
    given = pod(JOB, "run", state=KILLED)
    given["metadata"]["labels"] |= {name: LABELS[name] for name in labels}
    end = pod_end(given, NOW, was_watched=False)
    assert end is not None
    assert end.child == whose
