"""What a training needs of each GPU, and of the memory of a node: one function a term, in bytes. Imports no torch.

The terms follow from facts of the model (`models.memory`), so that any layout is planned without the model.
docs/memory.md explains one plan term by term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from luthier_api.attention import ATTENTIONS
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import METHODS, QUANTIZATIONS
from luthier_api.optimizers import OptimizerName
from luthier_api.run import MemoryFacts, Moment, StepMemory, Weights
from luthier_api.status import Memory, Plan
from luthier_api.tasks import TASKS
from luthier_trainer.distributed.strategy import FSDP, ZERO_STAGE, bucket, within_node

FP32, HALF = 4, 2
MIB, GIB = 1 << 20, 1 << 30
CONTEXT_BYTES = 1 * GIB  # CUDA's context and its libraries; 0.5 to 1.4 GiB seen
NCCL_BYTES = GIB // 2  # NCCL's buffers of a process; 0.2 to 1 GiB seen
WORKSPACE_BYTES = 64 * MIB  # cuBLAS takes 32 MiB on Hopper for each thread that computes: forward, and backward
FRAGMENTS = 0.15  # of what each step allocates anew: 1.11 times with a fused loss to 1.25 times seen
MAX_LIVE = 1_000_000_000  # weights that ZeRO-3 keeps gathered (stage3_max_live_parameters)
PROCESS_BYTES = {"gpu": 5 * GIB // 2, "cpu": GIB * 6 // 10}  # of Python, torch and, for GPUs, CUDA's part
LOADER_BYTES = 3 * GIB // 10  # of a process that loads data
LOADERS = 2
FILE_BYTES = 5_000_000_000  # of a file of weights that is written, unless one layer has more
READ_AT_ONCE = 2  # of the largest parts, which transformers' threads may hold at the same time

STEP_BYTES: Mapping[OptimizerName, Callable[[MemoryFacts], int]] = {
    "adamw_torch_fused": lambda facts: 0,  # the kernel reads and writes in place
    "adamw_8bit": lambda facts: 0,
    "paged_adamw_8bit": lambda facts: 0,
    "lion_32bit": lambda facts: 0,
    "lion_8bit": lambda facts: 0,
    "adafactor": lambda facts: 3 * FP32 * facts.largest_learning,  # update, its square, and their product
    "muon": lambda facts: 4 * HALF * facts.largest_learning,  # iterates of Newton and Schulz in bf16
    "schedule_free_adamw": lambda facts: 2 * FP32 * facts.learning,  # foreach: for all weights at once
}
"""What a step of each optimiser allocates beside its state."""


def peak(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> Memory:
    """Return what the training needs in the layout of `plan`: what is always there, and the most of what is not."""
    partial = True if facts.missing else None
    on_node = host(spec, plan, facts)
    if not spec.resources.gpus_per_node:
        return Memory(host_bytes=on_node, partial=partial)
    own = {
        "unpacked layer": facts.unpacked_bytes,
        "workspace": WORKSPACE_BYTES,
        "context": CONTEXT_BYTES + (NCCL_BYTES if plan.world_size > 1 else 0),
    }
    terms = {name: size for name, size in (always(spec, plan, facts) | own | most(spec, plan, facts)).items() if size}
    return Memory(gpu=terms, gpu_bytes=sum(terms.values()), host_bytes=on_node, partial=partial)


def always(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> dict[str, int]:
    """Return what is in memory for the whole training, by its names."""
    return {
        "weights": weights(spec, plan, facts),
        "reference model": facts.reference_bytes,
        "other models": facts.beside_bytes,
        "master weights": master_weights(plan, facts),
        "optimizer": optimizer_state(plan, facts),
        "gathered weights": gathered(plan, facts),
        "copy within a node": copy_within_node(spec, plan, facts),
        "communication": communication(plan, facts),
    }


def most(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> dict[str, int]:
    """Return what is in memory besides when it is fullest, by its names: in a forward and backward pass, in the step of
    the optimiser, while the model writes what it learns from, or in an evaluation.
    """
    highest = moment(plan, facts)
    all_gradients = gradients(plan, facts, None)
    update = 0 if "offload" in plan.strategy else STEP_BYTES[spec.training.optimizer](facts)
    between_steps = all_gradients if plan.strategy == "ddp" else 0
    phases = [
        {"gradients": gradients(plan, facts, highest), "activations": at(highest, rows_of(plan))},
        {"gradients": all_gradients, "update": update},
        {"gradients": between_steps, "completions": line(facts.writing, written_rows(spec, plan))},
        {"gradients": between_steps, "evaluation": line(facts.evaluating, evaluated_rows(spec, plan))},
    ]
    fullest = max(phases, key=lambda phase: sum(phase.values()))
    fullest["fragments"] = math.ceil(FRAGMENTS * sum(size for name, size in fullest.items() if name != "gradients"))
    return fullest


def at(moment: Moment | None, rows: int) -> int:
    """Return the bytes of a moment, without gradients, for the rows of a forward pass; 0 if none is known."""
    return max(moment.fixed + moment.per_row * rows, 0) if moment else 0


def line(moments: Sequence[Moment], rows: int) -> int:
    """Return the most bytes of several moments; 0 if there is none."""
    return max((at(moment, rows) for moment in moments), default=0)


def written_rows(spec: FineTuneJobSpec, plan: Plan) -> int:
    """Return the completions that a process writes at once: those of a whole step, or of an evaluation."""
    return max(rows_of(plan) * (plan.accumulation_steps or 1), evaluated_rows(spec, plan))


def evaluated_rows(spec: FineTuneJobSpec, plan: Plan) -> int:
    """Return the rows of a forward pass of an evaluation: whole groups of completions, where there are such."""
    if spec.grpo is None:
        return rows_of(plan)
    return max(rows_of(plan) // spec.grpo.generations, 1) * spec.grpo.generations


def tensors(memory: Memory) -> int:
    """Return the bytes of a GPU that torch reports as allocated: without CUDA's context and fragments."""
    return memory.gpu_bytes - memory.gpu.get("context", 0) - memory.gpu.get("fragments", 0)


def rows_of(plan: Plan) -> int:
    return plan.micro_batch_size or 1


def shares(plan: Plan) -> int:
    """Return the number of processes that share what ZeRO and FSDP spread."""
    return plan.world_size if plan.strategy == FSDP or plan.strategy in ZERO_STAGE else 1


def weights(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of the weights at rest.

    As loaded: frozen ones in the type of the computation or quantised, those that learn in fp32. DeepSpeed has all in
    the type of the computation; ZeRO-3 spreads them over the processes, and may keep them in the node's memory. With
    several nodes, the processes of each share a second copy (`distributed.strategy.within_node`). FSDP spreads them as
    they were loaded.
    """
    if plan.strategy == FSDP:
        adapter = METHODS[spec.method.type].adapter
        return math.ceil((facts.weight_bytes if adapter else facts.total * facts.rest_bytes) / shares(plan))
    stage = ZERO_STAGE.get(plan.strategy)
    if stage is None or facts.quantised:
        return facts.weight_bytes
    whole = facts.total * facts.computed_bytes
    if stage != 3:
        return whole
    if "offload" in plan.strategy:
        return 0
    near = within_node(plan.strategy, spec.resources.nodes, spec.resources.processes)
    return math.ceil(whole / shares(plan)) + (math.ceil(whole / near) if near > 1 else 0)


def master_weights(plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of DeepSpeed's copy in fp32 of the weights that learn: 4 for each, spread over the processes."""
    if plan.strategy not in ZERO_STAGE or "offload" in plan.strategy:
        return 0
    return math.ceil(facts.learning * FP32 / shares(plan))


def optimizer_state(plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of the optimiser's state (`workspace.optimizer_state`); with offload it is on the node."""
    return 0 if "offload" in plan.strategy else math.ceil(facts.state_bytes / shares(plan))


def gradients(plan: Plan, facts: MemoryFacts, at: Moment | None) -> int:
    """Return the bytes of gradients at a moment; None: when the optimiser steps.

    The first backward pass of a step makes them one by one. With accumulation they are there in the next passes, from
    the beginning; with DDP always, as views of what it sends. From ZeRO-2 on, each is moved to the process that it
    belongs to. FSDP adds them to shards in fp32 (`FSDPParamGroup.post_backward` of torch 2.13); until then those of two
    blocks, and those outside of blocks, are whole, in the type of what is gathered.
    """
    if plan.strategy == FSDP:
        own = math.ceil(facts.learning * FP32 / shares(plan))
        size = facts.computed_bytes if facts.rest_bytes == FP32 else FP32
        return own if at is None else own + min(facts.learning, gathered_at_once(facts)) * size
    if plan.strategy in ZERO_STAGE:
        if "offload" in plan.strategy:
            return 0
        owners = shares(plan) if ZERO_STAGE[plan.strategy] > 1 else 1
        return math.ceil(facts.learning * facts.computed_bytes / owners)
    if at is None or always_there(plan):
        return facts.gradient_bytes
    return at.gradients


def gathered(plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of weights that ZeRO-3 has gathered: what it keeps for later use, and the part that is next.

    With offload, its own share of that part comes from the node's memory first. FSDP has those outside of blocks, the
    block that computes, and the next one (`FSDPParamGroup._backward_prefetch` of torch 2.13).
    """
    if plan.strategy == FSDP:
        return gathered_at_once(facts) * facts.computed_bytes
    if ZERO_STAGE.get(plan.strategy) != 3:
        return 0
    copied = math.ceil(facts.largest_unit / plan.world_size) if "offload" in plan.strategy else 0
    return (min(facts.total, MAX_LIVE + facts.largest_unit) + copied) * facts.computed_bytes


def gathered_at_once(facts: MemoryFacts) -> int:
    """Return the number of weights that FSDP has gathered at the same time."""
    return min(facts.outside_blocks + 2 * facts.largest_block, facts.total)


def copy_within_node(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of the second copy of all weights that ZeRO-3 over several nodes divides within each (hpZ)."""
    processes = within_node(plan.strategy, spec.resources.nodes, spec.resources.processes)
    return math.ceil(facts.total * facts.computed_bytes / processes) if processes > 1 else 0


def communication(plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of buffers for exchanging gradients.

    DDP's buckets are the gradients themselves. DeepSpeed has buckets of one size, however few weights learn: two where
    one fills while the other is sent, and one with ZeRO-3 (`runtime/zero/stage_1_and_2.py`, `stage3.py` of 0.19). FSDP
    gathers a unit into one buffer before it is copied to its weights, and joins the gradients of one in fp32
    (`foreach_all_gather`, `foreach_reduce` of torch 2.13).
    """
    if plan.strategy == FSDP:
        unit = max(facts.largest_block, facts.outside_blocks)
        return unit * facts.computed_bytes + min(unit, facts.learning) * FP32
    if plan.strategy in ZERO_STAGE:
        return (1 if ZERO_STAGE[plan.strategy] == 3 else 2) * bucket(facts.total) * facts.computed_bytes
    return 0


def always_there(plan: Plan) -> bool:
    """Return whether gradients outlast a step's first backward pass, without DeepSpeed."""
    return plan.strategy == "ddp" or (plan.accumulation_steps or 1) > 1


def step_of(plan: Plan, facts: MemoryFacts) -> StepMemory | None:
    """Return the step that `plan` computes; None if the model's step could not be computed in `prepare`."""
    attention = ATTENTIONS.get(plan.attention)  # type: ignore[call-overload]  # None is no name of one
    masked = facts.packed and not (attention and attention.documents)
    padded = masked or (facts.mixed_lengths and rows_of(plan) > 1)
    fitting = [
        step
        for step in facts.steps
        if step.checkpointing == bool(plan.gradient_checkpointing) and step.rows <= rows_of(plan)
    ]
    fitting = [step for step in fitting if step.padded == padded] or fitting
    return max(fitting, key=lambda step: step.rows, default=None)


def moment(plan: Plan, facts: MemoryFacts) -> Moment | None:
    """Return the highest moment of a step; None if the model's step could not be computed in `prepare`.

    Moments come from a step on the meta device (`models.memory`). Each is a line over the rows of a forward pass, so
    the highest depends on the micro-batch, and on whether gradients are there from the beginning.
    """
    step = step_of(plan, facts)
    counted = plan.strategy not in (*ZERO_STAGE, FSDP) and not always_there(plan)
    return max(
        step.moments if step else (),
        key=lambda moment: moment.fixed + rows_of(plan) * moment.per_row + counted * moment.gradients,
        default=None,
    )


def host(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> int:
    """Return the bytes of a pod's own memory: of its processes, what they read or write, and what is offloaded.

    What is offloaded is there for the whole training: weights that learn and their gradients in fp32, Adam's two
    moments, and with ZeRO-3 all weights. On a CPU the training itself is there.
    """
    processes = spec.resources.processes
    cpu = not spec.resources.gpus_per_node
    if cpu:
        fullest = {name: size for name, size in most(spec, plan, facts).items() if name != "fragments"}
        return processes * (PROCESS_BYTES["cpu"] + sum(always(spec, plan, facts).values()) + sum(fullest.values()))
    offloaded = 0.0
    if "offload" in plan.strategy:
        offloaded = facts.learning * (FP32 + FP32 + 2 * FP32) / plan.world_size
        if ZERO_STAGE[plan.strategy] == 3:
            offloaded += facts.total * facts.computed_bytes / plan.world_size
    own = PROCESS_BYTES["gpu"] + LOADERS * LOADER_BYTES
    held = max(processes * reading(spec, facts), processes * offloaded + writing(spec, facts))
    return math.ceil(processes * own + held)


def reading(spec: FineTuneJobSpec, facts: MemoryFacts) -> int:
    """Return the bytes on the host that a process with a GPU holds while it loads the model.

    transformers reads files that are mapped to memory, tensor by tensor, straight to the GPU or to the shards of
    ZeRO-3. A model of diffusers is on the host as a whole before it is moved.
    """
    whole = facts.total * facts.rest_bytes
    if TASKS[spec.task].library == "diffusers" or not facts.largest_unit:
        return whole
    return min(whole, READ_AT_ONCE * facts.largest_unit * facts.rest_bytes)


def writing(spec: FineTuneJobSpec, facts: MemoryFacts) -> int:
    """Return the bytes that the process that saves holds: a file of weights, and once more in the form for the file.

    With adapters only what learns is saved.
    """
    if METHODS[spec.method.type].adapter:
        return facts.learning * FP32
    whole = facts.total * facts.rest_bytes
    return min(whole, 2 * max(FILE_BYTES, facts.largest_unit * facts.rest_bytes))


def without_model(spec: FineTuneJobSpec, weights: Weights, reason: str) -> MemoryFacts:
    """Return facts from the numbers of weights alone, for a task whose step is not computed in `prepare`."""
    adapter = METHODS[spec.method.type].adapter
    kind = spec.model.quantization.type if spec.model.quantization else None
    bits = QUANTIZATIONS[kind].bits if kind else 8 * weights.computed_bytes
    frozen = weights.total * bits // 8 if adapter else (weights.total - weights.learning) * weights.computed_bytes
    return MemoryFacts(
        **of_weights(spec, weights),
        weight_bytes=frozen + weights.learning * weights.learning_bytes,
        gradient_bytes=weights.learning * weights.learning_bytes,
        missing=reason,
    )


def of_weights(spec: FineTuneJobSpec, weights: Weights) -> dict[str, int | bool]:
    """Return the facts that follow from numbers of weights alone."""
    adapter = METHODS[spec.method.type].adapter
    # The reference model is a frozen copy where there is no adapter to switch off.
    compared = (spec.preference is not None and not spec.preference.precompute_reference) or (
        spec.grpo is not None and spec.grpo.beta > 0
    )
    return {
        "total": weights.total,
        "learning": weights.learning,
        "state_bytes": weights.state_bytes,
        "computed_bytes": weights.computed_bytes,
        "rest_bytes": weights.computed_bytes if adapter else weights.learning_bytes,
        "reference_bytes": weights.total * weights.computed_bytes if compared and not adapter else 0,
        "quantised": spec.model.quantization is not None,
    }
