"""Trainings of one small Llama whose courses must not depend on how two processes share the work.

Each is trained by two processes with every strategy that it works with, and compared with one process, or with DDP
where each process draws random numbers of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from prepared_workspace import prepared_run
from safetensors.torch import load_file

from luthier_api.run import FineTuneRun
from luthier_trainer.workspace.prepared import read_prepared, write_prepared

LORA = {"type": "lora", "rank": 4}
STRATEGIES = ("zero2", "zero3")
VOCABULARY = 512
NEW_TOKENS = (VOCABULARY, VOCABULARY + 1)


@dataclass(frozen=True)
class Course:
    """A training with options that DeepSpeed could lose, or compute otherwise."""

    name: str
    method: dict[str, Any]
    training: dict[str, Any]
    strategies: tuple[str, ...] = STRATEGIES
    new_tokens: tuple[int, ...] = ()
    of_each: bool = False
    """Whether each process draws random numbers of its own, so that one process alone draws others."""

    @property
    def chooses(self) -> bool:
        """Whether the best weights are delivered. They are those of the first evaluation."""
        return bool(self.training.get("loadBestModel"))


COURSES = [
    Course(
        name="the best of all weights, with an early stop",
        method={"type": "full"},
        training={
            "loadBestModel": True,
            "earlyStopping": {"patience": 2},
            "saveSteps": 2,
            "keepCheckpoints": 1,
            "labelSmoothing": 0.1,
            "schedule": "constant_with_warmup",
            "warmupSteps": 1,
            "weightDecay": 0.1,
            "maxGradNorm": 0.5,
            "optimizerOptions": {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6},
        },
    ),
    Course(
        name="the best adapter, with LoRA+",
        method=LORA,
        training={
            "loadBestModel": True,
            "schedule": "cosine_with_min_lr",
            "scheduleOptions": {"minLrRate": 0.5},
            "optimizerOptions": {"loraplusLrRatio": 4, "beta2": 0.95, "epsilon": 1e-3},
            "weightDecay": 0.1,
        },
    ),
    Course(
        name="NEFTune",
        method=LORA,
        training={"neftuneNoiseAlpha": 5},
        strategies=("ddp", *STRATEGIES),
        of_each=True,
    ),
    Course(
        name="DoRA and modules trained whole",
        method=LORA | {"dora": True, "modulesToSave": ["norm", "0.mlp"]},
        training={"gradientCheckpointing": True},
    ),
    Course(
        name="PiSSA",
        method=LORA | {"initLoraWeights": "pissa"},
        training={},
        strategies=("zero2",),
    ),
    Course(
        name="rows of new tokens",
        method=LORA,
        training={},
        strategies=("zero2",),
        new_tokens=NEW_TOKENS,
    ),
]


def runs(root: Path, course: Course, model: Path, data: DatasetDict, strategy: str, **spec: Any) -> FineTuneRun:
    """The run of a course. `spec`: its resources and port.

    With a larger epsilon than the default, Adam does not amplify the differences in rounding.
    """
    training = {"maxSteps": 8, "learningRate": 1e-2, "evalSteps": 2, "microBatchSize": 4} | course.training
    training["optimizerOptions"] = {"epsilon": 1e-3} | training.get("optimizerOptions", {})
    rows = DatasetDict({name: with_new_tokens(some, course.new_tokens) for name, some in data.items()})
    if course.chooses:
        rows["eval"] = rows["eval"].map(unlike)
    run = prepared_run(root, model, rows, method=course.method, training=training, strategy=strategy, **spec)
    write_prepared(run, read_prepared(run).model_copy(update={"new_tokens": [*course.new_tokens]}))
    return run


def unlike(row: dict[str, Any]) -> dict[str, Any]:
    """A row of rare tokens: the more the model learns, the less it expects them."""
    return {"input_ids": [VOCABULARY - 1 - i % 3 for i in range(len(row["input_ids"]))]}


def with_new_tokens(rows: Dataset, tokens: tuple[int, ...]) -> Dataset:
    """Rows in which the new tokens stand in the place of others."""
    if not tokens:
        return rows
    return rows.map(
        lambda row: {"input_ids": [tokens[i % 2] if i % 5 == 0 else token for i, token in enumerate(row["input_ids"])]}
    )


@dataclass(frozen=True)
class History:
    """What a run has recorded, step → value."""

    losses: dict[int, float]
    evaluations: dict[int, float]
    learning_rates: dict[int, float]

    @property
    def steps(self) -> list[int]:
        return [*self.losses]

    @classmethod
    def of(cls, run: FineTuneRun) -> History:
        checkpoints = Path(run.workspace) / "checkpoints"
        last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        entries = json.loads((last / "trainer_state.json").read_text())["log_history"]

        def column(name: str) -> dict[int, float]:
            return {entry["step"]: entry[name] for entry in entries if name in entry and entry["step"] > 0}

        return cls(column("loss"), column("eval_loss"), column("learning_rate"))


def weights(run: FineTuneRun) -> dict[str, torch.Tensor]:
    """What has been delivered."""
    files = (Path(run.workspace) / "result").glob("*.safetensors")
    return {name: weight for file in files for name, weight in load_file(file).items()}


def in_memory(name: str) -> str:
    """The name of a weight of the result in the memory of the process that has trained it."""
    return name.replace(".weight", ".default.weight") if ".lora_" in name else name
