"""What the operator reports: the status of both kinds, written once a reconcile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from luthier_api.base import ApiModel, map_by
from luthier_api.conditions import ConditionType

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""A time as Kubernetes writes it, such as 2026-11-28T09:30:00Z."""
Phase = Literal["prepare", "run", "publish"]
PHASES: tuple[Phase, ...] = ("prepare", "run", "publish")


class State(StrEnum):
    """What kubectl shows as STATE; while something stands in the way, the reason of a condition takes their place."""

    PENDING = "Pending"
    WAITING = "Waiting"
    PREPARING = "Preparing"
    PLANNED = "Planned"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    INVALID = "Invalid"


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Without infinities and NaN. JSON has no word for them: the API server refuses a whole status for one of them."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


Figures = Annotated[dict[str, float], AfterValidator(finite)]
"""Name → figure, as pods tell them. What is not finite is left out where it comes in."""


class Condition(ApiModel):
    """As in the Kubernetes API conventions."""

    type: str
    """What it is about: Accepted, Prepared, Running, Complete, Failed, ..."""
    status: Literal["True", "False", "Unknown"]
    """True, False, or Unknown."""
    reason: str
    """One word that programs may read; those of failures are the reasons of the exit codes."""
    message: str = ""
    """For people: where things stand, or what went wrong and what to do."""
    last_transition_time: Time
    """When its status last changed."""
    observed_generation: int | None = None
    """Generation of the spec that it speaks of."""


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
    """Rows held out for evaluation."""
    tokens: int | None = None
    """Tokens of the training rows, after truncation; images have none."""
    labels: list[str] | None = None
    """Names of the classes, where rows are classified."""


class Plan(ApiModel):
    """How the run is laid out: what the user set, and what was decided for them."""

    strategy: str
    """none, ddp, zero2, zero2-offload, zero3 or zero3-offload."""
    world_size: int = 1
    """Processes, over all pods that work at once."""
    micro_batch_size: int | None = None
    """Rows in one forward pass of one process."""
    accumulation_steps: int | None = None
    """Forward passes of each process for one optimiser step."""
    steps: int | None = None
    """Optimiser steps."""
    precision: str | None = None
    """Precision of the computation: fp32, bf16 or fp16."""
    gradient_checkpointing: bool | None = None
    """Whether activations are recomputed in the backward pass (FineTuneJob)."""
    reasons: list[str] = Field(default_factory=list)
    """Why, where something was chosen that the spec leaves open."""
    parameters: int | None = None
    """Weights of the model."""
    checkpoint_bytes: int | None = None
    """Bytes of a checkpoint (FineTuneJob)."""
    result_bytes: int | None = None
    """Bytes of the result (FineTuneJob)."""
    save_seconds: int | None = None
    """Seconds that saving a checkpoint is expected to take, on a volume that takes 200 MB/s (FineTuneJob)."""
    grace_seconds: int | None = None
    """Seconds that a pod needs from SIGTERM to its end, to finish its step and save (FineTuneJob).
    `scheduling.gracePeriodSeconds` sets another.
    """
    rows_per_shard: int | None = None
    """Outputs of the largest shard (GenerateJob)."""


class Prepared(ApiModel):
    """What `prepare` found. It comes back in its termination message and lies in the workspace for the pods of
    `run`.
    """

    model: ResolvedSource
    """The model that the run starts from."""
    dataset: ResolvedDataset
    """The rows, after splits and filters."""
    adapters: list[ResolvedSource] = Field(default_factory=list)
    """Adapters on the model, in their order (GenerateJob)."""
    plan: Plan
    """How the run is laid out."""


class Progress(ApiModel):
    """Where a running job stands."""

    step: int | None = None
    """Optimiser steps done."""
    max_steps: int | None = None
    """Optimiser steps of the whole run."""
    epoch: float | None = None
    """Passes over the training rows done."""
    loss: float | None = None
    """Training loss, mean since the report before."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """Tokens a second over all processes, padding excluded."""
    rows_per_second: float | None = None
    """Rows a second over all processes."""
    rows: int | None = None
    """Outputs written (GenerateJob)."""
    max_rows: int | None = None
    """Outputs of the whole job (GenerateJob)."""
    percent: int | None = None
    """Share of steps or outputs that is done."""
    eta_seconds: int | None = None
    """Seconds left at the pace of now."""
    time: Time | None = None
    """When it was read."""


class Checkpoint(ApiModel):
    """The newest one whose files matched its manifest: no other is ever told of."""

    step: int
    """Optimiser step at which it was written."""
    time: Time | None = None
    """When the operator first saw it."""


class Attempt(ApiModel):
    """One end of a pod that failed: the evidence outlives the pod."""

    phase: Phase
    """The phase that failed."""
    attempt: int = 0
    """Counts the restarts of the phase."""
    reason: str
    """What kind of end it was: the reason of the exit code, or the cluster's word."""
    exit_code: int | None = None
    """Exit code of the container; none when it never ended by itself."""
    pod: str | None = None
    """Name of the pod."""
    rank: int | None = None
    """Index of the pod: node rank or shard."""
    node: str | None = None
    """Node that the pod was on."""
    step: int | None = None
    """Step of the newest checkpoint at that time."""
    message: str = ""
    """What the process had to say: field, finding and remedy."""
    last_lines: str = ""
    """The end of the pod's output."""
    charged: bool = False
    """Whether it counted against `restarts.max`."""
    time: Time | None = None
    """When the pod ended."""


class HubStatus(ApiModel):
    repo: str
    """Repository on the Hub."""
    revision: str
    """The commit that holds the result."""
    url: str
    """Address of that commit."""
    files: int | None = None
    """Files of the result."""
    bytes: int | None = None
    """Bytes of the result."""


class WorkspaceStatus(ApiModel):
    claim_name: str
    """PersistentVolumeClaim that holds it."""
    folder: str
    """Folder of this job on the claim; results are in its `result`."""


class JobStatus(ApiModel):
    """Status of a FineTuneJob or a GenerateJob."""

    observed_generation: int | None = None
    """Generation of the spec that this status speaks of."""
    state: str = ""
    """One word for people: Pending, Preparing, Running, ... Programs read the conditions."""
    conditions: Annotated[list[Condition], map_by("type")] = Field(default_factory=list)
    """Where the job stands, a condition for each thing that can be true of it."""
    start_time: Time | None = None
    """When the first phase began; deadlines count from here."""
    deadline_start_time: Time | None = None
    """When the job last went on after it had rested, planned, suspended or ended: from then on, deadlines count from
    here.
    """
    run_start_time: Time | None = None
    """When the pods of `run` first ran."""
    completion_time: Time | None = None
    """When the job was complete, or failed."""
    shape: str | None = None
    """Nodes × GPUs, or shards × GPUs."""
    prepared: Prepared | None = None
    """What `prepare` found and decided."""
    progress: Progress | None = None
    """Where the run stands, read every few seconds."""
    checkpoint: Checkpoint | None = None
    """The newest checkpoint that a restart would go on from."""
    broken_checkpoints: int | None = None
    """How many checkpoints lie set aside, because their files did not match their manifest."""
    restarts: int = 0
    """Of the group of pods; of a GenerateJob, those of all shards together."""
    restarts_charged: int = 0
    """Restarts that counted against `restarts.max`, or `retriesPerShard`."""
    metrics: Figures | None = None
    """Final figures, for example evalLoss."""
    notices: Annotated[list[str], Field(max_length=40)] = Field(default_factory=list)
    """What should be known although nothing failed: rows or weights that were left out, changed or drawn anew, and
    settings that were chosen.
    """
    attempts: Annotated[list[Attempt], Field(max_length=10)] = Field(default_factory=list)
    """The last ten failures."""
    workspace: WorkspaceStatus | None = None
    """Where model, checkpoints and result lie."""
    hub: HubStatus | None = None
    """Where the result was published."""

    def condition(self, type: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == type), None)

    def is_true(self, type: ConditionType) -> bool:
        condition = self.condition(type)
        return condition is not None and condition.status == "True"

    @property
    def finished(self) -> bool:
        return self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED)
