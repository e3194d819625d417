"""What a FineTuneJob asks of transformers' Trainer, where it depends on the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

from luthier_api.resources import TrainingResources
from luthier_api.status import Plan
from luthier_trainer.distributed.launch import cores
from luthier_trainer.tasks.table import TASKS
from luthier_trainer.training.arguments import group_timeout


@dataclass(frozen=True)
class Case:
    task: str
    resources: dict[str, Any]
    cores: int  # of the node
    workers: int  # of each process


WORKERS = [
    Case(
        task="causal-lm",
        resources={"gpusPerNode": 8},
        cores=128,
        workers=2,
    ),
    Case(
        task="text-classification",
        resources={"gpusPerNode": 1},
        cores=2,
        workers=2,
    ),
    Case(
        task="image-classification",
        resources={"gpusPerNode": 1},
        cores=4,
        workers=3,
    ),
    Case(
        task="image-classification",
        resources={"gpusPerNode": 8},
        cores=128,
        workers=8,
    ),
    Case(
        task="image-classification",
        resources={"gpusPerNode": 8},
        cores=32,
        workers=3,
    ),
    Case(
        task="image-classification",
        resources={"gpusPerNode": 4},
        cores=4,
        workers=2,
    ),
    Case(
        task="image-classification",
        resources={"gpusPerNode": 2, "cpu": "8"},
        cores=128,
        workers=3,
    ),
]


@pytest.mark.parametrize("case", WORKERS, ids=lambda case: f"{case.task}-{case.cores}-{case.workers}")
def test_images_are_decoded_by_as_many_processes_as_there_are_cores(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(case.cores)))
    given = TrainingResources.model_validate(case.resources)
    assert TASKS[case.task].loader_workers(cores(given)) == case.workers


@pytest.mark.parametrize(
    ("step_timeout", "save_seconds", "seconds"), [(60, None, 1800), (1800, None, 2100), (60, 1000, 2300)]
)
def test_the_supervisor_ends_a_hang_before_torch_does(
    step_timeout: float, save_seconds: int | None, seconds: int
) -> None:
    assert group_timeout(Plan(strategy="ddp", save_seconds=save_seconds), step_timeout) == seconds
