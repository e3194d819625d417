"""Whether a training goes as `prepare` has planned it: the notices for those who wait for it.

The trainer measures it in the first steps. It gives the notices in its log and in its termination message, and the
operator, from its metrics, while it runs. So both have the same text.
"""

from __future__ import annotations

from luthier_api.status import Plan

TOLERANCE = 0.15  # more than that, and the plan was wrong


def remarks(plan: Plan, seconds_ratio: float | None, memory_ratio: float | None) -> list[str]:
    """Return a notice for each figure of the plan that is off by more than TOLERANCE.

    `seconds_ratio`: the time of a step, as a part of the planned one. `memory_ratio`: the peak of memory likewise.
    None: not known.
    """
    found = []
    if seconds_ratio is not None and is_off(seconds_ratio) and plan.seconds:
        found.append(of_time(plan, plan.seconds, seconds_ratio))
    if memory_ratio is not None and is_off(memory_ratio) and plan.memory:
        found.append(of_memory(plan, memory_ratio))
    return found


def is_off(ratio: float) -> bool:
    return abs(ratio - 1) > TOLERANCE


def of_time(plan: Plan, seconds: float, ratio: float) -> str:
    """Return the notice about the time of a step."""
    text = (
        f"plan.seconds: a step takes {ratio:.2f} times as long as planned, so that all steps take about"
        f" {duration(seconds * ratio)} instead of {duration(seconds)}"
    )
    if plan.gpu_hours:
        text += f", and {plan.gpu_hours * ratio:.3g} GPU-hours instead of {plan.gpu_hours:.3g}"
    if ratio > 1:
        text += ". docs/troubleshooting.md says what slows a training down"
    return text


def of_memory(plan: Plan, ratio: float) -> str:
    """Return the notice about the peak of memory."""
    what, remedy = ("of a GPU", "microBatchSize") if plan.memory and plan.memory.gpu else ("of a node", "memory")
    text = f"plan.memory: the peak {what} is {ratio:.2f} times the planned one"
    if remedy == "memory":
        return f"{text}. Set resources.memory accordingly"
    if ratio > 1:
        return f"{text}. If it runs out, lower training.microBatchSize"
    return f"{text}. A larger training.microBatchSize may fit"


def duration(seconds: float) -> str:
    """Return a time for people: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.3g} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
