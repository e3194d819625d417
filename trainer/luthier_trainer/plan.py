"""How a run is laid out: strategy, batches, steps. What the user set stays; the rest is decided here, once, and shown in the status.

`train` takes these figures as they are, so that status, log and arithmetic agree.
"""

from __future__ import annotations

import math

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import Plan

# Rows of one forward pass where nobody set it: small enough for 7B models at 2,048 tokens with adapters, large enough to fill the GPU.
MICRO_BATCH_LIMIT = 8


def plan_training(spec: FineTuneJobSpec, rows: int, parameters: int | None) -> Plan:
    """The layout of a FineTuneJob over `rows` training rows. The CRD's rules have checked that batchSize divides."""
    world_size, training = spec.resources.world_size, spec.training
    share = training.batch_size // world_size
    micro = training.micro_batch_size or largest_divisor(share, MICRO_BATCH_LIMIT)
    accumulation = share // micro
    strategy = spec.strategy
    return Plan(
        strategy=strategy if strategy != "auto" else ("ddp" if world_size > 1 else "none"),
        world_size=world_size,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        steps=training.max_steps or count_steps(rows, world_size, micro, accumulation, training.epochs),
        precision=plan_precision(training.precision, spec.resources.gpus_per_node),
        parameters=parameters,
    )


def plan_generation(rows: int, shards: int, precision: str, gpus: int, parameters: int | None) -> Plan:
    """The layout of a GenerateJob: row r belongs to shard r modulo `shards`."""
    return Plan(
        strategy="none", world_size=1, precision=plan_precision(precision, gpus), parameters=parameters, rows_per_shard=math.ceil(rows / shards)
    )


def plan_precision(asked: str, gpus: int) -> str:
    """fp32 on CPU unless set. `prepare` has no GPU to look at, so on GPUs `auto` stays: bf16 where the GPU has it, decided by the run."""
    return "fp32" if asked == "auto" and gpus == 0 else asked


def count_steps(rows: int, world_size: int, micro_batch: int, accumulation: int, epochs: float) -> int:
    """Optimiser steps as transformers' Trainer counts them: the last, smaller batch of an epoch is a step too."""
    batches = math.ceil(math.ceil(rows / micro_batch) / world_size)
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
