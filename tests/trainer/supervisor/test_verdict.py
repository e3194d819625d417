"""The pod's last word, out of what is known when its process is gone."""

from __future__ import annotations

from typing import Any

import pytest

from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.termination import TerminationMessage
from luthier_trainer.supervisor.verdict import Evidence, judge


def said(code: ExitCode, rank: int = 0, **more: Any) -> TerminationMessage:
    return TerminationMessage(phase="run", code=code, reason=code.reason, rank=rank, **more)


E = ExitCode
VERDICTS: list[tuple[str, list[TerminationMessage], dict[str, Any], ExitCode]] = [
    ("all ranks done", [said(E.COMPLETED), said(E.COMPLETED, 1)], {"processes": 2}, E.COMPLETED),
    ("one rank done, the other vanished", [said(E.COMPLETED)], {"processes": 2, "status": 1}, E.TRAINING_ERROR),
    ("done, while being stopped", [said(E.COMPLETED)], {"stopped": True}, E.COMPLETED),
    (
        "CUDA memory on one rank, peers lost",
        [said(E.PEER_LOST), said(E.CUDA_OUT_OF_MEMORY, 1)],
        {"status": 1},
        E.CUDA_OUT_OF_MEMORY,
    ),
    (
        "what NCCL's watchdog said",
        [],
        {"gpu_error": "Watchdog caught collective operation timeout", "status": 1},
        E.HANG,
    ),
    (
        "a GPU that broke, its peers saw it go",
        [said(E.PEER_LOST, 1)],
        {"gpu_error": "uncorrectable ECC error", "status": 1},
        E.INFRASTRUCTURE_ERROR,
    ),
    ("words before a kill", [], {"gpu_error": "CUDA error: out of memory", "status": -9}, E.INFRASTRUCTURE_ERROR),
    (
        "words that a rank explains better",
        [said(E.DIVERGED)],
        {"gpu_error": "uncorrectable ECC error", "status": 1},
        E.DIVERGED,
    ),
    ("storage before a lost peer", [said(E.PEER_LOST), said(E.STORAGE_ERROR, 1)], {"status": 1}, E.STORAGE_ERROR),
    ("saved on one rank, a peer lost on the other", [said(E.PREEMPTED), said(E.PEER_LOST, 1)], {}, E.PREEMPTED),
    (
        "the kernel killed a rank, its peers saw it go",
        [said(E.PEER_LOST, 1)],
        {"memory_kills": 1, "status": 1},
        E.HOST_OUT_OF_MEMORY,
    ),
    (
        "one rank failed, the others hung on it",
        [said(E.INVALID_DATASET, 1)],
        {"killed": "hang", "status": -9},
        E.INVALID_DATASET,
    ),
    ("hung", [], {"killed": "hang", "status": -9}, E.HANG),
    ("hung while being stopped", [], {"killed": "grace", "stopped": True, "status": -9}, E.PREEMPTED),
    ("out of memory while being stopped", [], {"memory_kills": 1, "stopped": True, "status": -9}, E.PREEMPTED),
]


@pytest.mark.parametrize(("name", "messages", "facts", "expect"), VERDICTS, ids=[c[0] for c in VERDICTS])
def test_verdict(name: str, messages: list[TerminationMessage], facts: dict[str, Any], expect: ExitCode) -> None:
    evidence = Evidence(phase="run", messages={m.rank or 0: m for m in messages}, **({"status": 0} | facts))
    assert judge(evidence).code == expect


LAST_WORDS: list[
    tuple[str, list[TerminationMessage], dict[str, Any], tuple[ExitCode, bool | None, int | None, str]]
] = [
    (
        "hung, after a checkpoint",
        [said(E.PEER_LOST, step=20), said(E.PEER_LOST, 1, step=30)],
        {"killed": "hang", "silence": 61, "status": -9},
        (E.HANG, None, 30, "no step for 61 s; the stacks of all threads are in the log"),
    ),
    (
        "killed at the end of its grace",
        [said(E.PEER_LOST, step=30)],
        {"killed": "grace", "stopped": True, "status": -9},
        (E.PREEMPTED, False, 30, "the grace period ended before a checkpoint was saved"),
    ),
    (
        "stopped, one rank had saved",
        [said(E.STORAGE_ERROR, message="full"), said(E.COMPLETED, 1, saved=True, step=40)],
        {"stopped": True},
        (E.PREEMPTED, True, 40, "stopped before a checkpoint was saved (StorageError: full)"),
    ),
    (
        "stopped, and none had saved",
        [said(E.STORAGE_ERROR, message="full")],
        {"stopped": True},
        (E.PREEMPTED, False, None, "stopped before a checkpoint was saved (StorageError: full)"),
    ),
    (
        "prepare is stopped",
        [],
        {"phase": "prepare", "killed": "stop", "stopped": True, "status": -9},
        (E.PREEMPTED, None, None, "stopped; the next start goes on from here"),
    ),
    (
        "of equal mistakes that of the first rank",
        [said(E.INVALID_DATASET, 1, message="b"), said(E.INVALID_DATASET, message="a")],
        {},
        (E.INVALID_DATASET, None, None, "a"),
    ),
    (
        "the first rank speaks for all",
        [said(E.COMPLETED, 1, message="b"), said(E.COMPLETED, message="a")],
        {"processes": 2},
        (E.COMPLETED, None, None, "a"),
    ),
    (
        "both done, one crashed in teardown",
        [said(E.COMPLETED), said(E.COMPLETED, 1)],
        {"processes": 2, "status": 1},
        (E.COMPLETED, None, None, ""),
    ),
    (
        "terminated by somebody",
        [],
        {"status": -15},
        (E.INFRASTRUCTURE_ERROR, None, None, "the process was ended by SIGTERM from outside the container"),
    ),
]


@pytest.mark.parametrize(("name", "messages", "facts", "expect"), LAST_WORDS, ids=[c[0] for c in LAST_WORDS])
def test_what_a_verdict_says(
    name: str,
    messages: list[TerminationMessage],
    facts: dict[str, Any],
    expect: tuple[ExitCode, bool | None, int | None, str],
) -> None:
    verdict = judge(Evidence(messages={m.rank or 0: m for m in messages}, **({"phase": "run", "status": 0} | facts)))
    assert (verdict.code, verdict.saved, verdict.step, verdict.message) == expect
    assert verdict.reason == expect[0].reason


def test_after_a_stop_no_code_is_one_that_ends_the_job() -> None:
    for code in (c for c in ExitCode if c is not ExitCode.COMPLETED):
        verdict = judge(Evidence(phase="run", status=1, messages={0: said(code)}, stopped=True))
        assert verdict.exit_code is not None
        assert verdict.exit_code.retry is Retry.FREE, code
