"""A real training on a GPU serves the memory that it has used, its utilisation, and how it compares with the plan."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from prepared_workspace import prepared_run

from luthier_api.metrics import read_samples
from luthier_api.run import Compute, FineTuneRun, Gpu
from luthier_api.status import Memory
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared, write_prepared

STEPS, LENGTH, ROWS = 24, 128, 32


def run_on_gpu(root: Path, model: Path) -> FineTuneRun:
    """A job of 24 steps on one GPU, whose plan expects 1 MB of memory and a second a step."""
    rows = {"input_ids": [[5 + n % 7] * LENGTH for n in range(ROWS)], "length": [LENGTH] * ROWS}
    run = prepared_run(
        root,
        model,
        DatasetDict(train=Dataset.from_dict(rows)),
        method={"type": "lora", "rank": 4},
        training={"maxSteps": STEPS, "maxLength": LENGTH, "precision": "bf16"},
        resources={"gpusPerNode": 1},
    )
    record = read_prepared(run)
    memory = Memory(gpu={"weights": 1_000_000, "context": 1_000_000_000}, gpu_bytes=1_001_000_000)
    plan = record.plan.model_copy(update={"memory": memory, "seconds": STEPS, "gpu_hours": STEPS / 3600})
    compute = Compute(multiplied=100_000, learning=10_000, length=LENGTH)
    write_prepared(run, record.model_copy(update={"plan": plan, "compute": compute}))
    return run.model_copy(update={"gpu": Gpu(peak_flops=1e15)})


def test_memory_and_utilisation_are_measured(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], figure: Callable[..., None]
) -> None:
    run = run_on_gpu(tmp_path / "job", llama)
    message = train.main(run)

    metrics = message.metrics
    assert metrics is not None
    peak = torch.cuda.max_memory_allocated()
    assert 1e6 < metrics["peakMemoryGB"] * 1e9 <= peak + 1e6
    assert metrics["reservedMemoryGB"] >= metrics["peakMemoryGB"]
    assert metrics["plannedMemoryGB"] == 0.001
    with urllib.request.urlopen(f"http://127.0.0.1:{(run_dir() / 'metrics-port').read_text()}/metrics") as answer:
        samples = read_samples(answer.read().decode())
    assert samples["luthier_train_mfu_ratio"] > 0
    assert samples["luthier_train_memory_planned_bytes"] == 1_000_000
    assert samples["luthier_train_memory_peak_bytes"] == pytest.approx(metrics["peakMemoryGB"] * 1e9, abs=1e6)
    assert samples["luthier_train_memory_allocated_bytes"] <= samples["luthier_train_memory_reserved_bytes"]
    assert samples["luthier_train_plan_memory_ratio"] > 1.15
    assert 0 < samples["luthier_train_plan_seconds_ratio"] < 0.85
    assert samples["luthier_train_gpu_hours"] > 0
    output = capfd.readouterr().out
    assert "step 20/24  plan: a step takes" in output
    assert "plan.memory: the peak of a GPU is" in output
    assert "memory at most: rank 0" in output
    figure(**metrics, **{name: value for name, value in samples.items() if "memory" in name or "plan" in name})
    assert json.loads((tmp_path / "job/result/metrics.json").read_text()) == metrics
