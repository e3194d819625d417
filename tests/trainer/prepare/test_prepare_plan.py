"""The layout of a run: what is decided when the user sets nothing, and the count of steps against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from luthier_trainer.workspace.course import check_course
from luthier_trainer.workspace.plan import count_steps, plan_training

MakeRun = Callable[..., FineTuneRun]


@dataclass(frozen=True)
class LayoutCase:
    name: str
    training: dict[str, Any]
    resources: dict[str, Any]
    strategy: str
    expect: dict[str, Any]


LAYOUTS = [
    LayoutCase(
        name="one process",
        training={"batchSize": 8},
        resources={"gpusPerNode": 0},
        strategy="auto",
        expect={"strategy": "none", "micro_batch_size": 8, "accumulation_steps": 1},
    ),
    LayoutCase(
        name="one GPU, long rows",
        training={"batchSize": 64, "maxLength": 2048},
        resources={"gpusPerNode": 1},
        strategy="auto",
        expect={"micro_batch_size": 1, "accumulation_steps": 64, "precision": "auto"},
    ),
    LayoutCase(
        name="README's eight GPUs",
        training={"batchSize": 64, "maxLength": 2048, "packing": "concatenate"},
        resources={"gpusPerNode": 8},
        strategy="auto",
        expect={"strategy": "ddp", "micro_batch_size": 1, "accumulation_steps": 8, "gradient_checkpointing": True},
    ),
    LayoutCase(
        name="one GPU, rows of 512",
        training={"batchSize": 64, "maxLength": 512},
        resources={"gpusPerNode": 1},
        strategy="auto",
        expect={"micro_batch_size": 4, "accumulation_steps": 16},
    ),
    LayoutCase(
        name="one GPU, short rows",
        training={"batchSize": 64, "maxLength": 64},
        resources={"gpusPerNode": 1},
        strategy="auto",
        expect={"micro_batch_size": 8, "accumulation_steps": 8},
    ),
    LayoutCase(
        name="two nodes of eight",
        training={"batchSize": 64, "maxLength": 4096},
        resources={"nodes": 2, "gpusPerNode": 8},
        strategy="auto",
        expect={"strategy": "ddp", "world_size": 16, "micro_batch_size": 1},
    ),
    LayoutCase(
        name="a batch that eight does not divide",
        training={"batchSize": 22},
        resources={"gpusPerNode": 0, "processesPerNode": 2},
        strategy="auto",
        expect={"micro_batch_size": 1, "accumulation_steps": 11},
    ),
    LayoutCase(
        name="what the user set",
        training={"batchSize": 64, "microBatchSize": 16, "precision": "bf16"},
        resources={"gpusPerNode": 2},
        strategy="zero2",
        expect={"strategy": "zero2", "micro_batch_size": 16, "accumulation_steps": 2, "precision": "bf16"},
    ),
    LayoutCase(
        name="steps that the user set",
        training={"batchSize": 8, "maxSteps": 3, "epochs": 9},
        resources={"gpusPerNode": 0},
        strategy="auto",
        expect={"steps": 3, "precision": "fp32"},
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_layout(case: LayoutCase, make_run: MakeRun) -> None:
    plan = plan_training(
        make_run(training=case.training, resources=case.resources, strategy=case.strategy).spec, rows=1000, parameters=1
    )
    assert plan.model_dump(include=set(case.expect)) == case.expect
    assert plan.micro_batch_size is not None
    assert plan.accumulation_steps is not None
    assert plan.micro_batch_size * plan.accumulation_steps * plan.world_size == case.training["batchSize"]


@dataclass(frozen=True)
class RecomputingCase:
    name: str
    gpus: int
    obstacle: str | None
    planned: bool
    reasons: list[str]
    training: dict[str, Any] = field(default_factory=dict)


RECOMPUTING = [
    RecomputingCase(
        name="a GPU",
        gpus=1,
        obstacle=None,
        planned=True,
        reasons=[
            "gradientCheckpointing: true, the default on GPUs. Set it to false if yours have memory left: a step takes"
            " about a quarter less time"
        ],
    ),
    RecomputingCase(
        name="a model that cannot",
        gpus=1,
        obstacle="fnet cannot do that",
        planned=False,
        reasons=["gradientCheckpointing: false, because fnet cannot do that"],
    ),
    RecomputingCase(
        name="no GPU",
        gpus=0,
        obstacle=None,
        planned=False,
        reasons=[],
    ),
    RecomputingCase(
        name="as asked for",
        training={"gradientCheckpointing": False},
        gpus=1,
        obstacle=None,
        planned=False,
        reasons=[],
    ),
    RecomputingCase(
        name="as asked for on CPU",
        training={"gradientCheckpointing": True},
        gpus=0,
        obstacle=None,
        planned=True,
        reasons=[],
    ),
]


@pytest.mark.parametrize("case", RECOMPUTING, ids=lambda case: case.name)
def test_activations_are_recomputed_on_gpus(case: RecomputingCase, make_run: MakeRun) -> None:
    spec = make_run(
        training={"maxLength": 64, "batchSize": 4} | case.training, resources={"gpusPerNode": case.gpus}
    ).spec
    plan = plan_training(spec, rows=100, parameters=1, cannot_recompute=case.obstacle)
    assert (plan.gradient_checkpointing, plan.reasons) == (case.planned, case.reasons)


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


@dataclass(frozen=True)
class CourseCase:
    name: str
    training: dict[str, Any]
    rows: int
    refusal: str | None
    notice: str | None


COURSES = [
    CourseCase(
        name="all in order",
        training={"batchSize": 4, "warmupSteps": 9},
        rows=40,
        refusal=None,
        notice=None,
    ),
    CourseCase(
        name="warm-up to the end",
        training={"batchSize": 4, "warmupSteps": 10},
        rows=40,
        refusal=(
            "spec.training.warmupSteps: 10 steps, but the training ends after 10 (40 rows, 4 a step, 1 epochs), before"
            " the peak"
        ),
        notice=None,
    ),
    CourseCase(
        name="warm-up of blocks",
        training={"batchSize": 4, "warmupSteps": 100, "epochs": 3, "packing": "concatenate"},
        rows=41,
        refusal="spec.training.warmupSteps: 100 steps, but the training ends after 33 (41 blocks, 4 a step, 3 epochs)",
        notice=None,
    ),
    CourseCase(
        name="a warm-up of a share",
        training={"batchSize": 4, "warmupRatio": 0.9},
        rows=40,
        refusal=None,
        notice=None,
    ),
    CourseCase(
        name="a warm-up of all",
        training={"batchSize": 4, "warmupRatio": 0.91},
        rows=40,
        refusal="spec.training.warmupRatio: 10 steps, but the training ends after 10",
        notice=None,
    ),
    CourseCase(
        name="a decay of a tenth, after the warm-up",
        training={"batchSize": 4, "warmupSteps": 9, "schedule": "warmup_stable_decay"},
        rows=40,
        refusal=None,
        notice=None,
    ),
    CourseCase(
        name="a decay beyond the end",
        training={
            "batchSize": 4,
            "warmupSteps": 2,
            "schedule": "warmup_stable_decay",
            "scheduleOptions": {"numDecaySteps": 9},
        },
        rows=40,
        refusal=(
            "spec.training.scheduleOptions.numDecaySteps: 9 steps, after 2 of warm-up, but the training ends after 10"
        ),
        notice=None,
    ),
    CourseCase(
        name="a batch of all rows",
        training={"batchSize": 13},
        rows=13,
        refusal=None,
        notice=None,
    ),
    CourseCase(
        name="a batch beyond them",
        training={"batchSize": 64},
        rows=13,
        refusal=None,
        notice=(
            "spec.training.batchSize: 64 rows a step, but there are 13 rows to learn from: each step sees all of them,"
            " and the loss is the mean over 13\n"
        ),
    ),
]


@pytest.mark.parametrize("case", COURSES, ids=lambda case: case.name)
def test_batch_and_warm_up_suit_the_rows(
    case: CourseCase, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_run(training={"maxLength": 64} | case.training).spec
    plan = plan_training(spec, case.rows, None)
    if case.refusal:
        with pytest.raises(Failure) as failure:
            check_course(spec, plan, case.rows)
        assert failure.value.code == ExitCode.INVALID_SPEC
        assert str(failure.value).startswith(case.refusal)
    else:
        check_course(spec, plan, case.rows)
    assert capsys.readouterr().out == (case.notice or "")


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
    data = Dataset.from_dict({"input_ids": [[1, 2]] * rows})
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(tiny_model), args=arguments, train_dataset=data)
    theirs = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    assert count_steps(rows, 1, micro, accumulation, epochs) == theirs


@pytest.mark.parametrize(("rows", "world", "micro"), [(100, 2, 8), (17, 4, 2), (3, 4, 1)])
def test_batches_are_dealt_as_accelerate_deals_them(rows: int, world: int, micro: int) -> None:
    from accelerate.data_loader import BatchSamplerShard

    sampler = BatchSampler(SequentialSampler(range(rows)), micro, drop_last=False)
    shard = BatchSamplerShard(sampler, num_processes=world, process_index=world - 1)
    assert count_steps(rows, world, micro, 1, 1) == len(DataLoader(range(rows), batch_sampler=shard))  # type: ignore[arg-type]
