"""The pod's last word, out of what is known when its process is gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.termination import TerminationMessage
from luthier_trainer.supervisor.process_tree import Death
from luthier_trainer.supervisor.stacks import Position
from luthier_trainer.supervisor.verdict import Evidence, judge


def said(code: ExitCode, rank: int = 0, **more: Any) -> TerminationMessage:
    return TerminationMessage(phase="run", code=code, reason=code.reason, rank=rank, **more)


E = ExitCode


@dataclass(frozen=True)
class VerdictCase:
    name: str
    messages: list[TerminationMessage]
    evidence: dict[str, Any]
    expect: ExitCode


VERDICTS = [
    VerdictCase(
        name="all ranks done",
        messages=[said(E.COMPLETED), said(E.COMPLETED, 1)],
        evidence={"processes": 2},
        expect=E.COMPLETED,
    ),
    VerdictCase(
        name="one rank done, the other vanished",
        messages=[said(E.COMPLETED)],
        evidence={"processes": 2, "status": 1},
        expect=E.TRAINING_ERROR,
    ),
    VerdictCase(
        name="done, while being stopped",
        messages=[said(E.COMPLETED)],
        evidence={"stopped": True},
        expect=E.COMPLETED,
    ),
    VerdictCase(
        name="CUDA memory on one rank, peers lost",
        messages=[said(E.PEER_LOST), said(E.CUDA_OUT_OF_MEMORY, 1)],
        evidence={"status": 1},
        expect=E.CUDA_OUT_OF_MEMORY,
    ),
    VerdictCase(
        name="what NCCL's watchdog said",
        messages=[],
        evidence={"gpu_error": "Watchdog caught collective operation timeout", "status": 1},
        expect=E.HANG,
    ),
    VerdictCase(
        name="a GPU that broke, its peers saw it go",
        messages=[said(E.PEER_LOST, 1)],
        evidence={"gpu_error": "uncorrectable ECC error", "status": 1},
        expect=E.INFRASTRUCTURE_ERROR,
    ),
    VerdictCase(
        name="words before a kill",
        messages=[],
        evidence={"gpu_error": "CUDA error: out of memory", "status": -9},
        expect=E.INFRASTRUCTURE_ERROR,
    ),
    VerdictCase(
        name="words that a rank explains better",
        messages=[said(E.DIVERGED)],
        evidence={"gpu_error": "uncorrectable ECC error", "status": 1},
        expect=E.DIVERGED,
    ),
    VerdictCase(
        name="storage before a lost peer",
        messages=[said(E.PEER_LOST), said(E.STORAGE_ERROR, 1)],
        evidence={"status": 1},
        expect=E.STORAGE_ERROR,
    ),
    VerdictCase(
        name="saved on one rank, a peer lost on the other",
        messages=[said(E.PREEMPTED), said(E.PEER_LOST, 1)],
        evidence={},
        expect=E.PREEMPTED,
    ),
    VerdictCase(
        name="the kernel killed a rank, its peers saw it go",
        messages=[said(E.PEER_LOST, 1)],
        evidence={"memory_kills": 1, "status": 1},
        expect=E.HOST_OUT_OF_MEMORY,
    ),
    VerdictCase(
        name="one rank failed, the others hung on it",
        messages=[said(E.INVALID_DATASET, 1)],
        evidence={"killed": "hang", "status": -9},
        expect=E.INVALID_DATASET,
    ),
    VerdictCase(
        name="hung",
        messages=[],
        evidence={"killed": "hang", "status": -9},
        expect=E.HANG,
    ),
    VerdictCase(
        name="hung while being stopped",
        messages=[],
        evidence={"killed": "grace", "stopped": True, "status": -9},
        expect=E.PREEMPTED,
    ),
    VerdictCase(
        name="out of memory while being stopped",
        messages=[],
        evidence={"memory_kills": 1, "stopped": True, "status": -9},
        expect=E.PREEMPTED,
    ),
]


@pytest.mark.parametrize("case", VERDICTS, ids=lambda case: case.name)
def test_verdict(case: VerdictCase) -> None:
    evidence = Evidence(
        phase="run", messages={m.rank or 0: m for m in case.messages}, **({"status": 0} | case.evidence)
    )
    assert judge(evidence).code == case.expect


@dataclass(frozen=True)
class LastWordsCase:
    name: str
    messages: list[TerminationMessage]
    evidence: dict[str, Any]
    expect: tuple[ExitCode, bool | None, int | None, str]


LAST_WORDS = [
    LastWordsCase(
        name="hung, after a checkpoint",
        messages=[said(E.PEER_LOST, step=20), said(E.PEER_LOST, 1, step=30)],
        evidence={"killed": "hang", "silence": 61, "status": -9},
        expect=(E.HANG, None, 30, "no step for 61 s. The stacks of all threads are in the log"),
    ),
    LastWordsCase(
        name="killed at the end of its grace",
        messages=[said(E.PEER_LOST, step=30)],
        evidence={"killed": "grace", "stopped": True, "status": -9},
        expect=(E.PREEMPTED, False, 30, "the grace period ended before a checkpoint was saved"),
    ),
    LastWordsCase(
        name="stopped, one rank had saved",
        messages=[said(E.STORAGE_ERROR, message="full"), said(E.COMPLETED, 1, saved=True, step=40)],
        evidence={"stopped": True},
        expect=(E.PREEMPTED, True, 40, "stopped before a checkpoint was saved (StorageError: full)"),
    ),
    LastWordsCase(
        name="stopped, and none had saved",
        messages=[said(E.STORAGE_ERROR, message="full")],
        evidence={"stopped": True},
        expect=(E.PREEMPTED, False, None, "stopped before a checkpoint was saved (StorageError: full)"),
    ),
    LastWordsCase(
        name="prepare is stopped",
        messages=[],
        evidence={"phase": "prepare", "killed": "stop", "stopped": True, "status": -9},
        expect=(E.PREEMPTED, None, None, "stopped; the next start continues from here"),
    ),
    LastWordsCase(
        name="of equal mistakes that of the first rank",
        messages=[said(E.INVALID_DATASET, 1, message="b"), said(E.INVALID_DATASET, message="a")],
        evidence={},
        expect=(E.INVALID_DATASET, None, None, "a"),
    ),
    LastWordsCase(
        name="the first rank speaks for all",
        messages=[said(E.COMPLETED, 1, message="b"), said(E.COMPLETED, message="a")],
        evidence={"processes": 2},
        expect=(E.COMPLETED, None, None, "a"),
    ),
    LastWordsCase(
        name="both done, one crashed in teardown",
        messages=[said(E.COMPLETED), said(E.COMPLETED, 1)],
        evidence={"processes": 2, "status": 1},
        expect=(E.COMPLETED, None, None, ""),
    ),
    LastWordsCase(
        name="terminated by somebody",
        messages=[],
        evidence={"status": -15},
        expect=(
            E.INFRASTRUCTURE_ERROR,
            None,
            None,
            "the process was killed by SIGTERM, which Luthier did not send: by the kernel, or by somebody; see its"
            " last lines",
        ),
    ),
]


def died(rank: int, status: int | None, at: float = 0.0) -> Death:
    return Death(rank, status, at)


@dataclass(frozen=True)
class DeathCase:
    name: str
    messages: list[TerminationMessage]
    deaths: list[Death]
    expect: tuple[ExitCode, int | None, str]
    evidence: dict[str, Any] = field(default_factory=dict)


LOST = "Connection closed by peer"
DEATHS = [
    DeathCase(
        name="killed, and its peer saw it go",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, -9), died(0, 81)],
        expect=(
            E.INFRASTRUCTURE_ERROR,
            1,
            "rank 1 was killed by SIGKILL, which Luthier did not send: by the kernel, or by somebody; see its"
            " last lines",
        ),
    ),
    DeathCase(
        name="killed, and its peer was sooner to end",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(0, 81), died(1, -9, 2.0)],
        expect=(
            E.INFRASTRUCTURE_ERROR,
            1,
            "rank 1 was killed by SIGKILL, which Luthier did not send: by the kernel, or by somebody; see its"
            " last lines",
        ),
    ),
    DeathCase(
        name="crashed",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, -11), died(0, 81)],
        expect=(E.INFRASTRUCTURE_ERROR, 1, "rank 1 crashed with SIGSEGV; see its last lines"),
    ),
    DeathCase(
        name="crashed, and its peer aborted over it",
        messages=[],
        deaths=[died(0, -6), died(1, -7, 0.4)],
        expect=(E.INFRASTRUCTURE_ERROR, 1, "rank 1 crashed with SIGBUS; see its last lines"),
    ),
    DeathCase(
        name="killed, and NCCL of its peer aborted over it",
        messages=[],
        deaths=[died(1, -9), died(0, -6, 1.0)],
        evidence={"gpu_error": "ncclRemoteError: remote process exited"},
        expect=(
            E.INFRASTRUCTURE_ERROR,
            1,
            "rank 1 was killed by SIGKILL, which Luthier did not send: by the kernel, or by somebody; see its"
            " last lines",
        ),
    ),
    DeathCase(
        name="NCCL aborted over a peer in another pod",
        messages=[],
        deaths=[died(0, -6), died(1, -15, 0.1)],
        evidence={"gpu_error": "ncclRemoteError: remote process exited"},
        expect=(E.PEER_LOST, None, "ncclRemoteError: remote process exited"),
    ),
    DeathCase(
        name="aborted by a library, without an error that is known",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, -6), died(0, 81)],
        expect=(E.INFRASTRUCTURE_ERROR, 1, "rank 1 crashed with SIGABRT; see its last lines"),
    ),
    DeathCase(
        name="a peer in another pod was lost: torch's agent ends the others",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(0, 81), died(1, -15, 0.1), died(2, None, 0.1), died(3, -9, 30.0)],
        expect=(E.PEER_LOST, 0, LOST),
    ),
    DeathCase(
        name="terminated by somebody",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, -15), died(0, 81)],
        expect=(
            E.INFRASTRUCTURE_ERROR,
            1,
            "rank 1 was killed by SIGTERM, which Luthier did not send: by the kernel, or by somebody; see its"
            " last lines",
        ),
    ),
    DeathCase(
        name="an exception, after which torch's agent ends the others",
        messages=[said(E.TRAINING_ERROR, message="ValueError: no")],
        deaths=[died(0, 70), died(1, -9, 0.1)],
        expect=(E.TRAINING_ERROR, 0, "ValueError: no"),
    ),
    DeathCase(
        name="killed, over which a peer raised an exception",
        messages=[said(E.TRAINING_ERROR, message="RuntimeError: gloo")],
        deaths=[died(1, -9), died(0, 70, 0.3)],
        expect=(
            E.INFRASTRUCTURE_ERROR,
            1,
            "rank 1 was killed by SIGKILL, which Luthier did not send: by the kernel, or by somebody; see its"
            " last lines",
        ),
    ),
    DeathCase(
        name="a mistake of the user on another rank",
        messages=[said(E.INVALID_DATASET, message="bad row")],
        deaths=[died(1, -9), died(0, 65, 0.1)],
        expect=(E.INVALID_DATASET, 0, "bad row"),
    ),
    DeathCase(
        name="the kernel killed it for its memory",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, -9), died(0, 81)],
        evidence={"memory_kills": 1, "memory_limit": "8Gi"},
        expect=(
            E.HOST_OUT_OF_MEMORY,
            None,
            "spec.resources.memory: the container ran out of memory and the kernel killed a process. Raise it, or lower"
            " batch sizes or maxLength",
        ),
    ),
    DeathCase(
        name="the kernel killed it for the memory of the node",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, -9), died(0, 81)],
        evidence={"memory_kills": 1},
        expect=(
            E.HOST_OUT_OF_MEMORY,
            None,
            "spec.resources.memory: the container ran out of memory and the kernel killed a process. The job sets no"
            " limit: the node itself ran out of memory, or a LimitRange of the namespace sets a limit. Set it to"
            " what the run needs, or lower batch sizes or maxLength",
        ),
    ),
    DeathCase(
        name="ended by a library's exit",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, 3), died(0, 81)],
        expect=(E.TRAINING_ERROR, 1, "rank 1 ended with 3 and left no message; see its last lines"),
    ),
    DeathCase(
        name="reaped before it was seen",
        messages=[said(E.PEER_LOST, message=LOST)],
        deaths=[died(1, None), died(0, 81)],
        expect=(E.INFRASTRUCTURE_ERROR, 1, "rank 1 ended without a message; see its last lines"),
    ),
]


@pytest.mark.parametrize("case", DEATHS, ids=lambda case: case.name)
def test_a_rank_that_died_without_a_message_is_the_cause(case: DeathCase) -> None:
    verdict = judge(
        Evidence(
            phase="run",
            status=1,
            messages={m.rank or 0: m for m in case.messages},
            processes=4,
            deaths=case.deaths,
            **case.evidence,
        )
    )
    assert (verdict.code, verdict.rank, verdict.message) == case.expect


def test_a_hang_names_the_rank_that_does_not_react_first() -> None:
    positions = [Position(rank, "is in all_reduce (c10d.py:7)", answered=True) for rank in (0, 1, 2, 4, 5)]
    stopped = Position(3, "is stopped", answered=False)
    verdict = judge(
        Evidence(
            phase="run",
            status=-9,
            killed="hang",
            silence=61,
            last_step=12,
            positions=[*positions, stopped],
            processes=6,
        )
    )
    assert (verdict.code, verdict.rank) == (E.HANG, 3)
    assert verdict.message == (
        "no step for 61 s after step 12: rank 3 is stopped, rank 0 is in all_reduce (c10d.py:7), rank 1 is in"
        " all_reduce (c10d.py:7), rank 2 is in all_reduce (c10d.py:7), 2 more. The stacks of all threads are in the log"
    )


@pytest.mark.parametrize("case", LAST_WORDS, ids=lambda case: case.name)
def test_what_a_verdict_says(case: LastWordsCase) -> None:
    verdict = judge(
        Evidence(messages={m.rank or 0: m for m in case.messages}, **({"phase": "run", "status": 0} | case.evidence))
    )
    assert (verdict.code, verdict.saved, verdict.step, verdict.message) == case.expect
    assert verdict.reason == case.expect[0].reason


def test_after_a_stop_no_code_is_one_that_ends_the_job() -> None:
    for code in (c for c in ExitCode if c is not ExitCode.COMPLETED):
        verdict = judge(Evidence(phase="run", status=1, messages={0: said(code)}, stopped=True))
        assert verdict.exit_code is not None
        assert verdict.exit_code.retry is Retry.FREE, code
