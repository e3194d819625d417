"""Chooses the fastest layout that fits the memory: strategy, rows of a forward pass, and recomputed activations.

What the user has set stays. Of the other layouts, each is asked how much it takes (`gpu_memory`) and how long
(`speed`). None of them changes what is learnt. Where the memory is not known, the safe limits of `plan` stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import STRATEGIES
from luthier_api.quantity import amount
from luthier_api.run import Compute, FineTuneRun, Gpu, MemoryFacts, Weights
from luthier_api.status import Memory, Plan
from luthier_api.validation import broken_rules
from luthier_trainer.workspace import flops, gpu_memory, speed

ROWS = 64  # of a forward pass at most: more make no step faster
DIGITS = 3  # of an estimated time
SECONDS_AN_HOUR = 3600
NEARLY = 1.02  # times the shortest step: layouts that are so close count as equally fast
FRAGMENTS = "fragments"
SHARDED = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
"""Strategies in the order in which they are preferred where they are equally fast."""


@dataclass(frozen=True)
class Facts:
    """What a layout is chosen from, beside the spec: `prepare` keeps all of it."""

    memory: MemoryFacts
    weights: Weights
    compute: Compute | None = None
    cannot_recompute: str | None = None
    """Why the model cannot recompute its activations, if so."""


@dataclass(frozen=True)
class Limits:
    """The memory that a layout may take."""

    gpu: int | None
    """Bytes of one GPU; None: not known."""
    host: int | None
    """Bytes of a pod; None: not known."""
    device: Gpu = field(default_factory=Gpu)
    """Of one GPU: its speed."""
    on_cpu: bool = False

    @property
    def binding(self) -> int | None:
        """The bytes that a layout is compared with: of a GPU, or on a CPU of the pod."""
        return self.host if self.on_cpu else self.gpu


@dataclass(frozen=True)
class Layout:
    plan: Plan
    memory: Memory
    seconds: float
    """Of a step, to compare layouts."""

    @property
    def bytes(self) -> int:
        """What is compared with the memory: of a GPU, or on a CPU of the pod."""
        return self.memory.gpu_bytes or self.memory.host_bytes

    @property
    def least_bytes(self) -> int:
        """The same if the allocator left no gaps."""
        return self.bytes - self.memory.gpu.get(FRAGMENTS, 0)

    def fits(self, limits: Limits, *, tightly: bool = False) -> bool:
        """Return whether the memory is enough. `tightly`: if the allocator leaves hardly any gaps.

        The memory of the pod is compared where the layout uses it instead of a GPU's.
        """
        needed = self.least_bytes if tightly else self.bytes
        if limits.binding is not None and needed > limits.binding:
            return False
        offloads = "offload" in self.plan.strategy
        return not offloads or limits.host is None or self.memory.host_bytes <= limits.host


def limits_of(run: FineTuneRun) -> Limits:
    """Return the memory that the job has: of a GPU, by what the user says, or else its class; and of a pod."""
    resources = run.spec.resources
    host = int(amount(resources.memory)) if resources.memory else None
    if not resources.gpus_per_node:
        return Limits(gpu=None, host=host, on_cpu=True)
    known = run.gpu or Gpu()
    memory = int(amount(resources.gpu_memory)) if resources.gpu_memory else known.memory
    return Limits(gpu=memory, host=host, device=known)


def layouts(
    spec: FineTuneJobSpec, plan: Plan, facts: Facts, limits: Limits, kept: str | None = None
) -> Iterator[Layout]:
    """Yield each layout that `spec` leaves open.

    `plan`: the safe one, from which all else is taken. `kept`: the only strategy to look at.
    """
    share = spec.training.batch_size // plan.world_size
    for strategy in [kept] if kept else strategies(spec, plan, facts):
        for recomputed in recomputing(spec, plan, facts):
            for rows in micro_batches(spec, plan, facts, share):
                changed = plan.model_copy(
                    update={
                        "strategy": strategy,
                        "gradient_checkpointing": recomputed,
                        "micro_batch_size": rows,
                        "accumulation_steps": share // rows,
                    }
                )
                yield measured(spec, changed, facts, limits)


def measured(spec: FineTuneJobSpec, plan: Plan, facts: Facts, limits: Limits) -> Layout:
    compute = facts.compute or Compute(unit="row", multiplied=facts.weights.total, learning=facts.weights.learning)
    work = speed.Work(compute, facts.weights, gpu_memory.step_of(plan, facts.memory))
    seconds = speed.step_seconds(plan, spec.resources.nodes, work, limits.device)
    return Layout(plan, gpu_memory.peak(spec, plan, facts.memory), seconds)


def estimated(run: FineTuneRun, plan: Plan, facts: Facts) -> Plan:
    """Return `plan` with what all its steps come to: tokens, operations, and the time where the GPU's speed is known.

    Evaluations and saves are not in it, nor what grpo takes to write completions.
    """
    spec, compute = run.spec, facts.compute
    known: dict[str, float | int | None] = {"trainable_parameters": facts.weights.learning}
    if compute is not None and plan.steps:
        units = plan.steps * spec.training.batch_size * compute.units_a_row
        known["flops"] = units * flops.per_unit(compute, recomputed=False).model
        if compute.unit == "token":
            known["tokens"] = round(units)
        limits = limits_of(run)
        if limits.device.peak_flops is not None and spec.grpo is None:
            seconds = plan.steps * measured(spec, plan, facts, limits).seconds
            known["seconds"] = rounded(seconds)
            known["gpu_hours"] = rounded(seconds * plan.world_size / SECONDS_AN_HOUR)
    return plan.model_copy(update=known)


def rounded(number: float) -> float:
    """Return a number with the digits that an estimate has."""
    return float(f"{number:.{DIGITS}g}")


def strategies(spec: FineTuneJobSpec, plan: Plan, facts: Facts) -> list[str]:
    """Return the strategies to choose from, the simplest first.

    The rules of the API say which suit the task, method and optimiser. ZeRO-3 does not spread batch statistics.
    """
    if spec.strategy != "auto":
        return [plan.strategy]
    simple = "ddp" if plan.world_size > 1 else "none"
    if not spec.resources.gpus_per_node:
        return [simple]
    sharded = [
        name
        for name in SHARDED
        if name in STRATEGIES
        and (plan.world_size > 1 or name.endswith("-offload"))
        and not (name.startswith("zero3") and facts.weights.normalizes_over_batch)
        and not any(broken_rules(spec.model_copy(update={"strategy": name}), "spec"))
    ]
    return [simple, *sharded]


def recomputing(spec: FineTuneJobSpec, plan: Plan, facts: Facts) -> list[bool]:
    """Return whether activations may be kept, recomputed, or both; as in the safe plan if no step was computed."""
    if spec.training.gradient_checkpointing is not None or facts.cannot_recompute or facts.memory.missing:
        return [bool(plan.gradient_checkpointing)]
    known = {step.checkpointing for step in facts.memory.steps}
    return [kind for kind in (False, True) if kind in known]


def micro_batches(spec: FineTuneJobSpec, plan: Plan, facts: Facts, share: int) -> list[int]:
    """Return the numbers of rows of a forward pass to choose from, the most first.

    Where what is learnt depends on it, only that of the safe plan: with batch statistics, and for losses that compare
    rows. A step that was not computed says nothing of other rows.
    """
    fixed = spec.training.micro_batch_size or facts.weights.normalizes_over_batch or spec.compares_rows
    if fixed or facts.memory.missing:
        return [spec.training.micro_batch_size or plan.micro_batch_size or 1]
    return [rows for rows in range(min(share, ROWS), 0, -1) if share % rows == 0]


def fastest(found: Sequence[Layout]) -> Layout:
    """Return the layout with the shortest step.

    Of those that are nearly as fast, the simplest strategy, and with it the layout that takes the least memory.
    """
    shortest = min(layout.seconds for layout in found)
    near = [layout for layout in found if layout.seconds <= shortest * NEARLY]
    simplest = [layout for layout in near if layout.plan.strategy == near[0].plan.strategy]
    return min(simplest, key=lambda layout: layout.bytes)
