"""The first steps are compared with the plan, on the process that a pod starts."""

from __future__ import annotations

import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import prepared_run

from luthier_api.canary import duration, remarks
from luthier_api.metrics import read_samples, training_progress
from luthier_api.run import FineTuneRun
from luthier_api.status import Memory, Plan
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.memory_use import MemoryUse
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.training import main as train
from luthier_trainer.training.canary import Canary
from luthier_trainer.workspace.prepared import read_prepared, write_prepared

STEPS = 12


def trained(root: Path, llama: Path, data: DatasetDict, **planned: Any) -> tuple[FineTuneRun, dict[str, float]]:
    """Train a few steps with `planned` as figures of the plan. Return the run and the metrics that the pod served."""
    run = prepared_run(
        root, llama, DatasetDict(train=data["train"]), method={"type": "lora", "rank": 4}, training={"maxSteps": STEPS}
    )
    record = read_prepared(run)
    write_prepared(run, record.model_copy(update={"plan": record.plan.model_copy(update=planned)}))
    message = train.main(run)
    port = (run_dir() / "metrics-port").read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        samples = read_samples(answer.read().decode())
    assert message.metrics is not None
    assert samples["luthier_train_memory_peak_bytes"] == pytest.approx(message.metrics["peakMemoryGB"] * 1e9, rel=0.01)
    return run, samples


def test_a_wrong_plan_is_noticed(
    llama: Path, prose_data: DatasetDict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, samples = trained(tmp_path, llama, prose_data, seconds=36_000, memory=Memory(host_bytes=50_000_000))

    progress = training_progress([samples])
    assert progress is not None
    assert progress.plan_seconds_ratio is not None
    assert progress.plan_seconds_ratio < 0.01
    assert progress.plan_memory_ratio is not None
    assert progress.plan_memory_ratio > 4
    texts = notices.given()
    # The operator makes the same texts of the metrics, so that each stands in the status once.
    plan = read_prepared(run).plan
    assert remarks(plan, progress.plan_seconds_ratio, progress.plan_memory_ratio) == texts
    assert [text.partition(":")[0] for text in texts] == ["plan.seconds", "plan.memory"]
    output = capfd.readouterr().out
    assert "step 12/12  plan: a step takes" in output
    assert "memory at most: rank 0 " in output
    assert "; planned 50.0 MB" in output


def test_a_right_plan_is_not_noticed(llama: Path, prose_data: DatasetDict, tmp_path: Path) -> None:
    from luthier_trainer.runtime import memory_use

    held = memory_use.peak(torch.device("cpu")).tensors
    _, samples = trained(tmp_path, llama, prose_data, memory=Memory(host_bytes=held))
    assert notices.given() == []
    assert samples["luthier_train_memory_planned_bytes"] == held
    assert 0.99 < samples["luthier_train_plan_memory_ratio"] < 1.15
    assert "luthier_train_plan_seconds_ratio" not in samples


@dataclass(frozen=True)
class Remarks:
    name: str
    seconds: float | None
    memory: float | None
    expect: list[str]


PLAN = Plan(strategy="none", seconds=7200, gpu_hours=16.0, memory=Memory(gpu={"weights": 10}, gpu_bytes=10))
REMARKS = [
    Remarks("nearly as planned", 1.14, 0.86, []),
    Remarks("nothing measured", None, None, []),
    Remarks(
        "slower",
        1.5,
        1.0,
        [
            "plan.seconds: a step takes 1.50 times as long as planned, so that all steps take about 3 h 0 min instead"
            " of 2 h 0 min, and 24 GPU-hours instead of 16. docs/troubleshooting.md says what slows a training down"
        ],
    ),
    Remarks(
        "faster, and larger",
        0.5,
        1.2,
        [
            "plan.seconds: a step takes 0.50 times as long as planned, so that all steps take about 60 min instead of"
            " 2 h 0 min, and 8 GPU-hours instead of 16",
            "plan.memory: the peak of a GPU is 1.20 times the planned one. If it runs out, lower"
            " training.microBatchSize",
        ],
    ),
    Remarks(
        "smaller",
        None,
        0.5,
        [
            "plan.memory: the peak of a GPU is 0.50 times the planned one. A larger training.microBatchSize may fit",
        ],
    ),
]


@pytest.mark.parametrize("case", REMARKS, ids=lambda case: case.name)
def test_remarks(case: Remarks) -> None:
    assert remarks(PLAN, case.seconds, case.memory) == case.expect


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def canary(device: str, plan: Plan, processes: int = 1) -> Canary:
    made = Canary(Telemetry(), plan, processes)
    made.loop = SimpleNamespace(args=SimpleNamespace(device=torch.device(device)), ranks=Ranks())  # type: ignore[assignment]
    return made


PEAKS = [MemoryUse(5, 6), MemoryUse(9, 9), MemoryUse(7, 12), MemoryUse(1, 1)]


def test_the_fullest_gpu_and_the_fullest_node() -> None:
    assert canary("cuda", PLAN).fullest(PEAKS) == MemoryUse(9, 9)
    assert canary("cpu", PLAN, processes=2).fullest(PEAKS) == MemoryUse(14, 15)


def test_on_gpus_tensors_are_compared_with_planned_tensors() -> None:
    memory = Memory(gpu={"weights": 10, "context": 3, "fragments": 2}, gpu_bytes=15, host_bytes=99)
    plan = PLAN.model_copy(update={"memory": memory})
    assert canary("cuda", plan).planned() == 10
    assert canary("cpu", plan).planned() == 99
    assert canary("cpu", Plan(strategy="none")).planned() is None
    partial = PLAN.model_copy(update={"memory": memory.model_copy(update={"partial": True})})
    assert canary("cuda", partial).planned() is None, "what is not known in full is not compared"


@dataclass(frozen=True)
class Course:
    name: str
    first: int
    steps: int
    saved: tuple[int, ...]
    """Steps that a save follows."""
    measured: int
    """Steps whose time counts."""


COURSES = [
    Course("a long training", first=0, steps=100, saved=(), measured=15),
    Course("one that resumes", first=50, steps=100, saved=(), measured=15),
    Course("a short one", first=0, steps=6, saved=(), measured=3),
    Course("of one step", first=0, steps=1, saved=(), measured=0),
    Course("saves do not count", first=0, steps=100, saved=(10, 15), measured=13),
]


@pytest.mark.parametrize("case", COURSES, ids=lambda case: case.name)
def test_steps_that_are_timed(case: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 seconds after first ones of 60, with saves of 500."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    watched = canary("cpu", Plan(strategy="none", steps=case.steps, seconds=case.steps))
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    state: Any = SimpleNamespace(global_step=case.first, max_steps=case.steps)
    watched.on_train_begin(args, state, None)  # type: ignore[arg-type]
    while state.global_step < state.max_steps:
        state.global_step += 1
        clock += 60 if state.global_step - case.first <= 3 else 2
        watched.on_step_end(args, state, None)  # type: ignore[arg-type]
        if state.global_step in case.saved:
            clock += 500
            watched.on_save(args, state, None)  # type: ignore[arg-type]
    assert len(watched._seconds) == case.measured
    assert set(watched._seconds) <= {2.0}
