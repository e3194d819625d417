"""What must hold before anything heavy starts."""

from __future__ import annotations

from collections.abc import Callable
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


OPERATORS = [
    # built for, with its optimizer,  runs on   a compiler is there;  can it work
    ("cpu", True, "cpu", False, True),
    ("cuda", True, "cuda", False, True),
    ("cuda", True, "cpu", False, False),
    ("cuda", True, "cpu", True, True),
    ("cpu", False, "cpu", False, False),
    ("cpu", False, "cpu", True, True),
    (None, False, "cpu", False, False),
]


@pytest.mark.parametrize(("built", "optimizer", "accelerator", "compiler", "good"), OPERATORS)
def test_deepspeed_needs_operators_or_a_compiler(
    built: str | None,
    optimizer: bool,
    accelerator: str,
    compiler: bool,
    good: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "sh -c g++" if compiler else "no-such-compiler")
    if built:
        (tmp_path / "git_version_info_installed.py").write_text(
            f"accelerator_name={built!r}\ninstalled_ops={{'cpu_adam': {optimizer}}}\n"
        )
    if good:
        check_operators("zero2-offload", accelerator, tmp_path)
        return
    with pytest.raises(
        Failure, match=rf"^spec.strategy: zero2-offload needs .* built with DS_ACCELERATOR={accelerator}"
    ) as failure:
        check_operators("zero2-offload", accelerator, tmp_path)
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
