"""What the run phase asks of GPUs, seen from a machine without any: torch's answers are given."""

from __future__ import annotations

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
from luthier_trainer.training.arguments import precision_of, training_arguments

COUNTS = [
    # GPUs asked for, that torch says are there, that it can use;  whether the job may go on
    (0, 0, False, True),
    (1, 0, False, False),
    (1, 1, False, False),  # a driver that is too old
    (2, 1, True, False),
    (2, 2, True, True),
    (1, 8, True, True),
]


@pytest.mark.parametrize(("asked", "counted", "available", "good"), COUNTS)
def test_gpus_are_counted(
    asked: int, counted: int, available: bool, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    if good:
        assert_gpus(asked, "spec.resources.gpusPerNode")
        return
    with pytest.raises(Failure) as failure:
        assert_gpus(asked, "spec.resources.gpusPerNode")
    assert failure.value.code == ExitCode.MISCONFIGURED
    assert failure.value.message.startswith(
        f"spec.resources.gpusPerNode: {asked} asked for, and torch {torch.__version__}"
    )
    assert failure.value.message.endswith("set spec.resources.gpusPerNode: 0 to run on CPU")


def test_a_job_for_gpus_does_not_train_on_cpu(make_run: MakeRun, tmp_path: Path) -> None:
    spec: FineTuneJobSpec = make_run(resources={"gpusPerNode": 1}).spec
    with pytest.raises(Failure, match=r"^spec\.resources\.gpusPerNode: 1 asked for"):
        training_arguments(spec, Plan(strategy="none", precision="fp32"), tmp_path, evaluates=False)


PRECISIONS: list[tuple[str | None, bool, bool, Any]] = [
    # planned  on CPU  GPU with bf16   computed in
    ("auto", True, False, "fp32"),
    ("bf16", True, False, "bf16"),
    ("auto", False, True, "bf16"),
    ("auto", False, False, "fp16"),
    (None, False, False, "fp16"),
    ("fp16", False, False, "fp16"),
    ("fp16", False, True, "fp16"),
    ("fp32", False, False, "fp32"),
    ("bf16", False, False, Failure),
]


@pytest.mark.parametrize(("planned", "cpu", "bf16", "expect"), PRECISIONS)
def test_precision(planned: str | None, cpu: bool, bf16: bool, expect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    plan = Plan(strategy="none", precision=planned)
    if isinstance(expect, str):
        assert precision_of(plan, cpu) == expect
        return
    with pytest.raises(
        Failure, match=r"^spec.training.precision: bf16, which this GPU does not have; use auto or fp16"
    ):
        precision_of(plan, cpu)
