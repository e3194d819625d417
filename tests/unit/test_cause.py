"""One order of causes: the ranks of a pod, the pods of a cluster and the nodes of a laptop name the same failure as the
cause.
"""

from __future__ import annotations

import itertools

import pytest
from cases.observed import ended, fine_tune

from luthier_api.exitcodes import ExitCode
from luthier_api.termination import TerminationMessage
from luthier_cli.runner import cause_rank
from luthier_operator.failure.cause import cause as cause_of

JOB = fine_tune()
FAILING = [code for code in ExitCode if code is not ExitCode.COMPLETED]
PAIRS = [
    # first                            second                            cause
    (ExitCode.PEER_LOST, ExitCode.PREEMPTED, ExitCode.PEER_LOST),
    (ExitCode.TRAINING_ERROR, ExitCode.STORAGE_ERROR, ExitCode.STORAGE_ERROR),
    (ExitCode.TRAINING_ERROR, ExitCode.INFRASTRUCTURE_ERROR, ExitCode.INFRASTRUCTURE_ERROR),
    (ExitCode.PEER_LOST, ExitCode.TRAINING_ERROR, ExitCode.TRAINING_ERROR),
    (ExitCode.INFRASTRUCTURE_ERROR, ExitCode.INVALID_DATASET, ExitCode.INVALID_DATASET),
    (ExitCode.DIVERGED, ExitCode.HOST_OUT_OF_MEMORY, ExitCode.HOST_OUT_OF_MEMORY),
]


def message(code: ExitCode, rank: int) -> TerminationMessage:
    return TerminationMessage(phase="run", code=code, reason=code.reason, rank=rank)


def by_operator(*codes: ExitCode) -> ExitCode | None:
    found = cause_of([ended(JOB, "run", code, index) for index, code in enumerate(codes)])
    return ExitCode.of(found.exit_code) if found else None


def by_command_line(*codes: ExitCode) -> int:
    return min((message(code, rank) for rank, code in enumerate(codes)), key=cause_rank).code


@pytest.mark.parametrize(("first", "second", "cause"), PAIRS, ids=[f"{a.reason}, {b.reason}" for a, b, _ in PAIRS])
def test_the_cause_of_two_failures(first: ExitCode, second: ExitCode, cause: ExitCode) -> None:
    for codes in ((first, second), (second, first)):
        assert (by_operator(*codes), by_command_line(*codes)) == (cause, cause)


def test_all_pairs_agree() -> None:
    for codes in itertools.product(FAILING, repeat=2):
        assert by_operator(*codes) == by_command_line(*codes), codes
