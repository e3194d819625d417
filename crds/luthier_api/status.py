"""What the operator reports: the status of both kinds, written once a reconcile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from luthier_api.base import ApiModel
from luthier_api.conditions import ConditionType

Phase = Literal["prepare", "run", "publish"]
PHASES: tuple[Phase, ...] = ("prepare", "run", "publish")


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Without infinities and NaN. JSON has no word for them: the API server refuses a whole status for one of them."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


Figures = Annotated[dict[str, float], AfterValidator(finite)]
"""Name → figure, as pods tell them. What is not finite is left out where it comes in."""


class Condition(ApiModel):
    """As in the Kubernetes API conventions."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str
    observed_generation: int | None = None


class ResolvedSource(ApiModel):
    """A model or dataset as `prepare` found it."""

    source: str
    """Where it came from: a Hub id, a folder, a job."""
    revision: str | None = None
    """Which version of it: the commit on the Hub, else a SHA-256 over its files."""


class ResolvedDataset(ResolvedSource):
    rows: int
    """Rows to train on or to generate from."""
    eval_rows: int = 0
    tokens: int | None = None
    """Tokens of the training rows, after truncation."""
    labels: list[str] | None = None
    """Names of the classes (text-classification)."""


class Plan(ApiModel):
    """How the run is laid out: what the user set, and what was decided for them."""

    strategy: str
    """none, ddp, zero2, zero2-offload, zero3 or zero3-offload."""
    world_size: int = 1
    micro_batch_size: int | None = None
    accumulation_steps: int | None = None
    steps: int | None = None
    """Optimiser steps."""
    precision: str | None = None
    parameters: int | None = None
    """Weights of the model."""
    rows_per_shard: int | None = None


class Prepared(ApiModel):
    """What `prepare` found. It comes back in its termination message and lies in the workspace for the pods of `run`."""

    model: ResolvedSource
    dataset: ResolvedDataset
    adapters: list[ResolvedSource] = Field(default_factory=list)
    plan: Plan


class Progress(ApiModel):
    """Where a running job stands."""

    step: int | None = None
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    rows: int | None = None
    """Outputs written (GenerateJob)."""
    max_rows: int | None = None
    percent: int | None = None
    eta_seconds: int | None = None
    time: str | None = None
    """When it was read."""


class Checkpoint(ApiModel):
    """The newest one whose files matched its manifest: no other is ever told of."""

    step: int
    time: str | None = None


class Attempt(ApiModel):
    """One end of a pod that failed: the evidence outlives the pod."""

    phase: Phase
    attempt: int = 0
    """Counts the restarts of the phase."""
    reason: str
    exit_code: int | None = None
    pod: str | None = None
    rank: int | None = None
    """Index of the pod: node rank or shard."""
    node: str | None = None
    step: int | None = None
    """Step of the newest checkpoint at that time."""
    message: str = ""
    last_lines: str = ""
    """The end of the pod's output."""
    charged: bool = False
    """Whether it counted against `restarts.max`."""
    time: str | None = None


class HubStatus(ApiModel):
    repo: str
    revision: str
    """The commit that holds the result."""
    url: str
    files: int | None = None
    bytes: int | None = None


class WorkspaceStatus(ApiModel):
    claim: str
    folder: str
    """Folder of this job on the claim; results are in its `result`."""


class JobStatus(ApiModel):
    """Status of a FineTuneJob or a GenerateJob."""

    observed_generation: int | None = None
    state: str = ""
    """One word for people: Pending, Preparing, Running, ... Programs read the conditions."""
    conditions: list[Condition] = Field(default_factory=list)
    start_time: str | None = None
    run_start_time: str | None = None
    """When the pods of `run` first ran."""
    completion_time: str | None = None
    shape: str | None = None
    """Nodes × GPUs, or shards × GPUs."""
    prepared: Prepared | None = None
    progress: Progress | None = None
    checkpoint: Checkpoint | None = None
    restarts: int = 0
    """Of the group of pods; of a GenerateJob, those of all shards together."""
    restarts_charged: int = 0
    """Restarts that counted against `restarts.max`, or `retriesPerShard`."""
    metrics: Figures | None = None
    """Final figures, for example evalLoss."""
    attempts: Annotated[list[Attempt], Field(max_length=10)] = Field(default_factory=list)
    """The last ten failures."""
    workspace: WorkspaceStatus | None = None
    hub: HubStatus | None = None

    list_map_keys: ClassVar = {"conditions": "type"}

    def condition(self, type: ConditionType) -> Condition | None:
        return next((c for c in self.conditions if c.type == type), None)

    def is_true(self, type: ConditionType) -> bool:
        condition = self.condition(type)
        return condition is not None and condition.status == "True"

    @property
    def finished(self) -> bool:
        return self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED)
