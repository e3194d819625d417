"""What a training that does not fit takes, and what would fit, with the figure of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun
from luthier_api.status import Plan
from luthier_api.validation import broken_rules
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import layout, space
from luthier_trainer.workspace.layout import FRAGMENTS, Facts, Layout, Limits

FactsFor = Callable[[FineTuneJobSpec], Facts]
"""Facts of the same model and rows for another spec. Raises Failure if the model does not suit it."""
SHOWN = 3  # suggestions, and terms of a sum
MOST_NODES, MOST_GPUS = 16, 8  # of suggestions
SHORTEST = 256  # tokens of a row that is suggested
GIB = 1 << 30


def refusal(
    run: FineTuneRun, plan: Plan, facts: Facts, limits: Limits, found: Sequence[Layout], other: FactsFor | None
) -> str:
    """Return the message of a training that does not fit: what it takes, and what would fit.

    `plan`: the safe one. `found`: the layouts that the spec leaves open.
    """
    least = min(found, key=lambda one: one.least_bytes)
    terms = sorted(((size, name) for name, size in least.memory.gpu.items() if name != FRAGMENTS), reverse=True)
    parts = f" ({', '.join(f'{name} {space.amount(size)}' for size, name in terms[:SHOWN])})" if terms else ""
    takes = f"the training takes at least {space.amount(least.least_bytes)} {of_what(limits)}{parts}"
    message = f"spec.resources.{has_only(run.spec, takes, limits)}"
    same = list(same_result(run, plan, facts, limits))[:SHOWN]
    if same:
        return f"{message}. What would fit, with the same result: {'; '.join(same)}"
    different = list(another_result(run.spec, plan, limits, other))[:SHOWN] if other else []
    if different:
        return f"{message}. What would fit, but changes what is learnt: {'; '.join(different)}"
    larger = "a larger resources.memory" if limits.on_cpu else "GPUs with more memory"
    return f"{message}. No layout would fit; choose a smaller model, or {larger}"


def of_what(limits: Limits) -> str:
    return "of the pod" if limits.on_cpu else "of each GPU"


def has_only(spec: FineTuneJobSpec, takes: str, limits: Limits) -> str:
    """Return the field that says the memory, what the training takes, and what there is."""
    there = space.amount(limits.binding or 0)
    if limits.on_cpu:
        return f"memory: {takes}, and its limit is {there}"
    if spec.resources.gpu_memory:
        return f"gpuMemory: {takes}, and one has {there}"
    return f"gpuClass: {takes}, and one of class {spec.resources.gpu_class} has {there}"


def same_result(run: FineTuneRun, plan: Plan, facts: Facts, limits: Limits) -> Iterator[str]:
    """Yield what would fit without another result: other layouts, then more GPUs, then other ones."""
    free = set_free(run.spec)
    layouts = list(other_layouts(run.spec, free, plan, facts, limits))
    yield from layouts[: SHOWN - 1]
    if limits.on_cpu:
        least = min(one.bytes for one in layout.layouts(free, safe(free, plan), facts, limits))
        yield f"resources.memory: {-(-least // GIB)}Gi"
        return
    if not layouts:
        yield from more_gpus(free, plan, facts, limits)
    yield from other_classes(run, plan, facts, limits)


def other_layouts(
    spec: FineTuneJobSpec, free: FineTuneJobSpec, plan: Plan, facts: Facts, limits: Limits
) -> Iterator[str]:
    """Yield the changes of what the user has set that would fit: the fewest first, and of each the fastest."""
    candidates = sorted(
        ((changes_of(spec, one.plan), one) for one in layout.layouts(free, safe(free, plan), facts, limits)),
        key=lambda pair: (len(pair[0]), pair[1].seconds),
    )
    shown: list[set[str]] = []
    for changes, one in candidates:
        fields = {name for name, _ in changes}
        if fields and one.fits(limits) and not any(known <= fields for known in shown):
            shown.append(fields)
            text = ", ".join(f"{field}: {str(value).lower()}" for field, value in changes)
            yield f"{text} ({space.amount(one.bytes)})"


def safe(spec: FineTuneJobSpec, plan: Plan) -> Plan:
    """Return `plan` for the number of processes of `spec`."""
    world = spec.resources.world_size
    return plan.model_copy(update={"world_size": world, "strategy": "ddp" if world > 1 else "none"})


def set_free(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """Return `spec` with everything left open that does not change the result."""
    training = spec.training.model_copy(update={"micro_batch_size": None, "gradient_checkpointing": None})
    return spec.model_copy(update={"training": training, "strategy": "auto"})


def changes_of(spec: FineTuneJobSpec, plan: Plan) -> list[tuple[str, object]]:
    """Return (field, value) of what the user has set otherwise than `plan` has it."""
    strategy = "ddp" if plan.strategy == "none" else plan.strategy  # what a spec calls one process alone, or several
    asked: tuple[tuple[str, object, object], ...] = (
        ("training.microBatchSize", spec.training.micro_batch_size, plan.micro_batch_size),
        ("training.gradientCheckpointing", spec.training.gradient_checkpointing, plan.gradient_checkpointing),
        ("strategy", None if spec.strategy == "auto" else spec.strategy, strategy),
    )
    return [(field, value) for field, was, value in asked if was is not None and was != value]


def more_gpus(spec: FineTuneJobSpec, plan: Plan, facts: Facts, limits: Limits) -> Iterator[str]:
    """Yield the smallest number of GPUs over which a strategy that divides the weights fits."""
    resources = spec.resources
    gpus, nodes = resources.gpus_per_node, resources.nodes
    sizes = []
    while gpus * 2 <= MOST_GPUS:
        gpus *= 2
        sizes.append((nodes, gpus))
    while nodes * 2 <= MOST_NODES:
        nodes *= 2
        sizes.append((nodes, gpus))
    for nodes, gpus in sizes:
        if spec.training.batch_size % (nodes * gpus):
            continue
        more = spec.model_copy(
            update={"resources": resources.model_copy(update={"nodes": nodes, "gpus_per_node": gpus})}
        )
        fits = [one for one in layout.layouts(more, safe(more, plan), facts, limits) if one.fits(limits)]
        if fits:
            best = layout.fastest(fits)
            over = f"{gpus} GPUs a node" if nodes == resources.nodes else f"{nodes} nodes of {gpus} GPUs"
            yield f"strategy: {best.plan.strategy} over {over} ({space.amount(best.bytes)})"
            return


def other_classes(run: FineTuneRun, plan: Plan, facts: Facts, limits: Limits) -> Iterator[str]:
    """Yield the smallest class of GPUs that is large enough for what the user has set."""
    classes = sorted((gpu.memory, name) for name, gpu in run.gpu_classes.items() if gpu.memory)
    for memory, name in classes:
        if memory <= (limits.gpu or 0):
            continue
        larger = Limits(gpu=memory, host=limits.host)
        fits = [one for one in layout.layouts(run.spec, plan, facts, larger) if one.fits(larger)]
        if fits:
            best = layout.fastest(fits)
            yield f"gpuClass: {name} ({space.amount(best.bytes)} of {space.amount(memory)})"
            return


def another_result(spec: FineTuneJobSpec, plan: Plan, limits: Limits, other: FactsFor) -> Iterator[str]:
    """Yield what would fit with another result: fewer rows that are compared, an 8-bit optimiser, an adapter, a
    quantised model, or shorter rows.
    """
    shown: set[str] = set()
    for field, value, changed in variants(set_free(spec)):
        if field in shown or any(broken_rules(changed, "spec")):
            continue
        try:
            facts = other(changed)
        except Failure:
            continue
        fits = [one for one in layout.layouts(changed, safe(changed, plan), facts, limits) if one.fits(limits)]
        if fits:
            shown.add(field)
            yield f"{field}: {value} ({space.amount(layout.fastest(fits).bytes)})"


def variants(spec: FineTuneJobSpec) -> Iterator[tuple[str, object, FineTuneJobSpec]]:
    """Yield (field, value, spec with it), the smallest change of each field first."""
    training = spec.training
    rows = training.batch_size // spec.resources.world_size if spec.compares_rows else 0
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        changed = training.model_copy(update={"micro_batch_size": rows})
        yield "training.microBatchSize", rows, spec.model_copy(update={"training": changed})
    if training.optimizer == "adamw_torch_fused":
        changed = training.model_copy(update={"optimizer": "adamw_8bit"})
        yield "training.optimizer", "adamw_8bit", spec.model_copy(update={"training": changed})
    for method in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(spec.method.type, ()):
        yield "method.type", method, with_method(spec, method)
    length = training.max_length or 0
    while length // 2 >= SHORTEST:
        length //= 2
        changed = training.model_copy(update={"max_length": length})
        yield "training.maxLength", length, spec.model_copy(update={"training": changed})


def with_method(spec: FineTuneJobSpec, method: str) -> FineTuneJobSpec:
    """Return `spec` with another method and its defaults."""
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    document["method"] = {"type": method}
    document["model"].pop("quantization", None)
    return FineTuneJobSpec.model_validate(document)
