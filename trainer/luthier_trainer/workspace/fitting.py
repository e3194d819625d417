"""Plans a training for the memory that it has, and says why."""

from __future__ import annotations

from collections.abc import Sequence

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun
from luthier_api.status import Plan
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import layout, space
from luthier_trainer.workspace.layout import Facts, Layout, Limits
from luthier_trainer.workspace.remedies import FactsFor, of_what, refusal

CHOSEN = ("microBatchSize:", "gradientCheckpointing:")
"""How reasons of the safe plan begin that are replaced here."""
FASTER = 0.03  # of a step; below that, a layout is not called faster
UNKNOWN = (
    "The memory of the GPUs is not known, so these are limits that fit most of them. Name their class"
    " (resources.gpuClass) or set resources.gpuMemory, and the fastest layout that fits is chosen"
)


def fitted(run: FineTuneRun, plan: Plan, facts: Facts, kept: str | None = None, other: FactsFor | None = None) -> Plan:
    """Return `plan` with the fastest layout that fits the memory of `run`, what it takes, and the reasons.

    `plan`: the safe layout. `kept`: the strategy of the checkpoints that the training resumes from. `other`: for what
    else would fit. Raises Failure(DOES_NOT_FIT) if nothing fits.
    """
    limits = layout.limits_of(run)
    if kept:
        plan = plan.model_copy(update={"strategy": kept})
    if limits.binding is None:
        only = layout.measured(run.spec, plan, facts, limits)
        unknown = [UNKNOWN] if plan.reasons and not limits.on_cpu else []
        reasons = [*plan.reasons, *unknown, *short_of_memory(only, limits)]
        return plan.model_copy(update={"memory": only.memory, "reasons": reasons})
    found = list(layout.layouts(run.spec, plan, facts, limits, kept))
    fits = [one for one in found if one.fits(limits)]
    tight = []
    if fits:
        best = layout.fastest(fits)
    else:
        fits = [one for one in found if one.fits(limits, tightly=True)]
        if not fits:
            raise Failure(ExitCode.DOES_NOT_FIT, refusal(run, plan, facts, limits, found, other))
        best = min(fits, key=lambda one: one.least_bytes)
        tight = [
            f"memory: {space.amount(best.bytes)} with the gaps that torch's allocator usually leaves, more than the"
            f" {space.amount(limits.binding)} {of_what(limits)}: it may run out"
        ]
    reasons = [*why(run.spec, plan, facts, best, found, fits, limits), *tight, *short_of_memory(best, limits)]
    reasons += [reason for reason in plan.reasons if reason not in reasons and not reason.startswith(CHOSEN)]
    if kept and run.spec.strategy == "auto":
        reasons.insert(0, f"strategy: {kept}, with which the checkpoints in the workspace were saved")
    return best.plan.model_copy(update={"memory": best.memory, "reasons": reasons})


def short_of_memory(best: Layout, limits: Limits) -> list[str]:
    """Return a warning if the pod of a GPU job has less memory of its own than the training takes at its beginning."""
    if limits.on_cpu or limits.host is None or best.memory.host_bytes <= limits.host:
        return []
    return [
        f"resources.memory: {space.amount(limits.host)}, and the processes of a pod take about"
        f" {space.amount(best.memory.host_bytes)} while they load or save the model"
    ]


def why(
    spec: FineTuneJobSpec,
    safe: Plan,
    facts: Facts,
    best: Layout,
    found: Sequence[Layout],
    fits: Sequence[Layout],
    limits: Limits,
) -> list[str]:
    """Return a sentence for each choice that `spec` has left open.

    Of a step that was not computed, only states are known, and rows and recomputing are those of the `safe` plan.
    """
    reasons = []
    plan, has = best.plan, f"{of_what(limits)}, which has {space.amount(limits.binding or 0)}"
    first = found[0].plan.strategy
    if plan.strategy != first:
        simple = [one for one in found if one.plan.strategy == first]
        fitting = [one for one in simple if one in fits]
        if fitting:
            saved = 1 - best.seconds / min(one.seconds for one in fitting)
            reasons.append(
                f"strategy: {plan.strategy}, with which a step takes about {saved:.0%} less time than {first}"
            )
        else:
            least = space.amount(min(one.bytes for one in simple))
            simply = "without it a step" if first == "none" else first
            reasons.append(f"strategy: {plan.strategy}, because {simply} needs at least {least} {has}")
    if facts.memory.missing:
        return [*reasons, *safe.reasons]
    alike = [one for one in found if one.plan.strategy == plan.strategy]
    if spec.training.micro_batch_size is None:
        reasons.append(why_rows(best, alike, fits, has))
    if spec.training.gradient_checkpointing is None:
        reasons += why_recomputed(best, alike, fits, has)
    return reasons


def why_rows(best: Layout, alike: Sequence[Layout], fits: Sequence[Layout], has: str) -> str:
    rows, taken = best.plan.micro_batch_size or 1, space.amount(best.bytes)
    chosen = f"microBatchSize: {rows}, which takes {taken} {has}"
    more = [
        one
        for one in alike
        if one.plan.gradient_checkpointing == best.plan.gradient_checkpointing
        and (one.plan.micro_batch_size or 1) > rows
    ]
    if not more:
        return chosen
    following = min(more, key=lambda one: one.plan.micro_batch_size or 1)
    if following in fits:
        return f"{chosen}. More rows make a step hardly faster"
    return f"{chosen}; {following.plan.micro_batch_size} would take {space.amount(following.bytes)}"


def why_recomputed(best: Layout, alike: Sequence[Layout], fits: Sequence[Layout], has: str) -> list[str]:
    others = [one for one in alike if one.plan.gradient_checkpointing != best.plan.gradient_checkpointing]
    if not others:
        return []
    chosen = f"gradientCheckpointing: {str(bool(best.plan.gradient_checkpointing)).lower()}"
    fitting = [one for one in others if one in fits]
    if not fitting:
        least = space.amount(min(one.bytes for one in others))
        return [f"{chosen}, because without it a step needs at least {least} {has}"]
    saved = 1 - best.seconds / min(one.seconds for one in fitting)
    if saved < FASTER:
        return [f"{chosen}, which takes less memory, and hardly more time"]
    return [f"{chosen}, with which a step takes about {saved:.0%} less time"]
