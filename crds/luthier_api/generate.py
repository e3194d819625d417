"""GenerateJob: run a model, with or without adapters, over many inputs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Rule
from luthier_api.spec import (
    DatasetSource,
    Hub,
    JobControl,
    JobName,
    ModelSource,
    Path,
    Quantity,
    Scheduling,
    Seed,
    ShortText,
    Volumes,
    Workspace,
    exactly_one,
    immutable,
)

GenerateTask = Literal["text-generation", "text-to-image"]


class Adapter(ApiModel):
    """A LoRA adapter: exactly one of job, id and path."""

    job: JobName | None = None
    """A FineTuneJob of the same namespace."""
    id: Annotated[str | None, Field(max_length=200, pattern=r"^[-\w.]+(/[-\w.]+)?$")] = None
    """Repository on the Hub."""
    revision: ShortText | None = None
    path: Path | None = None
    """Folder inside the pods."""
    weight: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """How much it counts."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("job", "id", "path"), "adapters: set exactly one of job, id and path"),
        Rule("!has(self.revision) || has(self.id)", "adapters.revision: only an adapter of the Hub has revisions"),
    )


class Row(ApiModel):
    """One input."""

    prompt: Annotated[str, Field(min_length=1, max_length=8192)]
    negative_prompt: Annotated[str | None, Field(max_length=8192)] = None
    """What the image should not show (text-to-image)."""
    seed: Seed | None = None
    """Seed of this row; derived from the job's seed and the row's number when left out."""


class InputColumns(ApiModel):
    """Which columns of the inputs play which role. Only the prompt's column must exist."""

    prompt: ShortText = "prompt"
    negative_prompt: ShortText = "negative_prompt"
    seed: ShortText = "seed"


class InputData(DatasetSource):
    """Rows from files or from the Hub."""

    split: ShortText = "train"
    """Split of a Hub dataset; slices such as train[:100] work."""


class Inputs(ApiModel):
    """The rows to work on: exactly one of rows and dataset."""

    rows: Annotated[list[Row] | None, Field(min_length=1, max_length=1000)] = None
    """Rows written here."""
    dataset: InputData | None = None
    """Rows from files or from the Hub."""
    columns: InputColumns = Field(default_factory=InputColumns)

    rules: ClassVar[tuple[Rule, ...]] = (Rule(exactly_one("rows", "dataset"), "inputs: set exactly one of rows and dataset"),)


class TextSettings(ApiModel):
    """How text is generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0: the likeliest token each time. Above: tokens are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the k likeliest tokens; 0: from all."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    per_prompt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Texts for each row; above 1 needs a temperature."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.perPrompt == 1 || self.temperature > 0.0",
            "text.perPrompt: several texts for a row would be the same without a temperature; set text.temperature",
        ),
    )


SchedulerName = Literal[
    "default", "ddim", "ddpm", "deis", "dpm++2m", "dpm++2m-karras", "dpm++2m-sde", "dpm++sde", "euler", "euler-ancestral", "heun", "kdpm2",
    "kdpm2-ancestral", "lcm", "lms", "pndm", "tcd", "unipc",
]  # fmt: skip


class ImageSettings(ApiModel):
    """How images are generated."""

    scheduler: SchedulerName = "default"
    """Sampler. default: the one that the model's repository names."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 5.0
    """Classifier-free guidance scale; up to 1 turns it off."""
    width: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    height: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    per_prompt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Images for each row."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """File format; png and webp are lossless."""


class GenerateResources(ApiModel):
    """The pod of each shard."""

    gpus: Annotated[int, Field(ge=0, le=1)] = 1
    """GPUs of each shard: 1, or 0 to run on CPU."""
    cpu: Quantity | None = None
    memory: Quantity | None = None
    """Memory request and limit of each shard."""


class GenerateJobSpec(JobControl):
    """Which model, over which inputs, how, and where the results go."""

    task: GenerateTask
    model: ModelSource
    adapters: Annotated[list[Adapter], Field(max_length=8)] = Field(default_factory=list)
    inputs: Inputs
    text: TextSettings = Field(default_factory=TextSettings)
    """For text-generation."""
    image: ImageSettings = Field(default_factory=ImageSettings)
    """For text-to-image."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of weights and computation. auto: bf16 on a GPU, fp32 on CPU."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """Outputs computed at once. Results do not depend on the number of shards, only on this."""
    seed: Seed = 0
    """Seed of rows that have none of their own."""
    shards: Annotated[int, Field(ge=1, le=4096)] = 1
    """Pods that share the rows; each goes on where it stopped."""
    resources: GenerateResources = Field(default_factory=GenerateResources)
    workspace: Workspace = Field(default_factory=Workspace)
    volumes: Volumes = Field(default_factory=list)
    hub: Hub | None = None
    scheduling: Scheduling = Field(default_factory=Scheduling)
    retries_per_shard: Annotated[int, Field(ge=0, le=100)] = 3
    """How often a shard is started again after a failure of the infrastructure."""

    @property
    def per_prompt(self) -> int:
        """Outputs of each row."""
        return self.text.per_prompt if self.task == "text-generation" else self.image.per_prompt

    rules: ClassVar[tuple[Rule, ...]] = (
        *immutable("task", "model", "adapters", "inputs", "text", "image", "precision", "batchSize", "seed", "shards", "resources",
                   "workspace", "volumes", "scheduling"),
        Rule("!has(self.model.config)", "spec.model.config: new weights cannot generate anything; set model.id, path or job"),
        Rule(
            "self.resources.gpus > 0 || self.precision != 'fp16'",
            "spec.precision: fp16 needs a GPU; use fp32 or bf16 on CPU",
        ),
        Rule(
            "!(self.task == 'text-to-image' && has(self.model.job))",
            "spec.model.job: a FineTuneJob makes text models; set model.id or model.path for text-to-image",
        ),
    )  # fmt: skip
