"""The kinds of jobs as objects, and a table of what Kubernetes has to know of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field

from luthier_api import API_VERSION
from luthier_api.base import ApiModel, Rule, model_in
from luthier_api.conditions import ConditionType
from luthier_api.decides import fixed_while_at_work
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.generate import GenerateJobSpec
from luthier_api.marks import TabledSpec
from luthier_api.status import JobStatus


class JobKind(StrEnum):
    FINE_TUNE = "FineTuneJob"
    GENERATE = "GenerateJob"


class Metadata(ApiModel):
    """The fields of an object's metadata that are read."""

    model_config = ApiModel.model_config | {"extra": "ignore"}

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int | None = None
    resource_version: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


NAME_RULES = (
    Rule(
        "size(self.metadata.name) <= 40",
        "metadata.name: at most 40 characters, so that the names of pods fit; choose a shorter one",
    ),
    Rule(
        "self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name: lower-case letters, digits and '-' only, because pods are named after it",
    ),
)


class FineTuneJob(ApiModel):
    """Adapts a model to a dataset: LoRA, QLoRA or full fine-tuning, on one or many nodes."""

    api_version: Literal["luthier.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]  # a Literal needs the text itself
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: Metadata
    spec: FineTuneJobSpec
    status: JobStatus = Field(default_factory=JobStatus)

    rules: ClassVar[tuple[Rule, ...]] = (
        *NAME_RULES,
        Rule(
            "size(self.metadata.name) + size(string(self.spec.resources.nodes - 1)) <= 41",
            "metadata.name: at most 39 characters with more than 10 nodes, 38 with more than 100, so that the names of"
            " pods fit; choose a shorter one",
        ),
        Rule(
            "!has(self.spec.model.job) || self.spec.model.job != self.metadata.name",
            "spec.model.job: is this job itself; name the job whose result it starts from",
        ),
        *fixed_while_at_work(FineTuneJobSpec),
    )


class GenerateJob(ApiModel):
    """Runs a model, with or without adapters, over many inputs: text or images, split over shards."""

    api_version: Literal["luthier.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["GenerateJob"] = "GenerateJob"
    metadata: Metadata
    spec: GenerateJobSpec
    status: JobStatus = Field(default_factory=JobStatus)

    rules: ClassVar[tuple[Rule, ...]] = (
        *NAME_RULES,
        Rule(
            "!has(self.spec.inputs.job) || self.spec.inputs.job != self.metadata.name",
            "spec.inputs.job: is this job itself; name the job whose outputs are the inputs",
        ),
        *fixed_while_at_work(GenerateJobSpec),
    )


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0


@dataclass(frozen=True)
class KindInfo:
    """What Kubernetes has to know of a kind, and its final condition."""

    model: type[FineTuneJob] | type[GenerateJob]
    plural: str
    short: str
    """Short name for kubectl; it also begins the names of the kind's children."""
    done: ConditionType
    """The condition that is True once `run` has succeeded."""
    columns: tuple[Column, ...]

    @property
    def spec(self) -> type[TabledSpec]:
        """The type of the kind's spec."""
        spec = model_in(self.model.model_fields["spec"].annotation)
        assert spec is not None
        assert issubclass(spec, TabledSpec)
        return spec


SHAPE = Column("Nodes×GPUs", ".status.shape")
AGE = Column("Age", ".metadata.creationTimestamp", "date")
KINDS: dict[JobKind, KindInfo] = {
    JobKind.FINE_TUNE: KindInfo(
        FineTuneJob,
        "finetunejobs",
        "ftj",
        ConditionType.TRAINED,
        (
            Column("State", ".status.state"),
            Column("Step", ".status.progress.step", "integer"),
            Column("Loss", ".status.progress.loss", "number"),
            SHAPE,
            Column("Restarts", ".status.restarts", "integer"),
            AGE,
            Column("ETA", ".status.progress.etaSeconds", "integer", 1),
            Column("Tokens/s", ".status.progress.tokensPerSecond", "number", 1),
            Column("GPU bytes", ".status.prepared.plan.memory.gpuBytes", "integer", 1),
            Column("GPU-hours", ".status.prepared.plan.gpuHours", "number", 1),
            Column("Revision", ".status.hub.revision", priority=1),
            Column("Tracking", ".status.tracking[0].url", priority=1),
        ),
    ),
    JobKind.GENERATE: KindInfo(
        GenerateJob,
        "generatejobs",
        "gj",
        ConditionType.GENERATED,
        (
            Column("State", ".status.state"),
            Column("Rows", ".status.progress.rows", "integer"),
            Column("Of", ".status.progress.maxRows", "integer"),
            Column("Failed", ".status.progress.failedRows", "integer"),
            Column("Rate", ".status.progress.rowsPerSecond", "number"),
            Column("ETA", ".status.progress.etaSeconds", "integer"),
            Column("Shards×GPUs", ".status.shape"),
            AGE,
            Column("Revision", ".status.hub.revision", priority=1),
        ),
    ),
}
CATEGORY = "luthier"


def source_name(kind: JobKind, name: str) -> str:
    """How run configs and statuses call a job whose result another one uses: a FineTuneJob by its name alone."""
    return name if kind is JobKind.FINE_TUNE else f"{kind}/{name}"


def source_of(text: str) -> tuple[JobKind, str]:
    """Kind and name of the job that `source_name` has called `text`."""
    kind, _, name = text.rpartition("/")
    return JobKind(kind or JobKind.FINE_TUNE), name


def parse_job(document: dict[str, Any]) -> FineTuneJob | GenerateJob:
    """A job from an object as the API server or a manifest has it.

    Raises pydantic.ValidationError for a wrong shape, ValueError for an unknown kind.
    """
    return kind_of(document).model.model_validate(document)


def kind_of(document: dict[str, Any]) -> KindInfo:
    """The kind of `document`. Raises ValueError for an unknown one."""
    try:
        return KINDS[JobKind(document.get("kind", ""))]
    except ValueError:
        raise ValueError(f"kind: {document.get('kind')!r} is not one of {', '.join(KINDS)}") from None
