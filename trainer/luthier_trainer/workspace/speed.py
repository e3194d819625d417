"""How long a step of a layout takes, about: to compare layouts, and to tell users of hours before they buy them.

A sum of three terms, none of which hides behind another one: computing, exchanging between processes, and moving what
is offloaded. What a pass multiplies, reads and writes comes from the step on the meta device (`models.memory`); the
constants are rough, and the same for all GPUs. Where a job has run, its own speed says more. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier_api.run import Compute, Gpu, StepMemory, Weights
from luthier_api.status import Plan
from luthier_trainer.distributed.strategy import FSDP, ZERO_STAGE
from luthier_trainer.workspace import flops

MULTIPLYING = 0.8
"""Share of the dense 16-bit peak that large products reach: 798 of 989 TFLOP/s measured on an H100."""
MOVING = 0.6
"""Share of the bandwidth of its memory with which all that operations read and write is moved.

Fitted to one H200: LoRA of 1 billion weights, LoRA and QLoRA of 8 billion then take 0.94, 1.05 and 1.00 times the
measured time of a step (docs/benchmarks.md).
"""
LAUNCH_SECONDS = 8e-6
"""That Python and torch take to start an operation; a GPU that is faster waits for them."""
FLOPS_A_BYTE = 250
"""Operations of the peak for each byte of the bandwidth, where it is not given: 156 (A100) to 420 (L40S)."""
UTILIZATION = 0.38
"""Share of the peak that a step reaches of which nothing but its products is known: measured 0.34 and 0.37 on an H200
for 8 billion weights. Published: 38 to 69 % on A100, 35 to 60 % on H100, by the formula of `flops`.
"""
HALF_SPEED_TOKENS = 512  # of a forward pass, with which a GPU computes half as fast as with very many; then, too
HALF_SPEED_ROWS = 1  # the same for images
NOMINAL_FLOPS = 300e12  # to compare layouts on a GPU whose speed is not known
NODE_BYTES_PER_SECOND = 100e9  # between GPUs of a node: PCIe 5 has 64e9, NVLink of A100 300e9, of H100 450e9
NETWORK_BYTES_PER_SECOND = 20e9  # a GPU's share between nodes: 200 Gbit/s
HOST_BYTES_PER_SECOND = 15e9  # between a GPU and the memory of its node
CPU_ADAM_BYTES_PER_SECOND = 10e9  # that DeepSpeed's AdamW on the CPU reads and writes, for each process
ADAM_BYTES = 28  # of a weight in fp32, its gradient and two moments: read, and but for the gradient written
BLOCK_TENSORS = 9  # of a block of a Llama
GATHER_SECONDS = 30e-6  # to start one exchange between processes
FP32, HALF = 4, 2


@dataclass(frozen=True)
class Work:
    """What a step computes."""

    compute: Compute
    weights: Weights
    step: StepMemory | None = None
    """What it moves; None: not known."""


def pass_seconds(work: Work, recomputed: bool, rows: int, gpu: Gpu) -> float:
    """Return the seconds of a forward and backward pass over `rows` rows.

    Products and single-element operations take turns on the GPU. Where both are over before Python has started the next
    operation, the GPU waits for it.
    """
    peak = gpu.peak_flops or NOMINAL_FLOPS
    compute, step = work.compute, work.step
    operations = rows * compute.units_a_row * flops.per_unit(compute, recomputed).hardware
    if step is None:
        half, units = (
            (HALF_SPEED_TOKENS, rows * compute.units_a_row) if compute.unit == "token" else (HALF_SPEED_ROWS, rows)
        )
        return operations / (peak * UTILIZATION * units / (units + half))
    moved = step.moved_fixed + rows * step.moved_per_row
    busy = operations / (peak * MULTIPLYING) + moved / ((gpu.bandwidth or peak / FLOPS_A_BYTE) * MOVING)
    return max(busy, step.kernels * LAUNCH_SECONDS)


def step_seconds(plan: Plan, nodes: int, work: Work, gpu: Gpu) -> float:
    """Return the seconds of an optimiser step in the layout of `plan`, over `nodes` nodes.

    Without the speed of `gpu`, they compare layouts, but say nothing of real time.
    """
    passes = plan.accumulation_steps or 1
    computing = passes * pass_seconds(work, bool(plan.gradient_checkpointing), plan.micro_batch_size or 1, gpu)
    return computing + exchange_seconds(plan, nodes, work.weights) + offload_seconds(plan, work.weights)


def exchange_seconds(plan: Plan, nodes: int, weights: Weights) -> float:
    """Return the seconds that a step exchanges gradients and weights between processes.

    A ring moves (n-1)/n of the bytes to each process, and summing takes twice as much as gathering or spreading. DDP
    and ZeRO-1 sum once a step, ZeRO-2 spreads gradients in each pass, and ZeRO-3 gathers all weights in each pass:
    forward, backward, and once more to recompute. FSDP exchanges the weights of a block at once, and recomputes with
    those that it has gathered for the backward pass; its gradients are in fp32.
    """
    if plan.world_size == 1:
        return 0.0
    passes, stage = plan.accumulation_steps or 1, ZERO_STAGE.get(plan.strategy, 0)
    learning = weights.learning * (HALF if stage else FP32)
    if plan.strategy == FSDP:
        moved = float(passes * (2 * weights.total * HALF + learning))
        exchanges = passes * 3 * max(weights.tensors // BLOCK_TENSORS, 1)
    elif stage < 2:
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
