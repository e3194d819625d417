"""One order of causes: the ranks of a pod, the pods of a cluster and the nodes of a laptop name the same failure as the
cause.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from cases.observed import ended, fine_tune

from luthier_api.exitcodes import ExitCode
from luthier_api.termination import TerminationMessage
from luthier_cli.runner import cause_rank
from luthier_operator.failure.cause import cause as cause_of

JOB = fine_tune()
FAILING = [code for code in ExitCode if code is not ExitCode.COMPLETED]


@dataclass(frozen=True)
class Case:
    first: ExitCode
    second: ExitCode
    cause: ExitCode


PAIRS = [
    Case(
        first=ExitCode.PEER_LOST,
        second=ExitCode.PREEMPTED,
        cause=ExitCode.PEER_LOST,
    ),
    Case(
        first=ExitCode.TRAINING_ERROR,
        second=ExitCode.STORAGE_ERROR,
        cause=ExitCode.STORAGE_ERROR,
    ),
    Case(
        first=ExitCode.TRAINING_ERROR,
        second=ExitCode.INFRASTRUCTURE_ERROR,
        cause=ExitCode.INFRASTRUCTURE_ERROR,
    ),
    Case(
        first=ExitCode.PEER_LOST,
        second=ExitCode.TRAINING_ERROR,
        cause=ExitCode.TRAINING_ERROR,
    ),
    Case(
        first=ExitCode.INFRASTRUCTURE_ERROR,
        second=ExitCode.INVALID_DATASET,
        cause=ExitCode.INVALID_DATASET,
    ),
    Case(
        first=ExitCode.DIVERGED,
        second=ExitCode.HOST_OUT_OF_MEMORY,
        cause=ExitCode.HOST_OUT_OF_MEMORY,
    ),
]


def message(code: ExitCode, rank: int) -> TerminationMessage:
    return TerminationMessage(phase="run", code=code, reason=code.reason, rank=rank)


def by_operator(*codes: ExitCode) -> ExitCode | None:
    found = cause_of([ended(JOB, "run", code, index) for index, code in enumerate(codes)])
    return ExitCode.of(found.exit_code) if found else None


def by_command_line(*codes: ExitCode) -> int:
    return min((message(code, rank) for rank, code in enumerate(codes)), key=cause_rank).code


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case.first.reason}, {case.second.reason}")
def test_the_cause_of_two_failures(case: Case) -> None:
    for codes in ((case.first, case.second), (case.second, case.first)):
        assert (by_operator(*codes), by_command_line(*codes)) == (case.cause, case.cause)


def test_all_pairs_agree() -> None:
    for codes in itertools.product(FAILING, repeat=2):
        assert by_operator(*codes) == by_command_line(*codes), codes
