"""What a FineTuneJob asks of transformers' Trainer, where it depends on the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.training.arguments import loader_workers

WORKERS = [
    # task                    resources                        cores of the node  workers of each process
    ("causal-lm", {"gpusPerNode": 8}, 128, 2),
    ("text-classification", {"gpusPerNode": 1}, 2, 2),
    ("image-classification", {"gpusPerNode": 1}, 4, 3),
    ("image-classification", {"gpusPerNode": 8}, 128, 8),
    ("image-classification", {"gpusPerNode": 8}, 32, 3),
    ("image-classification", {"gpusPerNode": 4}, 4, 2),
    ("image-classification", {"gpusPerNode": 2, "cpu": "8"}, 128, 3),
]


@pytest.mark.parametrize(("task", "resources", "cores", "workers"), WORKERS)
def test_images_are_decoded_by_as_many_processes_as_there_are_cores(
    task: str, resources: dict[str, Any], cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    spec: Any = {"task": task, "model": {"id": "a/b"}, "dataset": {"id": "a/c"}, "resources": resources}
    assert loader_workers(FineTuneJobSpec.model_validate(spec)) == workers
