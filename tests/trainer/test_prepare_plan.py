"""The layout of a run: what is decided when the user sets nothing, and the count of steps against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from luthier_api.run import FineTuneRun
from luthier_trainer.plan import count_steps, plan_training

MakeRun = Callable[..., FineTuneRun]

LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = [
    # name, training, resources, strategy, expect
    ("one process", {"batchSize": 8}, {"gpusPerNode": 0}, "auto", {"strategy": "none", "micro_batch_size": 8, "accumulation_steps": 1}),
    ("one GPU, a large batch", {"batchSize": 64}, {"gpusPerNode": 1}, "auto", {"micro_batch_size": 8, "accumulation_steps": 8, "precision": "auto"}),
    ("two nodes of eight", {"batchSize": 64}, {"nodes": 2, "gpusPerNode": 8}, "auto", {"strategy": "ddp", "world_size": 16, "micro_batch_size": 4}),
    ("a batch that eight does not divide", {"batchSize": 22}, {"gpusPerNode": 0, "processesPerNode": 2}, "auto",
     {"micro_batch_size": 1, "accumulation_steps": 11}),
    ("what the user set", {"batchSize": 64, "microBatchSize": 16, "precision": "bf16"}, {"gpusPerNode": 2}, "zero2",
     {"strategy": "zero2", "micro_batch_size": 16, "accumulation_steps": 2, "precision": "bf16"}),
    ("steps that the user set", {"batchSize": 8, "maxSteps": 3, "epochs": 9}, {"gpusPerNode": 0}, "auto", {"steps": 3, "precision": "fp32"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "training", "resources", "strategy", "expect"), LAYOUTS, ids=[c[0] for c in LAYOUTS])
def test_layout(name: str, training: dict[str, Any], resources: dict[str, Any], strategy: str, expect: dict[str, Any], make_run: MakeRun) -> None:
    plan = plan_training(make_run(training=training, resources=resources, strategy=strategy).spec, rows=1000, parameters=1)
    assert plan.model_dump(include=set(expect)) == expect
    assert plan.micro_batch_size is not None
    assert plan.accumulation_steps is not None
    assert plan.micro_batch_size * plan.accumulation_steps * plan.world_size == training["batchSize"]


COUNTS = [(100, 8, 1, 1.0), (101, 4, 3, 1.0), (7, 8, 4, 2.0), (33, 4, 2, 0.5), (33, 4, 2, 2.5)]


@pytest.mark.parametrize(("rows", "micro", "accumulation", "epochs"), COUNTS)
def test_steps_are_those_of_the_trainer(rows: int, micro: int, accumulation: int, epochs: float, tiny_model: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, num_train_epochs=epochs, use_cpu=True,
        report_to="none",
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [[1, 2]] * rows, "labels": [[1, 2]] * rows})
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(tiny_model), args=arguments, train_dataset=data)
    theirs = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert count_steps(rows, 1, micro, accumulation, epochs) == theirs


@pytest.mark.parametrize(("rows", "world", "micro"), [(100, 2, 8), (17, 4, 2), (3, 4, 1)])
def test_batches_are_dealt_as_accelerate_deals_them(rows: int, world: int, micro: int) -> None:
    from accelerate.data_loader import BatchSamplerShard

    sampler = BatchSampler(SequentialSampler(range(rows)), micro, drop_last=False)
    shard = BatchSamplerShard(sampler, num_processes=world, process_index=world - 1)
    assert count_steps(rows, world, micro, 1, 1) == len(DataLoader(range(rows), batch_sampler=shard))  # type: ignore[arg-type]
