"""The status of both kinds, which the operator writes at most once a reconcile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from luthier_api.base import ApiModel, Shortened, map_by
from luthier_api.conditions import ConditionType
from luthier_api.decides import MAY_WAIT

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""A time as Kubernetes writes it, such as 2026-11-28T09:30:00Z."""
Phase = Literal["prepare", "run", "publish"]
PHASES: tuple[Phase, ...] = ("prepare", "run", "publish")
Message = Annotated[str, Shortened(4096)]  # the size of a termination message
ConditionMessage = Annotated[str, Shortened(32_768)]  # the limit of Kubernetes; conditions of others are kept whole


class State(StrEnum):
    """The column STATE of kubectl. While a job waits, the reason of a condition is shown instead."""

    PENDING = "Pending"
    WAITING = "Waiting"
    PREPARING = "Preparing"
    PLANNED = "Planned"
    QUEUED = "Queued"
    INADMISSIBLE = "Inadmissible"
    UNSATISFIABLE = "Unsatisfiable"
    DEACTIVATED = "Deactivated"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Without infinities and NaN. JSON cannot express them: the API server refuses a whole status because of one."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


Figures = Annotated[dict[str, float], AfterValidator(finite)]
"""Name → value, as pods report them. Values that are not finite are left out."""


class Condition(ApiModel):
    """As in the Kubernetes API conventions."""

    type: str
    """Type of the condition: Accepted, Prepared, Running, Complete, Failed, ..."""
    status: Literal["True", "False", "Unknown"]
    """True, False, or Unknown."""
    reason: str
    """CamelCase, for programs. Reasons of failures are those of the exit codes."""
    message: Annotated[ConditionMessage, MAY_WAIT] = ""
    """For people: the current state, or what went wrong and what to do."""
    last_transition_time: Time
    """When the status of the condition last changed."""
    observed_generation: int | None = None
    """Generation of the spec for which the condition was set."""


class ResolvedSource(ApiModel):
    """A model or dataset as `prepare` found it."""

    source: str
    """Where it comes from: an id on the Hub, a folder, or a job."""
    revision: str | None = None
    """Its version: the commit on the Hub, else a SHA-256 over its files."""


class ResolvedPart(ResolvedSource):
    rows: int
    """Rows of an epoch that are from this source."""
    eval_rows: int = 0
    """Rows held out for evaluation."""


class ResolvedDataset(ResolvedSource):
    rows: int
    """Rows to train on or to generate from; of a stream, those that all steps see together."""
    eval_rows: int = 0
    """Rows held out for evaluation."""
    outputs: int | None = None
    """Outputs of all rows: `perPrompt` for each (GenerateJob)."""
    tokens: int | None = None
    """Tokens of the training rows, after truncation; images have none."""
    labels: list[str] | None = None
    """Names of the classes, for a task of classification."""
    sources: list[ResolvedPart] | None = None
    """Of a mix (`dataset.mix`): what it is made of."""


class Memory(ApiModel):
    """What a job is expected to need of memory."""

    gpu: dict[str, int] = Field(default_factory=dict)
    """Bytes of each GPU at the peak, by what takes them."""
    gpu_bytes: int = 0
    """The sum of them."""
    host_bytes: int = 0
    """Bytes of a node's own memory, all processes of a pod together."""
    partial: bool | None = None
    """Whether what is kept for the backward pass is not part of it, so that a training takes more."""


class Plan(ApiModel):
    """How the run is configured: what the user has set, and what was chosen where the spec leaves it open."""

    strategy: str
    """none, ddp, zero1, zero2, zero2-offload, zero3, zero3-offload or fsdp."""
    world_size: int = 1
    """Processes over all pods that run at the same time."""
    micro_batch_size: int | None = None
    """Rows in one forward pass of one process."""
    accumulation_steps: int | None = None
    """Forward passes of each process in one optimiser step."""
    normalizes_over_batch: bool | None = None
    """Whether the model has layers that normalise over the rows of a forward pass (BatchNorm), so that the result
    depends on microBatchSize (FineTuneJob).
    """
    steps: int | None = None
    """Optimiser steps."""
    precision: str | None = None
    """Precision of the computation: fp32, bf16 or fp16."""
    gradient_checkpointing: bool | None = None
    """Whether activations are recomputed in the backward pass (FineTuneJob)."""
    attention: str | None = None
    """How attention is computed, by transformers' names; varlen is torch's (FineTuneJob)."""
    reasons: list[str] = Field(default_factory=list)
    """The reasons for what was chosen."""
    parameters: int | None = None
    """Number of weights of the model."""
    trainable_parameters: int | None = None
    """Number of weights that learn: of adapters, or all (FineTuneJob)."""
    tokens: int | None = None
    """Tokens of all steps together, padding excluded; images have none (FineTuneJob)."""
    flops: float | None = None
    """Floating-point operations of all steps together, without those of recomputed activations (FineTuneJob)."""
    seconds: float | None = None
    """Estimated seconds of all steps, from the operations, the memory that they read and write, and the speed of the
    GPUs (FineTuneJob).
    """
    gpu_hours: float | None = None
    """The same in hours, of all GPUs together (FineTuneJob)."""
    data_bytes: int | None = None
    """Size in bytes of the prepared rows, and of what the training keeps of them."""
    checkpoint_bytes: int | None = None
    """Size of a checkpoint in bytes (FineTuneJob)."""
    result_bytes: int | None = None
    """Size of the result in bytes. Of texts it is the most that they can take, of images about what they take."""
    save_seconds: int | None = None
    """Expected seconds to save a checkpoint, on a volume that writes 200 MB/s (FineTuneJob)."""
    grace_seconds: int | None = None
    """Seconds that a pod needs after SIGTERM to finish its step and save a checkpoint (FineTuneJob).
    `scheduling.gracePeriodSeconds` overrides it.
    """
    memory: Memory | None = None
    """What the job is expected to need of memory. Of GenerateJobs those that make images have it."""
    offload: str | None = None
    """What waits in the memory of the node until the GPU computes with it: none, models or layers (GenerateJob)."""
    rows_per_shard: int | None = None
    """Outputs of the largest shard (GenerateJob)."""

    def with_micro_batch(self, rows: int) -> Plan:
        """The same optimiser steps, over the same rows, with `rows` in a forward pass.

        Raises ValueError if a process cannot divide its share of a step so.
        """
        share = (self.micro_batch_size or rows) * (self.accumulation_steps or 1)
        if share % rows:
            raise ValueError(f"{share} rows a process and step are no multiple of {rows}")
        return self.model_copy(update={"micro_batch_size": rows, "accumulation_steps": share // rows})


class Prepared(ApiModel):
    """What `prepare` found and planned. Its pod reports it in the termination message."""

    model: ResolvedSource
    """The model that the run starts from."""
    dataset: ResolvedDataset
    """The rows, after splits and filters."""
    adapters: list[ResolvedSource] = Field(default_factory=list)
    """Adapters on the model, in their order (GenerateJob)."""
    plan: Plan
    """How the run is configured."""


class Progress(ApiModel):
    """Where a running job stands."""

    step: int | None = None
    """Optimiser steps done."""
    max_steps: int | None = None
    """Optimiser steps of the whole run."""
    epoch: float | None = None
    """Passes over the training rows done."""
    loss: float | None = None
    """Training loss, mean since the previous report."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """Tokens per second over all processes, padding excluded."""
    rows_per_second: float | None = None
    """Rows per second over all processes."""
    rows: int | None = None
    """Outputs written (GenerateJob)."""
    max_rows: int | None = None
    """Outputs of the whole job (GenerateJob)."""
    failed_rows: int | None = None
    """Of the outputs written, those that are the record of an error (GenerateJob)."""
    percent: int | None = None
    """Percentage of the steps or outputs that are done."""
    eta_seconds: int | None = None
    """Estimated seconds left."""
    gpu_hours: float | None = None
    """GPU-hours of the whole run: those of all attempts so far, and those of the time left (FineTuneJob)."""
    plan_seconds_ratio: float | None = None
    """Time of a step as a part of the planned one, measured after the first steps (FineTuneJob)."""
    plan_memory_ratio: float | None = None
    """Peak of memory as a part of the planned one, measured after the first steps (FineTuneJob)."""
    time: Time | None = None
    """When these figures last changed. A run that hangs keeps its time."""


class Checkpoint(ApiModel):
    """The newest checkpoint whose files match its manifest."""

    step: int
    """Optimiser step at which it was saved."""
    time: Time | None = None
    """When the operator first saw it."""


class Attempt(ApiModel):
    """A failure of a pod, kept after the pod is deleted."""

    phase: str
    """The phase that failed: prepare, run or publish."""
    attempt: int = 0
    """Number of restarts before it: of the phase, or of the shard."""
    reason: str
    """Reason of the exit code, or of what the cluster did to the pod."""
    exit_code: int | None = None
    """Exit code of the container. Absent if the pod disappeared without one."""
    pod: str | None = None
    """Name of the pod."""
    rank: int | None = None
    """Rank of the process that failed first, over all nodes; of a GenerateJob the shard. Absent if it is not known."""
    node: str | None = None
    """Node on which the pod ran."""
    step: int | None = None
    """Step of the newest checkpoint at that time. Of a shard: outputs written."""
    message: Message = ""
    """What went wrong and what to do."""
    last_lines: Message = ""
    """The last lines of the pod's output."""
    charged: bool = False
    """Whether the restart after it counts against `restarts.max`."""
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
    """Number of files of the result."""
    bytes: int | None = None
    """Size of the result in bytes."""


class WorkspaceStatus(ApiModel):
    claim_name: str
    """PersistentVolumeClaim of the workspace."""
    folder: str
    """Folder of this job on the claim. The result is in its subfolder `result`."""


class AppliedSpec(ApiModel):
    """The part of the spec that the job was last at work with, and that may change."""

    generation: int | None = None
    """Generation of that spec."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Path of a field, for example resources.memory → hash of its value. Fields with their default are left out."""
    written_by: str | None = None
    """Version of the operator that has made the hashes. Another one may have other defaults, and makes them anew."""


class SourceStatus(ApiModel):
    """Where a job keeps the result that this one uses. It may have been deleted since."""

    job: str
    """Name of the FineTuneJob; of a GenerateJob, GenerateJob/NAME."""
    claim_name: str
    """PersistentVolumeClaim of its workspace."""
    folder: str
    """Its folder on the claim."""


class TrackedRun(ApiModel):
    """A run of a tracker, which shows the training over all its attempts."""

    type: str
    """The tracker, as in spec.tracking."""
    url: Annotated[str | None, Field(max_length=1024)] = None
    """Its page. Absent where it is in the workspace, or where the address is longer."""
    run: Annotated[str, Field(max_length=1024)]
    """Its id, or its folder in the workspace."""


class HubRequest(ApiModel):
    """The spec.hub from which the last Job of `publish` was made."""

    target: str
    """Repository and branch, as REPO@BRANCH."""
    hash: str
    """Hash of spec.hub."""


class JobStatus(ApiModel):
    """Status of a FineTuneJob or a GenerateJob."""

    observed_generation: int | None = None
    """Generation of the spec for which this status was written."""
    state: str = ""
    """Summary for people: Pending, Preparing, Running, ... Programs should read the conditions."""
    conditions: Annotated[list[Condition], map_by("type")] = Field(default_factory=list)
    """State of the job in detail."""
    start_time: Time | None = None
    """When the first phase began."""
    active_since: Time | None = None
    """Since when the job has been at work. Absent while it is suspended, waits in a queue, rests after its plan, or has
    ended.
    """
    active_seconds: int = 0
    """Seconds that the job was at work before `activeSince`. `activeDeadlineSeconds` limits the sum. Zero again when a
    job that has ended resumes, unless it only got more time.
    """
    run_start_time: Time | None = None
    """When the pods of `run` were first running."""
    completion_time: Time | None = None
    """When the job completed or failed."""
    images: dict[str, str] = Field(default_factory=dict)
    """Phase → image of its pods. An upgrade of the operator changes the image of phases that begin later."""
    shape: str | None = None
    """Nodes × GPUs, or shards × GPUs."""
    prepared: Annotated[Prepared | None, MAY_WAIT] = None
    """What `prepare` found and planned."""
    progress: Annotated[Progress | None, MAY_WAIT] = None
    """Progress of the run, updated every few seconds."""
    checkpoint: Annotated[Checkpoint | None, MAY_WAIT] = None
    """The newest checkpoint. A restart resumes from it."""
    broken_checkpoints: int | None = None
    """Number of checkpoints that were set aside because their files do not match their manifest."""
    restarts: int = 0
    """Restarts of the group of pods (FineTuneJob), or of all shards together (GenerateJob)."""
    restarts_charged: int = 0
    """Restarts that count against `restarts.max` (FineTuneJob) or `retriesPerShard` (GenerateJob)."""
    metrics: Figures | None = None
    """Final metrics, for example evalLoss."""
    notices: Annotated[list[Message], Field(max_length=40), MAY_WAIT] = Field(default_factory=list)
    """What the user should know although nothing has failed: rows or weights that were left out, changed or newly
    initialised, and settings that were chosen.
    """
    tracking: Annotated[list[TrackedRun] | None, Field(max_length=8)] = None
    """Where trackers show the training, as its last pods reported it when they ended (FineTuneJob)."""
    attempts: Annotated[list[Attempt], Field(max_length=10)] = Field(default_factory=list)
    """The last ten failures."""
    resumes: int = 0
    """How often the job was started again after it had failed, or with fields that were changed. Its children with a
    lower number are replaced.
    """
    reduced_micro_batch_size: int | None = None
    """Rows of one forward pass since CUDA ran out of memory with more. The optimiser steps are the same: see the plan.
    """
    applied_spec: AppliedSpec | None = None
    """What the job was last at work with. It resumes when this has changed."""
    workspace: WorkspaceStatus | None = None
    """Where model, checkpoints and result are stored."""
    sources: list[SourceStatus] | None = None
    """Where the results of other jobs that this one uses are stored."""
    hub_request: HubRequest | None = None
    """What the last upload was asked to do. If spec.hub differs, the result is published again."""
    hub: HubStatus | None = None
    """Where the result was published."""
    writes: int | None = None
    """How often the operator has written this status. A write that changes it cannot change the spec, so that the API
    server does not check the rules of the spec then.
    """

    def condition(self, type: str) -> Condition | None:
        for condition in self.conditions:  # no generator: a decision asks for dozens
            if condition.type == type:
                return condition
        return None

    def is_true(self, type: ConditionType) -> bool:
        condition = self.condition(type)
        return condition is not None and condition.status == "True"

    @property
    def finished(self) -> bool:
        """Whether the job has ended. The completion time alone is enough: a job whose conditions were lost must not run
        again by itself.
        """
        if self.completion_time is not None:
            return True
        return self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED)
