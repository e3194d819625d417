"""The schedules of the learning rate, one row each, and how often a training evaluates and saves.

Names, options and their defaults are those of transformers (`lr_scheduler_type`, `lr_scheduler_kwargs`). Its schedules
`reduce_lr_on_plateau` and `greedy` are not offered: they follow the losses as they come, and an evaluation that is
repeated after a resume would count twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
]


@dataclass(frozen=True)
class ScheduleInfo:
    """How the learning rate changes after the warm-up."""

    shape: str
    """For people: the course after the warm-up."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Name in `training.scheduleOptions` → default; None: what transformers chooses."""
    warmup: bool = True

    @property
    def fields(self) -> Mapping[str, Any]:
        """Path in the spec → default, of the fields that belong to the schedule. Other schedules refuse them."""
        return {f"training.scheduleOptions.{name}": default for name, default in self.options.items()}


SCHEDULES: Mapping[ScheduleName, ScheduleInfo] = {
    "linear": ScheduleInfo(shape="falls evenly to zero"),
    "cosine": ScheduleInfo(shape="falls to zero as half a cosine wave", options={"numCycles": 0.5}),
    "cosine_with_restarts": ScheduleInfo(
        shape="falls to zero as half a cosine wave, numCycles times", options={"numCycles": 1.0}
    ),
    "cosine_with_min_lr": ScheduleInfo(
        shape="falls as half a cosine wave to minLrRate of the peak", options={"numCycles": 0.5, "minLrRate": 0.1}
    ),
    "cosine_warmup_with_min_lr": ScheduleInfo(
        shape="the same, with a warm-up from warmupLrRate of the peak instead of zero",
        options={"numCycles": 0.5, "minLrRate": 0.1, "warmupLrRate": None},
    ),
    "polynomial": ScheduleInfo(
        shape="falls to lrEnd; power 1: evenly, 2: fast at first", options={"power": 1.0, "lrEnd": 1e-7}
    ),
    "inverse_sqrt": ScheduleInfo(
        shape="falls with the square root of the steps, to half after four times timescale", options={"timescale": None}
    ),
    "warmup_stable_decay": ScheduleInfo(
        shape="stays at the peak, then falls in the last numDecaySteps to minLrRatio of it",
        options={
            "numDecaySteps": None,
            "warmupType": "linear",
            "decayType": "cosine",
            "minLrRatio": 0.0,
            "numCycles": 0.5,
        },
    ),
    "constant": ScheduleInfo(shape="stays, without a warm-up", warmup=False),
    "constant_with_warmup": ScheduleInfo(shape="stays at the peak"),
}

Interval = Literal["steps", "epoch"]


@dataclass(frozen=True)
class IntervalInfo:
    """After what a training evaluates or saves."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Path in the spec → default, of the fields that belong to it."""


SAVE_INTERVALS: Mapping[Interval, IntervalInfo] = {
    "steps": IntervalInfo(fields={"training.saveSteps": 500}),
    "epoch": IntervalInfo(),
}
EVAL_INTERVALS: Mapping[Interval, IntervalInfo] = {
    "steps": IntervalInfo(fields={"training.evalSteps": None}),
    "epoch": IntervalInfo(),
}
