"""What every exit code of a container means, from 1 to 255: to the cluster's rules, and to whoever reads the status."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from cases.observed import ended, fine_tune

from luthier_api.exitcodes import ExitCode, Retry, ending
from luthier_operator.failure.attempts import attempt
from luthier_operator.render import rules

JOB = fine_tune()
OWN = {int(code) for code in ExitCode if code}
SIGNALS = {
    129: "was killed by SIGHUP",
    130: "was killed by SIGINT",
    131: "crashed with SIGQUIT",
    132: "crashed with SIGILL",
    133: "crashed with SIGTRAP",
    134: "crashed with SIGABRT",
    135: "crashed with SIGBUS",
    136: "crashed with SIGFPE",
    137: "was killed by SIGKILL",
    138: "crashed with SIGUSR1",
    139: "crashed with SIGSEGV",
    140: "crashed with SIGUSR2",
    141: "crashed with SIGPIPE",
    142: "crashed with SIGALRM",
    143: "was killed by SIGTERM",
    159: "crashed with SIGSYS",
}


@dataclass(frozen=True)
class Case:
    codes: Iterable[int]
    reason: str
    charged: bool
    text: str


NOT_OURS = "the process ended without a message, with a code that is not Luthier's"
CASES = [
    Case(
        codes=set(range(1, 64)) | {67, 68, 72, 73, 76} | set(range(85, 126)),
        reason="TrainingError",
        charged=True,
        text=NOT_OURS,
    ),
    Case(
        codes=[126],
        reason="Misconfigured",
        charged=False,
        text="cannot be executed. An administrator sets the image by trainer.image (chart)",
    ),
    Case(
        codes=[127],
        reason="Misconfigured",
        charged=False,
        text="has no python, or lacks one of its libraries. An administrator sets the image by trainer.image (chart)",
    ),
    Case(
        codes=[128],
        reason="InfrastructureError",
        charged=True,
        text="the container runtime could not start the container",
    ),
    *(Case(codes=[code], reason="InfrastructureError", charged=True, text=text) for code, text in SIGNALS.items()),
    Case(
        codes=set(range(144, 193)) - {159},
        reason="InfrastructureError",
        charged=True,
        text="the process crashed with ",
    ),
    Case(
        codes=range(193, 255),
        reason="TrainingError",
        charged=True,
        text=NOT_OURS,
    ),
    Case(
        codes=[255],
        reason="InfrastructureError",
        charged=True,
        text="the container runtime lost the container",
    ),
]


def test_every_code_has_one_meaning() -> None:
    assert sorted([*OWN, *(code for case in CASES for code in case.codes)]) == list(range(1, 256))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{min(case.codes)} {case.text[:30]}")
def test_a_code_that_is_not_ours(case: Case) -> None:
    for code in case.codes:
        record = attempt(ended(JOB, "run", code, silent=True), 0, None, None)
        assert (record.reason, record.charged) == (case.reason, case.charged), code
        assert case.text in record.message, code


def test_the_rules_of_the_cluster_agree_with_the_charge() -> None:
    """JobSet and Job restart by these rules, and the status says what they did."""
    fatal = set(rules.member()["rules"][0]["onExitCodes"]["values"])
    free = set(rules.member()["rules"][2]["onExitCodes"]["values"])
    for code in range(1, 256):
        retry = ending(code).code.retry
        assert (code in fatal, code in free) == (retry is Retry.NEVER, retry is Retry.FREE), code
    assert len(fatal) <= 255, "more are refused by the API server"
