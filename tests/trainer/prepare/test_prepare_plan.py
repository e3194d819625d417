"""The layout of a run: what is decided when the user sets nothing, and the count of steps against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.models.checks import cannot_recompute
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.plan import check_course, count_steps, plan_training

MakeRun = Callable[..., FineTuneRun]

LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = [
    # name, training, resources, strategy, expect
    (
        "one process",
        {"batchSize": 8},
        {"gpusPerNode": 0},
        "auto",
        {"strategy": "none", "micro_batch_size": 8, "accumulation_steps": 1},
    ),
    (
        "one GPU, long rows",
        {"batchSize": 64, "maxLength": 2048},
        {"gpusPerNode": 1},
        "auto",
        {"micro_batch_size": 1, "accumulation_steps": 64, "precision": "auto"},
    ),
    (
        "README's eight GPUs",
        {"batchSize": 64, "maxLength": 2048, "packing": True},
        {"gpusPerNode": 8},
        "auto",
        {"strategy": "ddp", "micro_batch_size": 1, "accumulation_steps": 8, "gradient_checkpointing": True},
    ),
    (
        "one GPU, rows of 512",
        {"batchSize": 64, "maxLength": 512},
        {"gpusPerNode": 1},
        "auto",
        {"micro_batch_size": 4, "accumulation_steps": 16},
    ),
    (
        "one GPU, short rows",
        {"batchSize": 64, "maxLength": 64},
        {"gpusPerNode": 1},
        "auto",
        {"micro_batch_size": 8, "accumulation_steps": 8},
    ),
    (
        "two nodes of eight",
        {"batchSize": 64, "maxLength": 4096},
        {"nodes": 2, "gpusPerNode": 8},
        "auto",
        {"strategy": "ddp", "world_size": 16, "micro_batch_size": 1},
    ),
    (
        "a batch that eight does not divide",
        {"batchSize": 22},
        {"gpusPerNode": 0, "processesPerNode": 2},
        "auto",
        {"micro_batch_size": 1, "accumulation_steps": 11},
    ),
    (
        "what the user set",
        {"batchSize": 64, "microBatchSize": 16, "precision": "bf16"},
        {"gpusPerNode": 2},
        "zero2",
        {"strategy": "zero2", "micro_batch_size": 16, "accumulation_steps": 2, "precision": "bf16"},
    ),
    (
        "steps that the user set",
        {"batchSize": 8, "maxSteps": 3, "epochs": 9},
        {"gpusPerNode": 0},
        "auto",
        {"steps": 3, "precision": "fp32"},
    ),
]


@pytest.mark.parametrize(("name", "training", "resources", "strategy", "expect"), LAYOUTS, ids=[c[0] for c in LAYOUTS])
def test_layout(
    name: str,
    training: dict[str, Any],
    resources: dict[str, Any],
    strategy: str,
    expect: dict[str, Any],
    make_run: MakeRun,
) -> None:
    plan = plan_training(
        make_run(training=training, resources=resources, strategy=strategy).spec, rows=1000, parameters=1
    )
    assert plan.model_dump(include=set(expect)) == expect
    assert plan.micro_batch_size is not None
    assert plan.accumulation_steps is not None
    assert plan.micro_batch_size * plan.accumulation_steps * plan.world_size == training["batchSize"]


RECOMPUTING: list[tuple[str, dict[str, Any], int, str | None, bool, list[str]]] = [
    # name                     training                          GPUs  why the model cannot   planned  reasons
    (
        "a GPU",
        {},
        1,
        None,
        True,
        [
            "gradientCheckpointing: true, the default on GPUs. Set it to false if yours have memory left: a step takes"
            " about a quarter less time"
        ],
    ),
    (
        "a model that cannot",
        {},
        1,
        "fnet cannot do that",
        False,
        ["gradientCheckpointing: false, because fnet cannot do that"],
    ),
    ("no GPU", {}, 0, None, False, []),
    ("as asked for", {"gradientCheckpointing": False}, 1, None, False, []),
    ("as asked for on CPU", {"gradientCheckpointing": True}, 0, None, True, []),
]


@pytest.mark.parametrize(
    ("name", "training", "gpus", "cannot", "planned", "reasons"), RECOMPUTING, ids=[r[0] for r in RECOMPUTING]
)
def test_activations_are_recomputed_on_gpus(
    name: str,
    training: dict[str, Any],
    gpus: int,
    cannot: str | None,
    planned: bool,
    reasons: list[str],
    make_run: MakeRun,
) -> None:
    spec = make_run(training={"maxLength": 64, "batchSize": 4} | training, resources={"gpusPerNode": gpus}).spec
    plan = plan_training(spec, rows=100, parameters=1, cannot_recompute=cannot)
    assert (plan.gradient_checkpointing, plan.reasons) == (planned, reasons)


def test_a_classifier_sees_more_rows_at_once(make_run: MakeRun) -> None:
    """It has no logits over a vocabulary, and may normalise over these rows."""
    for task in ("text-classification", "image-classification"):
        plan = plan_training(
            make_run(task=task, training={"batchSize": 64, "maxLength": 2048}, resources={"gpusPerNode": 1}).spec,
            100,
            None,
        )
        assert plan.micro_batch_size == 8


def test_the_plan_says_why_rows_are_few(make_run: MakeRun) -> None:
    training = {"batchSize": 8, "maxLength": 2048, "gradientCheckpointing": False}
    plan = plan_training(make_run(training=training, resources={"gpusPerNode": 1}).spec, 100, None)
    assert plan.reasons == [
        "microBatchSize: 1, because rows of 2048 tokens are large for a GPU. Set it higher if yours has memory left"
    ]


COURSES: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    ("all in order", {"batchSize": 4, "warmupSteps": 9}, 40, None, None),
    (
        "warm-up to the end",
        {"batchSize": 4, "warmupSteps": 10},
        40,
        (
            "spec.training.warmupSteps: 10 steps, but the training ends after 10 (40 rows, 4 a step, 1 epochs), before"
            " the peak"
        ),
        None,
    ),
    (
        "warm-up of blocks",
        {"batchSize": 4, "warmupSteps": 100, "epochs": 3, "packing": True},
        41,
        "spec.training.warmupSteps: 100 steps, but the training ends after 33 (41 blocks, 4 a step, 3 epochs)",
        None,
    ),
    ("a batch of all rows", {"batchSize": 13}, 13, None, None),
    (
        "a batch beyond them",
        {"batchSize": 64},
        13,
        None,
        (
            "spec.training.batchSize: 64 rows a step, but there are 13 rows to learn from: each step sees all of them,"
            " and the loss is the mean over 13\n"
        ),
    ),
]


@pytest.mark.parametrize(("name", "training", "rows", "refused", "said"), COURSES, ids=[c[0] for c in COURSES])
def test_batch_and_warm_up_suit_the_rows(
    name: str,
    training: dict[str, Any],
    rows: int,
    refused: str | None,
    said: str | None,
    make_run: MakeRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = make_run(training={"maxLength": 64} | training).spec
    plan = plan_training(spec, rows, None)
    if refused:
        with pytest.raises(Failure) as failure:
            check_course(spec, plan, rows)
        assert failure.value.code == ExitCode.INVALID_SPEC
        assert str(failure.value).startswith(refused)
    else:
        check_course(spec, plan, rows)
    assert capsys.readouterr().out == (said or "")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_of_text_recompute(name: str) -> None:
    from transformers import CONFIG_MAPPING

    assert cannot_recompute(CONFIG_MAPPING[name](), "causal-lm") is None


def test_a_model_that_cannot_recompute_says_so() -> None:
    from transformers import ResNetConfig

    assert cannot_recompute(ResNetConfig(), "image-classification") == "resnet cannot recompute its activations"


COUNTS = [(100, 8, 1, 1.0), (101, 4, 3, 1.0), (7, 8, 4, 2.0), (33, 4, 2, 0.5), (33, 4, 2, 2.5)]


@pytest.mark.parametrize(("rows", "micro", "accumulation", "epochs"), COUNTS)
def test_steps_are_those_of_the_trainer(
    rows: int, micro: int, accumulation: int, epochs: float, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        use_cpu=True,
        report_to="none",
    )
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
