"""What must hold before anything heavy starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.supervisor.preflight import check_gpus, check_operators, needs_operators


def test_gpus_that_nobody_sees(make_run: Callable[..., FineTuneRun], tmp_path: Path) -> None:
    run = make_run(resources={"gpusPerNode": 2})
    with pytest.raises(Failure, match=r"spec\.resources\.gpusPerNode: 2 asked for, but no GPU is visible") as failure:
        check_gpus(run, tmp_path)
    assert failure.value.code is ExitCode.MISCONFIGURED
    (tmp_path / "nvidia0").touch()
    check_gpus(run, tmp_path)


@dataclass(frozen=True)
class Case:
    built_for: str | None
    has_optimizer: bool  # the build has cpu_adam
    runs_on: str
    has_compiler: bool
    works: bool


OPERATORS = [
    Case(
        built_for="cpu",
        has_optimizer=True,
        runs_on="cpu",
        has_compiler=False,
        works=True,
    ),
    Case(
        built_for="cuda",
        has_optimizer=True,
        runs_on="cuda",
        has_compiler=False,
        works=True,
    ),
    Case(
        built_for="cuda",
        has_optimizer=True,
        runs_on="cpu",
        has_compiler=False,
        works=False,
    ),
    Case(
        built_for="cuda",
        has_optimizer=True,
        runs_on="cpu",
        has_compiler=True,
        works=True,
    ),
    Case(
        built_for="cpu",
        has_optimizer=False,
        runs_on="cpu",
        has_compiler=False,
        works=False,
    ),
    Case(
        built_for="cpu",
        has_optimizer=False,
        runs_on="cpu",
        has_compiler=True,
        works=True,
    ),
    Case(
        built_for=None,
        has_optimizer=False,
        runs_on="cpu",
        has_compiler=False,
        works=False,
    ),
]


@pytest.mark.parametrize(
    "case",
    OPERATORS,
    ids=lambda case: f"{case.built_for}-{case.has_optimizer}-{case.runs_on}-{case.has_compiler}-{case.works}",
)
def test_deepspeed_needs_operators_or_a_compiler(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh -c g++" if case.has_compiler else "no-such-compiler")
    if case.built_for:
        (tmp_path / "git_version_info_installed.py").write_text(
            f"accelerator_name={case.built_for!r}\ninstalled_ops={{'cpu_adam': {case.has_optimizer}}}\n"
        )
    if case.works:
        check_operators("zero2-offload", case.runs_on, tmp_path)
        return
    with pytest.raises(
        Failure, match=rf"^spec.strategy: zero2-offload needs .* built with DS_ACCELERATOR={case.runs_on}"
    ) as failure:
        check_operators("zero2-offload", case.runs_on, tmp_path)
    assert failure.value.code is ExitCode.MISCONFIGURED


NEEDS = [
    ("ddp", 0, False),
    ("zero2", 0, True),
    ("zero2", 8, False),
    ("zero2-offload", 8, True),
    ("zero3-offload", 0, True),
    ("none", 1, False),
]


@pytest.mark.parametrize(("strategy", "gpus", "needed"), NEEDS)
def test_who_needs_operators(strategy: str, gpus: int, needed: bool) -> None:
    assert needs_operators(strategy, gpus) is needed
