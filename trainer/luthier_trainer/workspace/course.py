"""The course of a training in steps: warm-up, decay, and when it evaluates and saves. Imports no torch.

`prepare` checks it before a GPU is used, and `training.arguments` passes it to transformers.
"""

from __future__ import annotations

import math
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import Plan
from luthier_api.training import Training
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

BATCH_SIZE, WARM_UP_STEPS, WARM_UP_RATIO, DECAY_STEPS = (
    f"spec.training.{name}" for name in ("batchSize", "warmupSteps", "warmupRatio", "scheduleOptions.numDecaySteps")
)
PACKED = {"isolated": "bins", "concatenate": "blocks"}
"""Value of `training.packing` → what the rows of the prepared dataset are then called."""
DECAY_SHARE = 0.1  # of all steps, as in MiniCPM (arXiv:2404.06395), which introduced the schedule


def warmup_steps(training: Training, steps: int) -> int:
    """Return the steps of the warm-up, of `steps` in total. A share is rounded up, as transformers does it."""
    return math.ceil(steps * training.warmup_ratio) if training.warmup_ratio else training.warmup_steps


def schedule_arguments(training: Training, steps: int) -> dict[str, Any]:
    """Return `lr_scheduler_kwargs` of transformers for a training of `steps` steps."""
    options = training.schedule_options.model_dump(exclude_none=True)
    if training.schedule == "warmup_stable_decay":
        options.setdefault("num_decay_steps", max(1, math.ceil(steps * DECAY_SHARE)))
    return options


def evaluation_is_due(training: Training, step: int, steps_per_epoch: int, steps: int) -> bool:
    """Return whether a training of `steps` steps evaluates after `step`, other than after all steps.

    With loadBestModel the last step is evaluated like the others, because its weights are a candidate.
    """
    if step == steps:
        return training.load_best_model
    if training.eval_every == "epoch":
        return step % steps_per_epoch == 0
    return training.eval_steps is not None and step % training.eval_steps == 0


def most_saves(training: Training, steps: int) -> int:
    """Return how many checkpoints a training of `steps` steps saves at most, without those of its best evaluations."""
    if training.save_every == "steps":
        return math.ceil(steps / training.save_steps)
    return steps if training.max_steps else math.ceil(training.epochs)


def check_course(spec: FineTuneJobSpec, plan: Plan, rows: int) -> None:
    """Check that batch, warm-up and decay suit the number of rows.

    Gives notice of a batch with more rows than there are. Raises Failure if warm-up or decay are too long.
    """
    training, steps = spec.training, plan.steps or 0
    what = PACKED.get(training.packing, "rows")
    if training.batch_size > rows:
        notice(
            f"{BATCH_SIZE}: {training.batch_size} rows a step, but there are {rows} {what} to learn from: each step"
            f" sees all of them, and the loss is the mean over {rows}"
        )
    length = f"{steps} ({rows} {what}, {training.batch_size} a step, {training.epochs:g} epochs)"
    warmup = warmup_steps(training, steps)
    if warmup and warmup >= steps:
        field = WARM_UP_RATIO if training.warmup_ratio else WARM_UP_STEPS
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {warmup} steps, but the training ends after {length}, before the peak of the learning rate."
            f" Choose fewer than {steps}, or more epochs",
        )
    decay = schedule_arguments(training, steps).get("num_decay_steps", 0)
    if warmup + decay > steps:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{DECAY_STEPS}: {decay} steps, after {warmup} of warm-up, but the training ends after {length}. Choose"
            " fewer, or more epochs",
        )
