"""Names of the metrics that the pods serve, and how progress is read from them.

From one table the trainer creates its gauges, the operator and `luthier run` read progress, and the docs are written.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from luthier_api.status import Progress, finite


@dataclass(frozen=True)
class Metric:
    name: str
    help: str
    type: Literal["gauge", "counter", "histogram"] = "gauge"
    labels: tuple[str, ...] = ()


TRAIN_STEP = Metric("luthier_train_step", "Optimiser steps done")
TRAIN_MAX_STEPS = Metric("luthier_train_max_steps", "Optimiser steps of the whole run")
TRAIN_EPOCH = Metric("luthier_train_epoch", "Passes over the training rows done")
TRAIN_LOSS = Metric("luthier_train_loss", "Training loss, mean since the last report")
EVAL_LOSS = Metric("luthier_train_eval_loss", "Loss on the held-out rows")
TRAIN_LEARNING_RATE = Metric("luthier_train_learning_rate", "Learning rate")
TRAIN_GRAD_NORM = Metric("luthier_train_grad_norm", "Norm of the gradients before clipping")
TRAIN_TOKENS = Metric("luthier_train_tokens_total", "Tokens trained on, padding excluded, over all ranks", "counter")
TRAIN_PADDING = Metric(
    "luthier_train_padding_tokens_total",
    "Tokens computed in this attempt only to fill up rows, over all ranks",
    "counter",
)
TRAIN_TOKENS_PER_SECOND = Metric(
    "luthier_train_tokens_per_second", "Tokens a second over all ranks, since the last report"
)
TRAIN_SAMPLES = Metric("luthier_train_samples_total", "Rows trained on in this attempt, over all ranks", "counter")
TRAIN_SAMPLES_PER_SECOND = Metric(
    "luthier_train_samples_per_second", "Rows a second over all ranks, since the last report"
)
TRAIN_MFU = Metric(
    "luthier_train_mfu_ratio",
    "Model FLOPs of the tokens or images trained on, as a part of the GPUs' peak in 16 bit; only for GPUs whose peak is"
    " known",
)
MEMORY_ALLOCATED = Metric(
    "luthier_train_memory_allocated_bytes", "Memory of rank 0's GPU in tensors; on CPU, of its process"
)
MEMORY_RESERVED = Metric(
    "luthier_train_memory_reserved_bytes", "Memory of rank 0's GPU that torch holds; on CPU, of its process"
)
MEMORY_PEAK = Metric(
    "luthier_train_memory_peak_bytes",
    "The most memory in tensors of the fullest GPU in this attempt; on CPU, of the processes of a node together",
)
MEMORY_PEAK_RESERVED = Metric(
    "luthier_train_memory_peak_reserved_bytes",
    "The most memory of the fullest GPU that torch has held in this attempt; on CPU, of the processes of a node",
)
MEMORY_PLANNED = Metric(
    "luthier_train_memory_planned_bytes", "What the plan expects of luthier_train_memory_peak_bytes"
)
PLAN_SECONDS_RATIO = Metric(
    "luthier_train_plan_seconds_ratio",
    "Time of a step as a part of the planned one, after the first steps of this attempt",
)
PLAN_MEMORY_RATIO = Metric(
    "luthier_train_plan_memory_ratio", "Peak of memory as a part of the planned one, after the first steps"
)
TRAIN_GPU_HOURS = Metric(
    "luthier_train_gpu_hours", "GPU-hours of the whole run: those of all attempts so far, and those of the time left"
)
TRAIN_STEP_SECONDS = Metric("luthier_train_step_duration_seconds", "Time of an optimiser step", "histogram")
TRAIN_NONFINITE = Metric("luthier_train_nonfinite_total", "Reports of a loss that is not a finite number", "counter")
TRAIN_ETA_SECONDS = Metric("luthier_train_eta_seconds", "Time left at the pace of this attempt")
CHECKPOINT_STEP = Metric(
    "luthier_checkpoint_last_step", "Step of the newest verified checkpoint; 0 while there is none"
)
CHECKPOINT_TIME = Metric(
    "luthier_checkpoint_last_success_timestamp_seconds", "When the newest verified checkpoint was written"
)
CHECKPOINT_SECONDS = Metric("luthier_checkpoint_duration_seconds", "Time that the newest checkpoint took")
CHECKPOINTS_BROKEN = Metric(
    "luthier_checkpoints_broken", "Checkpoints that lie set aside, because their files did not match their manifest"
)
HEARTBEAT_AGE = Metric(
    "luthier_heartbeat_age_seconds",
    "Time since the last step, batch of an evaluation, output or growing file of a checkpoint",
)
GENERATE_ROWS = Metric("luthier_generate_rows", "Outputs that lie in the workspace, those of earlier attempts included")
GENERATE_FAILED_ROWS = Metric("luthier_generate_failed_rows", "Of these outputs, those that are the record of an error")
GENERATE_UNSAFE_ROWS = Metric(
    "luthier_generate_unsafe_rows",
    "Of these outputs, images that image.safety has found unsafe; only with image.safety",
)
GENERATE_MAX_ROWS = Metric("luthier_generate_max_rows", "Outputs that this shard has to write")
GENERATE_ROWS_PER_SECOND = Metric("luthier_generate_rows_per_second", "Outputs a second in this attempt")
GENERATE_SCORED_ROWS = Metric(
    "luthier_generate_scored_rows",
    "Outputs of this shard that were compared with a reference; only where rows have one",
)
GENERATE_SCORE = Metric(
    "luthier_generate_score", "Metrics of these outputs, by their names in the status of the job", labels=("metric",)
)

# A pod may serve anything. The sum over 4096 shards must stay a whole number in JSON and for the API server (2**53).
LARGEST_COUNT = 2.0**41

POD_METRICS: tuple[Metric, ...] = (
    TRAIN_STEP,
    TRAIN_MAX_STEPS,
    TRAIN_EPOCH,
    TRAIN_LOSS,
    EVAL_LOSS,
    TRAIN_LEARNING_RATE,
    TRAIN_GRAD_NORM,
    TRAIN_TOKENS,
    TRAIN_PADDING,
    TRAIN_TOKENS_PER_SECOND,
    TRAIN_SAMPLES,
    TRAIN_SAMPLES_PER_SECOND,
    TRAIN_MFU,
    MEMORY_ALLOCATED,
    MEMORY_RESERVED,
    MEMORY_PEAK,
    MEMORY_PEAK_RESERVED,
    MEMORY_PLANNED,
    PLAN_SECONDS_RATIO,
    PLAN_MEMORY_RATIO,
    TRAIN_GPU_HOURS,
    TRAIN_STEP_SECONDS,
    TRAIN_NONFINITE,
    TRAIN_ETA_SECONDS,
    CHECKPOINT_STEP,
    CHECKPOINT_TIME,
    CHECKPOINT_SECONDS,
    CHECKPOINTS_BROKEN,
    HEARTBEAT_AGE,
    GENERATE_ROWS,
    GENERATE_FAILED_ROWS,
    GENERATE_UNSAFE_ROWS,
    GENERATE_MAX_ROWS,
    GENERATE_ROWS_PER_SECOND,
    GENERATE_SCORED_ROWS,
    GENERATE_SCORE,
)


# No part of the progress is read from metrics with labels, which histograms have, too.
READ_NAMES = frozenset(metric.name for metric in POD_METRICS if metric.type != "histogram" and not metric.labels)


def read_samples(text: str) -> dict[str, float]:
    """Name → finite value of the samples of POD_METRICS in a Prometheus text.

    Only their lines are parsed: a pod may serve anything, and a general parser takes 30 times as long.
    """
    found: dict[str, float] = {}
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        if name in READ_NAMES:
            with contextlib.suppress(ValueError):
                found[name] = float(value.partition(" ")[0])  # a timestamp may follow
    return finite(found)


def training_progress(pods: list[dict[str, float]], now: datetime | None = None) -> Progress | None:
    """Progress of a training from the first pod that reports it. None when none does yet."""
    training = next((p for p in pods if count(p, TRAIN_MAX_STEPS)), None)
    if training is None:
        return None
    step, most = count(training, TRAIN_STEP), count(training, TRAIN_MAX_STEPS)
    return Progress(
        step=step,
        max_steps=most,
        percent=100 * step // most,
        epoch=figure(training.get(TRAIN_EPOCH.name)),
        loss=figure(training.get(TRAIN_LOSS.name)),
        learning_rate=figure(training.get(TRAIN_LEARNING_RATE.name)),
        tokens_per_second=figure(training.get(TRAIN_TOKENS_PER_SECOND.name)),
        rows_per_second=figure(training.get(TRAIN_SAMPLES_PER_SECOND.name)),
        eta_seconds=_whole(training.get(TRAIN_ETA_SECONDS.name)),
        gpu_hours=figure(training.get(TRAIN_GPU_HOURS.name)),
        plan_seconds_ratio=figure(training.get(PLAN_SECONDS_RATIO.name)),
        plan_memory_ratio=figure(training.get(PLAN_MEMORY_RATIO.name)),
        time=_time_text(now),
    )


def generation_progress(
    pods: list[dict[str, float]], now: datetime | None = None, outputs: int | None = None
) -> Progress | None:
    """Progress of a generation, summed over its shards. None when no shard reports it yet.

    `outputs`: those of the whole job. Without it, the outputs of the shards that report are taken for all.
    """
    shards = [p for p in pods if count(p, GENERATE_MAX_ROWS)]
    if not shards:
        return None
    rows, most = (sum(count(p, metric) for p in shards) for metric in (GENERATE_ROWS, GENERATE_MAX_ROWS))
    most = outputs or most
    pace = sum(p.get(GENERATE_ROWS_PER_SECOND.name, 0) for p in shards)
    return Progress(
        rows=rows,
        max_rows=most,
        failed_rows=sum(count(p, GENERATE_FAILED_ROWS) for p in shards),
        rows_per_second=figure(pace) if pace else None,  # of shards that have ended nothing is measured any more
        percent=100 * rows // most,
        eta_seconds=_whole((most - rows) / pace if pace else None),
        time=_time_text(now),
    )


def samples_at_end(metrics: dict[str, float] | None) -> dict[str, float]:
    """Metrics of a shard that has ended with these final metrics: its outputs still count, its rate does not."""
    found = metrics or {}
    rows = found.get("rows")
    if not rows:
        return {}
    return {
        GENERATE_ROWS.name: rows,
        GENERATE_MAX_ROWS.name: rows,
        GENERATE_FAILED_ROWS.name: found.get("failedRows", 0),
    }


def checkpoint_step(samples: dict[str, float]) -> int | None:
    """Step of the newest verified checkpoint, 0 if there is none; None if the pod does not report it yet."""
    return _whole(samples.get(CHECKPOINT_STEP.name))


def broken_checkpoints(samples: dict[str, float]) -> int | None:
    """Number of checkpoints that were set aside; None if the pod does not report it yet."""
    return _whole(samples.get(CHECKPOINTS_BROKEN.name))


def figure(value: float | None) -> float | None:
    """Four significant digits, so that a status does not change because of rounding."""
    return None if value is None else float(f"{value:.4g}")


def count(samples: dict[str, float], metric: Metric) -> int:
    return _whole(samples.get(metric.name)) or 0


def _time_text(time: datetime | None) -> str:
    return (time or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole(value: float | None) -> int | None:
    return round(value) if value is not None and abs(value) < LARGEST_COUNT else None
