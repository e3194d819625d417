"""The learning rate of each step is that of transformers' own schedule with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, optimization

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.schedules import SCHEDULES
from luthier_trainer.tasks.table import task_of
from luthier_trainer.training.arguments import training_arguments
from luthier_trainer.workspace.plan import plan_training

STEPS, RATE = 40, 1e-2
ROWS = 320  # of batches of 8


@dataclass(frozen=True)
class Case:
    name: str
    training: dict[str, Any]
    plain: Callable[[torch.optim.Optimizer], LambdaLR]


CASES = [
    Case(
        name="linear",
        training={"warmupSteps": 4},
        plain=lambda o: optimization.get_linear_schedule_with_warmup(o, 4, STEPS),
    ),
    Case(
        name="cosine",
        training={"schedule": "cosine", "warmupRatio": 0.09},
        plain=lambda o: optimization.get_cosine_schedule_with_warmup(o, 4, STEPS),
    ),
    Case(
        name="cosine with restarts",
        training={"schedule": "cosine_with_restarts", "warmupSteps": 4, "scheduleOptions": {"numCycles": 3}},
        plain=lambda o: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(o, 4, STEPS, num_cycles=3),
    ),
    Case(
        name="cosine with a minimum",
        training={"schedule": "cosine_with_min_lr", "warmupRatio": 0.1},
        plain=lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, 4, STEPS, min_lr_rate=0.1),
    ),
    Case(
        name="cosine with two minima",
        training={
            "schedule": "cosine_warmup_with_min_lr",
            "warmupSteps": 5,
            "scheduleOptions": {"minLrRate": 0.2, "warmupLrRate": 0.3},
        },
        plain=lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            o, 5, STEPS, min_lr_rate=0.2, warmup_lr_rate=0.3
        ),
    ),
    Case(
        name="polynomial",
        training={"schedule": "polynomial", "scheduleOptions": {"power": 2, "lrEnd": 1e-4}},
        plain=lambda o: optimization.get_polynomial_decay_schedule_with_warmup(o, 0, STEPS, lr_end=1e-4, power=2),
    ),
    Case(
        name="inverse square root",
        training={"schedule": "inverse_sqrt", "warmupSteps": 4},
        plain=lambda o: optimization.get_inverse_sqrt_schedule(o, 4),
    ),
    Case(
        name="inverse square root with a timescale",
        training={"schedule": "inverse_sqrt", "scheduleOptions": {"timescale": 10}},
        plain=lambda o: optimization.get_inverse_sqrt_schedule(o, 0, timescale=10),
    ),
    Case(
        name="warm-up, stable, decay over a tenth",
        training={"schedule": "warmup_stable_decay", "warmupSteps": 4},
        plain=lambda o: optimization.get_wsd_schedule(o, 4, 4, num_training_steps=STEPS),
    ),
    Case(
        name="warm-up, stable, decay by other shapes",
        training={
            "schedule": "warmup_stable_decay",
            "warmupSteps": 4,
            "scheduleOptions": {
                "numDecaySteps": 10,
                "warmupType": "cosine",
                "decayType": "1-sqrt",
                "minLrRatio": 0.05,
            },
        },
        plain=lambda o: optimization.get_wsd_schedule(
            o, 4, 10, num_training_steps=STEPS, warmup_type="cosine", decay_type="1-sqrt", min_lr_ratio=0.05
        ),
    ),
    Case(
        name="constant",
        training={"schedule": "constant"},
        plain=optimization.get_constant_schedule,
    ),
    Case(
        name="constant with a warm-up",
        training={"schedule": "constant_with_warmup", "warmupSteps": 4},
        plain=lambda o: optimization.get_constant_schedule_with_warmup(o, 4),
    ),
]


def test_the_cases_cover_all_schedules() -> None:
    assert {case.training.get("schedule", "linear") for case in CASES} == set(SCHEDULES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_step_has_the_learning_rate_of_transformers(case: Case, tmp_path: Path) -> None:
    document = {
        "task": "causal-lm",
        "model": {"path": "/m"},
        "dataset": {"files": ["/d.txt"]},
        "training": {"learningRate": RATE, "batchSize": 8} | case.training,
        "resources": {"gpusPerNode": 0},
    }
    spec = FineTuneJobSpec.model_validate(document)
    plan = plan_training(spec, ROWS, None)
    assert plan.steps == STEPS
    arguments = training_arguments(task_of(spec), spec, plan, tmp_path, evaluates=False, step_timeout=60)
    trainer = Trainer.__new__(Trainer)
    trainer.args, trainer.lr_scheduler = arguments, None
    ours = trainer.create_scheduler(STEPS, optimizer())
    assert rates(ours) == rates(case.plain(optimizer()))


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def rates(scheduler: LambdaLR) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found
