"""The run config: the one document that the operator, or `luthier run`, hands the trainer image; and what `prepare`
leaves behind.

Mounted as a file; its spec is the user's, without what has its default. Paths are those of the pod.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field
from pydantic_core import from_json

from luthier_api.base import ApiModel
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.generate import GenerateJobSpec
from luthier_api.marks import TabledSpec, written_part
from luthier_api.problems import InvalidDocument, Problem, parse
from luthier_api.spec import Csv
from luthier_api.status import Plan, Prepared, ResolvedSource

RUN_VERSION = "luthier.dev/run-v1"
DOCUMENT = "run config"
METRICS_PORT = 9464
RENDEZVOUS_PORT = 29500
STEP_TIMEOUT_SECONDS = 1800  # the time that torch waits in a collective operation, too


class Gpu(ApiModel):
    """What the administrator has said of the GPUs that the job names (`resources.gpuClass`)."""

    memory: int | None = None
    """Bytes of one."""
    peak_flops: float | None = None
    """Dense 16-bit operations per second of one."""
    bandwidth: float | None = None
    """Bytes per second that the memory of one reads or writes."""


class BaseRun(ApiModel):
    api_version: Literal["luthier.dev/run-v1"] = RUN_VERSION  # type: ignore[assignment]  # a Literal needs the text itself
    written_by: str = ""
    """Version of Luthier that has written it: for the message of an image that does not understand it."""
    name: str
    namespace: str = "default"
    uid: str = ""
    workspace: str
    """Absolute path of this job's folder."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Job, as `kinds.source_name` calls it → absolute path of its workspace folder (see `workspace.WorkspaceFolder`),
    mounted read-only.
    """
    rendezvous_host: str = "127.0.0.1"
    """Where rank 0 listens."""
    rendezvous_port: int = RENDEZVOUS_PORT
    metrics_port: int = METRICS_PORT
    """Where the first process of each pod serves its metrics; 0: any free port, written to the run folder."""
    grace_seconds: int = 60
    """Seconds between SIGTERM and SIGKILL, where neither the spec nor the plan says more: see `grace_of`."""
    step_timeout_seconds: int = STEP_TIMEOUT_SECONDS
    """Seconds without a step after which a run counts as hung, where the spec does not say: see `step_timeout_of`."""
    gpu: Gpu | None = None
    gpu_classes: dict[str, Gpu] = Field(default_factory=dict)
    """Classes of GPUs that the job may name, by their names, for the message that it does not fit its own."""

    def document(self) -> dict[str, Any]:
        """As JSON-ready data, without what has its default: an image that is older by one field must not refuse every
        job for it.
        """
        spec: TabledSpec = self.spec  # type: ignore[attr-defined]  # of each kind its own
        return {**self.head(), "spec": written_part(spec)}

    def head(self) -> dict[str, Any]:
        """The document without the spec."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True, exclude={"spec"})
        head = {"apiVersion": self.api_version, "kind": self.kind}  # type: ignore[attr-defined]
        return {**head, "writtenBy": installed_version(), **data}


@cache
def installed_version() -> str:
    """Version of Luthier. Read once, when it is first asked for: it takes 0.6 ms, a third of a decision that creates
    pods, and PID 1 never asks.
    """
    return version("luthier")


class FineTuneRun(BaseRun):
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    spec: FineTuneJobSpec


class GenerateRun(BaseRun):
    kind: Literal["GenerateJob"] = "GenerateJob"
    spec: GenerateJobSpec


def grace_of(spec: FineTuneJobSpec | GenerateJobSpec, plan: Plan | None, least: int) -> int:
    """Seconds between SIGTERM and SIGKILL of the pods of `run`: what the job asks for, else what the plan needs, but no
    less than `least`.

    The operator gives them to the pods, and the supervisor in the pods reckons with them.
    """
    if spec.scheduling.grace_period_seconds is not None:
        return spec.scheduling.grace_period_seconds
    return max(least, (plan and plan.grace_seconds) or 0)


def runs_code(run: FineTuneRun | GenerateRun) -> bool:
    """Whether code of the user runs in the pods."""
    return isinstance(run, FineTuneRun) and run.spec.grpo is not None and run.spec.grpo.runs_code


def step_timeout_of(run: FineTuneRun | GenerateRun) -> int:
    """Seconds without a step after which a run counts as hung, at most."""
    asked = run.spec.scheduling.step_timeout_seconds
    return run.step_timeout_seconds if asked is None else asked


RUNS: dict[str, type[FineTuneRun] | type[GenerateRun]] = {"FineTuneJob": FineTuneRun, "GenerateJob": GenerateRun}


def read_run(text: str | bytes) -> FineTuneRun | GenerateRun:
    """The run config from its JSON. Raises InvalidDocument with the path of each wrong field."""
    try:
        document = from_json(text, allow_inf_nan=False)
    except ValueError as error:  # says where
        raise InvalidDocument([Problem(DOCUMENT, f"invalid JSON: {error}")]) from None
    kind = parse(_Kind, document, DOCUMENT).kind
    try:
        return parse(RUNS[kind], document, DOCUMENT)
    except InvalidDocument as error:
        raise InvalidDocument([*_other_version(document), *error.problems]) from None


def _other_version(document: dict[str, Any]) -> list[Problem]:
    """What to do about a run config that another version has written."""
    written_by, own = document.get("writtenBy"), version("luthier")
    if not isinstance(written_by, str) or written_by in ("", own):
        return []
    return [
        Problem(
            DOCUMENT,
            f"written by Luthier {written_by}, but this image is {own} and does not understand it; use the trainer"
            " image of the operator's version (the chart's value trainer.image)",
        )
    ]


class _Kind(ApiModel):
    """Looked at first, so that only the types of one kind are built: half of the time that the reading takes."""

    model_config = ApiModel.model_config | {"extra": "ignore"}

    kind: Literal["FineTuneJob", "GenerateJob"]


class Origin(ApiModel):
    """A file or a folder outside the workspace that `prepare` has read, and what to know it again by."""

    field: str
    """Of the spec, which named it."""
    path: str
    digest: str
    """SHA-256: of a data file, or over a folder of images or of a model."""
    size: int | None = None
    """Bytes of a data file, or of a folder of images."""
    mtime_ns: int | None = None
    """When it was last written. One that nobody has touched is not read again."""
    whole: bool = True
    """Whether the digest is of all bytes of a data file; else of its size, its first and its last MiB."""


class Stream(ApiModel):
    """Where the pods of `run` read the rows of a dataset that is streamed (FineTuneJob)."""

    files: list[str]
    """Paths inside the pods, or addresses without their queries, in the order of the dataset."""
    format: str
    """The format whose reader reads them."""
    begin_file: int = 0
    """The file with the first row to learn from."""
    begin_row: int = 0
    """How many of its rows come before."""
    csv: Csv | None = None
    """How cells are separated and quoted."""
    encoding: str | None = None
    """Encoding of files of text, if it is known."""
    form: str
    """How the task reads the rows: the same for all, as the first ones tell."""
    missing_tokens: dict[str, int] = Field(default_factory=dict)
    """Spelling → id of the tokens without a row in the embedding. No row may have one."""


class Weights(ApiModel):
    """What the sizes of a training's checkpoints and of its result are computed from (FineTuneJob)."""

    total: int
    """Weights of the model."""
    learning: int
    """Weights that learn: of the adapters alone, or all."""
    learning_bytes: int = 4
    """Bytes of such a weight, and of its gradient."""
    tensors: int
    """Tensors that learn."""
    state_bytes: int
    """Bytes that the optimiser keeps for them."""
    adapters: bool
    """Whether the result is an adapter."""
    computed_bytes: int
    """Bytes of a weight in the precision of the computation."""
    source_bytes: int
    """Bytes of a weight in the files of the base model, in whose type a model is delivered."""
    normalizes_over_batch: bool = False
    """Whether a layer of the model normalises over the rows of a forward pass (BatchNorm)."""
    result_files: int = 1
    """Forms in which an adapter is delivered, each with all its weights."""


class Compute(ApiModel):
    """What the floating-point operations of a training are computed from, for one unit (FineTuneJob)."""

    unit: Literal["token", "row"] = "token"
    """What is counted: tokens, or images."""
    multiplied: int
    """Weights that a unit is multiplied with, without those of adapters. Not those that are looked up; of experts,
    those that a token is sent to. Of an image, all multiply-adds with weights.
    """
    head: int = 0
    """Of them, those of the output layer, which is not computed again with activation checkpointing."""
    adapters: int = 0
    """Weights of adapters that it is multiplied with besides."""
    learning: int
    """Of both, those that learn."""
    attention_width: int = 0
    """Heads times the size of one, summed over the layers with attention over the whole row."""
    window_width: int = 0
    """The same of the layers with attention over a sliding window."""
    window: int | None = None
    """Tokens of the window."""
    causal: bool = True
    """Whether a token attends only to those before it."""
    attention_macs: int = 0
    """Multiply-adds of attention where they do not depend on the length of a row: of an image."""
    references: int = 0
    """Forward passes of the same model without gradients, for a reference."""
    frozen_models: int = 0
    """Multiply-adds of other models that run in each step without gradients, such as a VAE."""
    length: float = 0
    """Tokens of the row that a token is in, on average over all tokens."""
    units_a_row: float = 1
    """Tokens of a row of the dataset, as `training.batchSize` counts rows, on average; 1 of an image."""


class Moment(ApiModel):
    """What a step holds on a GPU at one moment, beside weights and the optimiser's state: a line over the rows of a
    forward pass.
    """

    model_config = ApiModel.model_config | {"frozen": True}

    fixed: int
    """Bytes that do not depend on the rows."""
    per_row: int
    """Bytes for each row."""
    gradients: int
    """Bytes of the gradients that are there by then, in the first forward and backward pass of a step."""


class StepMemory(ApiModel):
    """The moments of a step of which one is the peak."""

    checkpointing: bool
    """Whether activations are recomputed."""
    padded: bool
    """Whether attention needs a mask, because rows are padded or packed."""
    rows: int = 1
    """Rows of a forward pass from which on it holds, until another one does."""
    kernels: int = 0
    """Operations that a GPU computes in a forward and backward pass."""
    moved_fixed: int = 0
    """Bytes that they read and write, whatever the number of rows is."""
    moved_per_row: int = 0
    """Bytes that they read and write for each row."""
    kept_fixed: int
    """Bytes that autograd keeps of the forward pass, beside weights, whatever the number of rows is."""
    kept_per_row: int
    """Bytes that it keeps for each row."""
    moments: list[Moment]


class MemoryFacts(ApiModel):
    """What the memory of any layout of a training is computed from (FineTuneJob). Sizes are of a process that has a
    whole copy of the model.
    """

    total: int
    """Weights of the model."""
    learning: int
    """Weights that learn."""
    state_bytes: int
    """Bytes that the optimiser keeps for them."""
    computed_bytes: int
    """Bytes of a weight in the precision of the computation."""
    rest_bytes: int
    """Bytes of a weight of the model as it is loaded, before it is quantised."""
    reference_bytes: int = 0
    """Bytes of a frozen copy of the model that it is compared with."""
    beside_bytes: int = 0
    """Bytes of other models that are in memory all the time: those of rewards, of images and of captions."""
    quantised: bool = False
    """Whether frozen weights rest in few bits."""
    weight_bytes: int
    """Bytes of all weights and buffers as they rest, with adapters."""
    gradient_bytes: int
    """Bytes of the gradients of all weights that learn."""
    largest_unit: int = 0
    """Weights of the largest part of the model that is computed at once: what ZeRO-3 gathers."""
    largest_block: int = 0
    """Weights of the largest block of layers: what FSDP gathers."""
    outside_blocks: int = 0
    """Weights outside of all blocks, such as embeddings and heads: FSDP has them gathered during a whole pass."""
    unpacked_bytes: int = 0
    """Bytes of the largest quantised layer in the type of the computation."""
    largest_learning: int = 0
    """Weights of the largest tensor that learns."""
    row_tokens: int = 0
    """Tokens of the longest row; 0 if rows have none."""
    mixed_lengths: bool = False
    """Whether rows have different numbers of tokens, so that some are padded where several share a forward pass."""
    packed: bool = False
    """Whether a row holds several documents that do not see each other."""
    steps: list[StepMemory] = Field(default_factory=list)
    """Steps with and without recomputing, with and without a mask."""
    writing: list[Moment] = Field(default_factory=list)
    """What is held while the model writes what it learns from: lines over the rows that it writes at once."""
    evaluating: list[Moment] = Field(default_factory=list)
    """What an evaluation holds, where it computes more rows at once than a step does: lines over its rows."""
    missing: str | None = None
    """Why there are no steps, if so."""


class Attention(ApiModel):
    """How attention of a model can be computed (FineTuneJob)."""

    default: str
    """The implementation that transformers takes unless it is told."""
    cannot_varlen: str | None = None
    """Why varlen cannot compute packed rows of the model, if so."""


class PreparedRecord(Prepared):
    """`prepared/prepared.json`: `Prepared`, with the places that the pods of `run` need."""

    model_path: str
    """Folder of the model, its configuration and its tokenizer."""
    adapter_paths: list[str] = Field(default_factory=list)
    """Folders of the adapters, or for images their files, in the order of the spec (GenerateJob)."""
    other_model_paths: list[str] = Field(default_factory=list)
    """Folders of the models that the task uses beside its own: reward models (FineTuneJob); a refiner, and then
    the model that checks images (GenerateJob).
    """
    refiner: ResolvedSource | None = None
    """Of a GenerateJob with `image.refiner`."""
    safety: ResolvedSource | None = None
    """Of a GenerateJob with `image.safety`."""
    origins: list[Origin] = Field(default_factory=list)
    """What all of it was made of: what lies on the Hub has a commit instead."""
    new_tokens: list[int] = Field(default_factory=list)
    """Ids of the tokens whose rows in the embedding an adapter holds, because they are new (FineTuneJob)."""
    piece_parts: dict[int, list[int]] = Field(default_factory=dict)
    """Id of a learnt piece → ids of the tokens with whose rows that of the piece begins in an adapter, as their mean
    (FineTuneJob).
    """
    class_weights: list[float] | None = None
    """How much a row counts in the loss by its class, in their order, if not all count alike (FineTuneJob)."""
    group_rows: list[int] = Field(default_factory=list)
    """Of a FineTuneJob: training rows of each group, if rows of several groups share no micro-batch, such as images of
    several sizes.
    """
    weights: Weights | None = None
    """Of a FineTuneJob: with it, another layout is planned without the model."""
    compute: Compute | None = None
    """Of a FineTuneJob: for the estimated time, and for the metric of utilisation."""
    memory_facts: MemoryFacts | None = None
    """Of a FineTuneJob: with it, the memory of another layout is planned without the model."""
    cannot_recompute: str | None = None
    """Of a FineTuneJob: why the model cannot recompute its activations, if so."""
    whole_logits: str | None = None
    """Of a FineTuneJob: why the loss has to hold the logits of all tokens, if so."""
    attention: Attention | None = None
    """Of a FineTuneJob whose model is of transformers."""
    notices: list[str] = Field(default_factory=list)
    """What `prepare` had to say, so that a `prepare` that finds its work done says it again."""
    stream: Stream | None = None
    """Of a FineTuneJob whose training rows are read while the model learns."""
    dataset_path: str
    """FineTuneJob: a DatasetDict saved to disk, splits `train` (not of a stream) and `eval`, tokenised. GenerateJob:
    rows.jsonl.
    """
    rows_sha256: str = ""
    """SHA-256 of rows.jsonl (GenerateJob)."""
