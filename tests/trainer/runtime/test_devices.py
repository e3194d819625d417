"""What the run phase asks of GPUs, seen from a machine without any: torch's answers are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.conftest import MakeRun

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import Plan
from luthier_trainer.runtime.devices import assert_gpus
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.table import task_of
from luthier_trainer.training.arguments import precision_of, training_arguments


@dataclass(frozen=True)
class CountCase:
    asked: int  # by the spec
    reported: int  # by torch
    usable: bool  # torch.cuda.is_available()
    allowed: bool


COUNTS = [
    CountCase(
        asked=0,
        reported=0,
        usable=False,
        allowed=True,
    ),
    CountCase(
        asked=1,
        reported=0,
        usable=False,
        allowed=False,
    ),
    # a driver that is too old
    CountCase(
        asked=1,
        reported=1,
        usable=False,
        allowed=False,
    ),
    CountCase(
        asked=2,
        reported=1,
        usable=True,
        allowed=False,
    ),
    CountCase(
        asked=2,
        reported=2,
        usable=True,
        allowed=True,
    ),
    CountCase(
        asked=1,
        reported=8,
        usable=True,
        allowed=True,
    ),
]


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: f"{case.asked}-{case.reported}-{case.usable}-{case.allowed}")
def test_gpus_are_counted(case: CountCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: case.usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: case.reported)
    if case.allowed:
        assert_gpus(case.asked, "spec.resources.gpusPerNode")
        return
    with pytest.raises(Failure) as failure:
        assert_gpus(case.asked, "spec.resources.gpusPerNode")
    assert failure.value.code == ExitCode.MISCONFIGURED
    assert failure.value.message.startswith(
        f"spec.resources.gpusPerNode: {case.asked} asked for, and torch {torch.__version__}"
    )
    assert failure.value.message.endswith("set spec.resources.gpusPerNode: 0 to run on CPU")


def test_a_job_for_gpus_does_not_train_on_cpu(make_run: MakeRun, tmp_path: Path) -> None:
    spec: FineTuneJobSpec = make_run(resources={"gpusPerNode": 1}).spec
    plan = Plan(strategy="none", precision="fp32")
    with pytest.raises(Failure, match=r"^spec\.resources\.gpusPerNode: 1 asked for"):
        training_arguments(task_of(spec), spec, plan, tmp_path, evaluates=False, step_timeout=1800)


@dataclass(frozen=True)
class PrecisionCase:
    planned: str | None
    expect: Any  # precision, or the failure
    cpu: bool = False
    gpu_has_bf16: bool = False


PRECISIONS = [
    PrecisionCase(
        planned="auto",
        cpu=True,
        expect="fp32",
    ),
    PrecisionCase(
        planned="bf16",
        cpu=True,
        expect="bf16",
    ),
    PrecisionCase(
        planned="auto",
        gpu_has_bf16=True,
        expect="bf16",
    ),
    PrecisionCase(
        planned="auto",
        expect="fp16",
    ),
    PrecisionCase(
        planned=None,
        expect="fp16",
    ),
    PrecisionCase(
        planned="fp16",
        expect="fp16",
    ),
    PrecisionCase(
        planned="fp16",
        gpu_has_bf16=True,
        expect="fp16",
    ),
    PrecisionCase(
        planned="fp32",
        expect="fp32",
    ),
    PrecisionCase(
        planned="bf16",
        expect=Failure,
    ),
]


@pytest.mark.parametrize("case", PRECISIONS, ids=lambda case: f"{case.planned}-{case.cpu}-{case.gpu_has_bf16}")
def test_precision(case: PrecisionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: case.gpu_has_bf16 or including_emulation
    )
    plan = Plan(strategy="none", precision=case.planned)
    if isinstance(case.expect, str):
        assert precision_of(plan, case.cpu) == case.expect
        return
    with pytest.raises(
        Failure, match=r"^spec.training.precision: bf16, which this GPU does not have; use auto or fp16"
    ):
        precision_of(plan, case.cpu)
