"""How a run is laid out: strategy, batches, steps. What the user set stays; the rest is decided here, once, and shown
in the status.

`train` takes these figures as they are, so that status, log and arithmetic agree.
"""

from __future__ import annotations

import math

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.generate import GenerateJobSpec
from luthier_api.run import Attention, Weights
from luthier_api.status import Plan
from luthier_api.tasks import TRAINING_TASKS
from luthier_trainer.workspace import attention as attentions
from luthier_trainer.workspace import space

MICRO_BATCH_LIMIT = 8  # rows of one forward pass, where the spec leaves it open
# Tokens of one forward pass of a language model on a GPU, likewise. Where a loss holds all logits, a token costs 12
# bytes for each entry of the vocabulary: log-probabilities and two gradients in fp32 (counted with torch 2.13 and
# transformers 5.23). For 2,048 tokens and Qwen2.5's 152,064 entries that is 3.5 GiB.
GPU_TOKENS = 2048
# Pixels of one forward pass of Stable Diffusion XL. Its VAE, in fp32, holds a few tensors of 128 channels at once: half
# a gigabyte each for an image of 1024 × 1024 pixels.
GPU_PIXELS = 2 * 1024**2
CHECKPOINTING = "spec.training.gradientCheckpointing"


def plan_training(
    spec: FineTuneJobSpec,
    rows: int,
    parameters: int | None,
    cannot_recompute: str | None = None,
    whole_logits: str | None = None,
    attention: Attention | None = None,
) -> Plan:
    """The layout of a FineTuneJob over `rows` training rows. The CRD's rules have checked that batchSize divides.

    `cannot_recompute`: why the model cannot recompute its activations, if so. `whole_logits`: why its loss holds the
    logits of all tokens, if so.
    """
    world_size, training = spec.resources.world_size, spec.training
    share = training.batch_size // world_size
    micro, reasons = micro_batch(spec, share)
    accumulation = share // micro
    recompute, why = recomputes(spec, cannot_recompute)
    computed, reasons_of_attention = attentions.planned(spec, attention)
    automatic = "ddp" if world_size > 1 else "none"
    return Plan(
        strategy=automatic if spec.strategy == "auto" else spec.strategy,
        world_size=world_size,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        steps=training.max_steps or count_steps(rows, world_size, micro, accumulation, training.epochs),
        precision=plan_precision(training.precision, spec.resources.gpus_per_node),
        gradient_checkpointing=recompute,
        attention=computed,
        reasons=reasons
        + why
        + reasons_of_attention
        + ([f"loss: with the logits of all tokens, because {whole_logits}"] if whole_logits else []),
        parameters=parameters,
    )


def micro_batch(spec: FineTuneJobSpec, share: int) -> tuple[int, list[str]]:
    """(rows of one forward pass, why) of a process that sees `share` rows in a step. The plan does not know the GPU's
    memory.

    Classifiers have no logits over a vocabulary, and some of their models normalise over the rows of a forward pass:
    their rows have no sequences in the table of tasks.
    """
    training = spec.training
    if training.micro_batch_size:
        return training.micro_batch_size, []
    if spec.has_buckets:
        return 1, [
            "microBatchSize: 1, because images of several sizes share no forward pass. With more, a step takes less"
            " time, and steps with the last images of a size have fewer than batchSize"
        ]
    if TRAINING_TASKS[spec.task].compares_rows:
        return share, [f"microBatchSize: {share}, all rows of a step, because each of them is compared with the others"]
    rows = largest_divisor(share, MICRO_BATCH_LIMIT)
    most, what = rows_for_a_gpu(spec)
    if not spec.resources.gpus_per_node or most is None:
        return rows, []
    fewer = largest_divisor(share, min(max(most, 1), MICRO_BATCH_LIMIT))
    why = f"microBatchSize: {fewer}, because {what} are large for a GPU. Set it higher if yours has memory left"
    return fewer, [why] if fewer < rows else []


def rows_for_a_gpu(spec: FineTuneJobSpec) -> tuple[int | None, str]:
    """(rows of one forward pass that most GPUs have memory for, what a row is); None where that is not limited."""
    sequences = TRAINING_TASKS[spec.task].sequences
    if sequences:
        length = spec.training.max_length
        return GPU_TOKENS // (length * sequences), f"rows of {length} tokens"
    if spec.image is not None:
        side, images = spec.image.resolution, 1 if spec.dataset.columns.prior is None else 2
        what = "images" if images == 1 else "pairs of images"
        return GPU_PIXELS // (images * side**2), f"{what} of {side} × {side} pixels"
    return None, ""


def recomputes(spec: FineTuneJobSpec, cannot: str | None) -> tuple[bool, list[str]]:
    """(whether activations are recomputed, why), from the spec or, where it leaves that open, the devices and the
    model.
    """
    asked = spec.training.gradient_checkpointing
    if asked is not None:
        return asked, []
    if not spec.resources.gpus_per_node:
        return False, []
    if cannot:
        return False, [f"gradientCheckpointing: false, because {cannot}"]
    return True, [
        "gradientCheckpointing: true, the default on GPUs. Set it to false if yours have memory left: a step takes"
        " about a quarter less time"
    ]


def plan_space(plan: Plan, weights: Weights, processor_bytes: int, data_bytes: int | None = None) -> Plan:
    """With what rows, checkpoints and the result take of the workspace, how long a save takes, and whether the result
    depends on the micro-batch. `processor_bytes`: of the tokenizer's files. `data_bytes`: of the prepared rows.
    """
    size = space.checkpoint_bytes(weights, plan.strategy, plan.world_size, processor_bytes)
    saving = space.save_seconds(size, plan.world_size)
    return plan.model_copy(
        update={
            "data_bytes": data_bytes,
            "checkpoint_bytes": size,
            "result_bytes": space.result_bytes(weights, plan.strategy, processor_bytes),
            "save_seconds": saving,
            "grace_seconds": space.grace_seconds(saving),
            "normalizes_over_batch": weights.normalizes_over_batch or None,
        }
    )


def smallest_batch(spec: FineTuneJobSpec, rows: int) -> int:
    """Return the number of rows of the smallest micro-batch of an epoch.

    Several processes fill up their last micro-batches; a single process does not.
    """
    plan = plan_training(spec, rows, None)
    micro = plan.micro_batch_size or 1
    reached = (plan.steps or 0) * spec.training.batch_size >= rows
    return rows % micro or micro if plan.world_size == 1 and reached else micro


def plan_generation(
    spec: GenerateJobSpec, outputs: int, data_bytes: int, result_bytes: int, parameters: int | None
) -> Plan:
    """The layout of a GenerateJob: each shard has consecutive outputs, and their numbers differ by one at most.

    `data_bytes`: of the prepared rows. `result_bytes`: that the outputs take at most.
    """
    return Plan(
        strategy="none",
        world_size=1,
        precision=plan_precision(spec.precision, spec.resources.gpus),
        parameters=parameters,
        rows_per_shard=math.ceil(outputs / spec.shards),
        data_bytes=data_bytes,
        result_bytes=result_bytes,
    )


def plan_precision(asked: str, gpus: int) -> str:
    """fp32 on CPU unless set. `prepare` has no GPU to look at, so on GPUs `auto` stays: bf16 where the GPU has it,
    decided by the run.
    """
    return "fp32" if asked == "auto" and gpus == 0 else asked


def count_steps(rows: int, world_size: int, micro_batch: int, accumulation: int, epochs: float) -> int:
    """Optimiser steps as transformers' Trainer counts them: the last, smaller batch of an epoch is a step too."""
    batches = math.ceil(math.ceil(rows / micro_batch) / world_size)
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
