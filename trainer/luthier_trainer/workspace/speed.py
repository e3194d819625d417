"""How long a step of a layout takes, about: to compare layouts, and to tell users of hours before they buy them.

A sum of four terms, none of which hides behind another one: computing, exchanging between processes, moving what is
offloaded, and starting kernels. The constants are rough, and the same for all GPUs; where a job has run, its own speed
says more. Imports no torch.
"""

from __future__ import annotations

import math

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute, Weights
from luthier_api.status import Plan
from luthier_trainer.distributed.strategy import ZERO_STAGE
from luthier_trainer.workspace import flops

UTILIZATION = 0.38
"""Share of the dense 16-bit peak that large forward passes reach, recomputed activations included.

Measured on an H200: 0.36 and 0.39 for LoRA and QLoRA of 8 billion weights; small models reach less.
Published: 38 to 69 % on A100, 35 to 60 % on H100, by the formula of `flops`.
"""
HALF_SPEED_TOKENS = 512  # of a forward pass, with which a GPU computes half as fast as with very many
HALF_SPEED_ROWS = 1  # the same for images
NOMINAL_FLOPS = 300e12  # to compare layouts on a GPU whose speed is not known
NODE_BYTES_PER_SECOND = 100e9  # between GPUs of a node: PCIe 5 has 64e9, NVLink of A100 300e9, of H100 450e9
NETWORK_BYTES_PER_SECOND = 20e9  # a GPU's share between nodes: 200 Gbit/s
HOST_BYTES_PER_SECOND = 15e9  # between a GPU and the memory of its node
CPU_ADAM_BYTES_PER_SECOND = 10e9  # that DeepSpeed's AdamW on the CPU reads and writes, for each process
ADAM_BYTES = 28  # of a weight in fp32, its gradient and two moments: read, and but for the gradient written
GATHER_SECONDS = 30e-6  # to start one exchange between processes
FP32, HALF = 4, 2
SECONDS_AN_HOUR = 3600


def row_seconds(compute: Compute, recomputed: bool, rows: int, peak_flops: float) -> float:
    """Return the seconds that a GPU computes for one row, of `rows` in a forward pass."""
    operations = flops.per_unit(compute, recomputed).hardware * compute.units_a_row
    half, units = (
        (HALF_SPEED_TOKENS, rows * compute.units_a_row) if compute.unit == "token" else (HALF_SPEED_ROWS, rows)
    )
    full = units / (units + half)
    return operations / (peak_flops * UTILIZATION * full)


def step_seconds(plan: Plan, nodes: int, compute: Compute, weights: Weights, peak_flops: float | None) -> float:
    """Return the seconds of an optimiser step in the layout of `plan`, over `nodes` nodes.

    `peak_flops`: dense 16-bit operations per second of a GPU; None compares layouts, but says nothing of real time.
    """
    passes = plan.accumulation_steps or 1
    rows = plan.micro_batch_size or 1
    computing = (
        passes * rows * row_seconds(compute, bool(plan.gradient_checkpointing), rows, peak_flops or NOMINAL_FLOPS)
    )
    return computing + exchange_seconds(plan, nodes, weights) + offload_seconds(plan, weights)


def exchange_seconds(plan: Plan, nodes: int, weights: Weights) -> float:
    """Return the seconds that a step exchanges gradients and weights between processes.

    A ring moves (n-1)/n of the bytes to each process, and summing takes twice as much as gathering or spreading. DDP
    and ZeRO-1 sum once a step, ZeRO-2 spreads gradients in each pass, and ZeRO-3 gathers all weights in each pass:
    forward, backward, and once more to recompute.
    """
    if plan.world_size == 1:
        return 0.0
    passes, stage = plan.accumulation_steps or 1, ZERO_STAGE.get(plan.strategy, 0)
    learning = weights.learning * (HALF if stage else FP32)
    if stage < 2:
        moved, exchanges = 2.0 * learning, 2
    elif stage == 2:
        moved, exchanges = float(learning * (passes + 1)), passes + 1
    else:
        gathers = 3 if plan.gradient_checkpointing else 2
        moved = passes * (gathers * weights.total * HALF + learning)
        exchanges = passes * gathers * max(weights.tensors, 1)
    speed = NETWORK_BYTES_PER_SECOND if nodes > 1 else NODE_BYTES_PER_SECOND
    return moved * (plan.world_size - 1) / plan.world_size / speed + exchanges * GATHER_SECONDS


def offload_seconds(plan: Plan, weights: Weights) -> float:
    """Return the seconds in which a step moves gradients and weights to the node's memory, and updates them there."""
    if "offload" not in plan.strategy:
        return 0.0
    own = weights.learning / plan.world_size
    updating = own * ADAM_BYTES / CPU_ADAM_BYTES_PER_SECOND + own * 2 * HALF / HOST_BYTES_PER_SECOND
    if ZERO_STAGE[plan.strategy] < 3:
        return updating
    gathers = (plan.accumulation_steps or 1) * (3 if plan.gradient_checkpointing else 2)
    return updating + gathers * weights.total / plan.world_size * HALF / HOST_BYTES_PER_SECOND


def estimated(
    spec: FineTuneJobSpec, plan: Plan, compute: Compute | None, weights: Weights, peak_flops: float | None
) -> Plan:
    """Return `plan` with what all its steps come to: tokens, operations, and the time where the GPU's speed is known.

    Evaluations and saves are not in it, nor what grpo takes to write completions.
    """
    figures: dict[str, float | int | None] = {"trainable_parameters": weights.learning}
    if compute is not None and plan.steps:
        units = plan.steps * spec.training.batch_size * compute.units_a_row
        figures["flops"] = units * flops.per_unit(compute, recomputed=False).model
        if compute.unit == "token":
            figures["tokens"] = round(units)
        if peak_flops is not None and spec.grpo is None:
            seconds = plan.steps * step_seconds(plan, spec.resources.nodes, compute, weights, peak_flops)
            figures["seconds"] = math.ceil(seconds)
            figures["gpu_hours"] = round(seconds * plan.world_size / SECONDS_AN_HOUR, 2)
    return plan.model_copy(update=figures)
