"""GenerateJob: run a model, with or without adapters, over many inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.alias_generators import to_snake

from luthier_api.base import ApiModel, Format, Rule
from luthier_api.decides import BUDGET, CIRCUMSTANCES, LAYOUT, PLACE, PUBLICATION, RESULT
from luthier_api.inputs import Inputs, overridable
from luthier_api.marks import For, Table, TabledSpec, by_table
from luthier_api.outputs import LINES, OUTPUT_FORMATS, OutputFormat
from luthier_api.quantity import Bytes, Cores, GpuBytes
from luthier_api.scheduling import Scheduling
from luthier_api.spec import (
    Hub,
    JobControl,
    JobName,
    ModelSource,
    ObjectName,
    Path,
    PhaseResources,
    Repository,
    Revision,
    Seed,
    Volumes,
    Workspace,
    alone_on_its_claim,
    exactly_one,
)
from luthier_api.stores import Stores
from luthier_api.task_settings import (
    AnswerSettings,
    ClassifySettings,
    EmbeddingSettings,
    EntitySettings,
    ImageSettings,
    MaskSettings,
    Settings,
    TextSettings,
    TranscribeSettings,
    ZeroShotSettings,
)
from luthier_api.tasks import GENERATION_TASKS, GenerateTask

WeightsFile = Annotated[
    str,
    Field(max_length=253),
    Format(
        "^[^/]+(/[^/]+)*[.]safetensors$",
        never="(^|/)[.][.]?/",
        words=(
            "must be a .safetensors file, by its path in the repository or folder, such as ink.safetensors or"
            " styles/ink.safetensors"
        ),
    ),
]


class Adapter(ApiModel):
    """A LoRA adapter: exactly one of job, id and path."""

    job: JobName | None = None
    """A FineTuneJob of the same namespace."""
    id: Repository | None = None
    """Repository on the Hub."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods."""
    file: Annotated[WeightsFile | None, For("task")] = None
    """Which `.safetensors` file of the repository or folder is the adapter, for example styles/ink.safetensors. Needed
    where there are several.
    """
    weight: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Factor of the adapter: 1 as it was trained, 0 no effect, below zero the opposite."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("job", "id", "path"), "adapters: set exactly one of job, id and path"),
        Rule("!has(self.revision) || has(self.id)", "adapters.revision: only an adapter of the Hub has revisions"),
        Rule(
            "!has(self.file) || !has(self.job)",
            "adapters.file: the result of a FineTuneJob is one adapter; remove file",
        ),
    )


class Outputs(ApiModel):
    """How outputs are delivered."""

    format: OutputFormat = LINES
    """lines: JSON Lines, a file for each shard, and images beside them. parquet: Parquet with typed columns, and images
    in it. webdataset: archives (.tar) with each image and its line. openai-batch: the answers of OpenAI's Batch API, a
    line for each request. Other forms than lines are made of the lines at the end, by the last shard; they are
    published instead of them, and take room in the workspace beside them.
    """


def output_rules() -> Iterator[Rule]:
    """Rules that follow from the table of the forms of outputs."""
    for name, form in OUTPUT_FORMATS.items():
        suits = []
        if form.tasks:
            suits.append(f"self.task in {list(form.tasks)}")
        if form.form:
            suits.append(f"has(self.inputs.form) && self.inputs.form == '{form.form}'")
        if suits:
            inputs = f", with inputs.form: {form.form}" if form.form else ""
            yield Rule(
                f"self.outputs.format != '{name}' || {' && '.join(suits)}",
                f"spec.outputs.format: {name} is a form of {', '.join(form.tasks)}{inputs}; choose another one",
            )


CONTACT_SHEET = 24
"""Images on a contact sheet, where the job does not say."""


class OutputsHub(Hub):
    """Where the outputs are published, and the token that reads private or gated sources."""

    contact_sheet: Annotated[int | None, Field(ge=0, le=100), For("task")] = None
    """Images on the contact sheet: a page of HTML beside the dataset (contact-sheet.html) with thumbnails of the first
    outputs, their prompts and seeds. 24 when left out, 0: no page.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *Hub.rules,
        Rule(
            "has(self.repo) || !has(self.contactSheet)",
            "hub.contactSheet: belongs to hub.repo, the repository to publish to; set hub.repo, or remove contactSheet",
        ),
    )


class GenerateResources(ApiModel):
    """The pod of each shard."""

    gpus: Annotated[int, Field(ge=0, le=1)] = 1
    """GPUs of each shard: 1, or 0 to run on CPU."""
    gpu_class: Annotated[ObjectName | None, LAYOUT] = None
    """Kind of GPU, by the name that the administrator has given it (`gpuClasses` of the chart): which resource is
    requested, on which nodes, and for how much memory images and texts are planned. Left out: that of the namespace, or
    else any GPU.
    """
    gpu_memory: Annotated[GpuBytes | None, LAYOUT] = None
    """Memory of the GPU, for which images and texts are planned, for example 24Gi. Left out: that of the class of GPUs,
    if the administrator has given it. Only the plan depends on it: it requests nothing.
    """
    cpu: Annotated[Cores | None, CIRCUMSTANCES] = None
    """CPU request of each shard, in cores, for example 8 or 500m; none when left out."""
    memory: Annotated[Bytes | None, CIRCUMSTANCES] = None
    """Memory request and limit of each shard, for example 24Gi; neither when left out."""
    ephemeral_storage: Annotated[Bytes | None, CIRCUMSTANCES] = None
    """Local disk of each shard for /tmp, as request and limit, for example 50Gi. Left out: no request, and the limit
    that the administrator has set (`jobs.tmpSize` of the chart; 20Gi if they have not).
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gpuClass) || self.gpus > 0",
            "resources.gpuClass: the job requests no GPUs; remove it, or set gpus",
        ),
        Rule(
            "!has(self.gpuMemory) || self.gpus > 0",
            "resources.gpuMemory: the job requests no GPUs; remove it, or set gpus",
        ),
    )

    @property
    def gpus_per_pod(self) -> int:
        return self.gpus


WITH_CHAT = "(has(self.text) && has(self.text.chat) && self.text.chat)"
TOOLS_NEED_CHAT = "are written into the prompt by a chat template; set text.chat: true, or remove it"
TOKENS_ALONE = "single tokens (entities.aggregation: none) are no entities to compare; remove it, or set another one"


def row_rules() -> Iterator[Rule]:
    """Rules that follow from the tables: the roles that each row must have, and the settings that columns override."""
    for name, task in GENERATION_TASKS.items():
        for role in task.columns:
            templated = " || has(self.inputs.template)" if role == "prompt" else ""
            yield Rule(
                f"self.task != '{name}' || !has(self.inputs.rows){templated} ||"
                f" self.inputs.rows.all(row, has(row.{role}))",
                f"spec.inputs.rows.{role}: each row of {name} needs one",
            )
    blocks: dict[str, list[str]] = {}
    for name, task in GENERATION_TASKS.items():
        blocks.setdefault(task.settings, []).append(name)
    for settings, tasks in blocks.items():
        fields = overridable(settings)
        choices = f"names the fields of spec.{settings} that columns override: {', '.join(fields)}"
        yield Rule(
            f"!(self.task in {tasks}) || !has(self.inputs.columns) || !has(self.inputs.columns.settings) ||"
            f" self.inputs.columns.settings.all(field, field in {fields})",
            f"spec.inputs.columns.settings: {choices if fields else f'{settings} is the same for all rows; remove it'}",
        )


class GenerateJobSpec(JobControl, TabledSpec):
    """Model, inputs and settings of a generation, and where its results go."""

    tables: ClassVar[Mapping[str, Table]] = {"task": Table(GENERATION_TASKS, selector="task", noun="task")}

    task: Annotated[GenerateTask, RESULT]
    """What the model makes of each row: scores of labels (text-classification, zero-shot-classification,
    image-classification), entities (token-classification), an answer (question-answering), what fits a mask
    (fill-mask), a vector (feature-extraction), another text (summarization, translation, text2text-generation), a text
    of an image (image-to-text), what is said in audio (automatic-speech-recognition), the continuation of a prompt
    (text-generation), or an image, of a text or of another one (text-to-image and image-to-image, with Stable
    Diffusion).
    """
    model: Annotated[ModelSource, RESULT]
    adapters: Annotated[list[Adapter], Field(max_length=8), RESULT] = Field(default_factory=list)
    """LoRA adapters that are added to the model, each by its weight. For images also LoHa, LoKr and DoRA, in files of
    diffusers, kohya and LyCORIS.
    """
    inputs: Annotated[Inputs, RESULT]
    outputs: Annotated[Outputs, RESULT] = Field(default_factory=Outputs)
    text: Annotated[TextSettings, For("task"), RESULT] = by_table()
    """How text is generated."""
    image: Annotated[ImageSettings, For("task"), RESULT] = by_table()
    """How images are generated."""
    classify: Annotated[ClassifySettings, For("task"), RESULT] = by_table()
    """What is written of the scores of the labels."""
    entities: Annotated[EntitySettings, For("task"), RESULT] = by_table()
    """How the labels of tokens become entities."""
    answers: Annotated[AnswerSettings, For("task"), RESULT] = by_table()
    """How the answer is found in its context."""
    zero_shot: Annotated[ZeroShotSettings, For("task"), RESULT] = by_table()
    """The labels, and how the model is asked for them."""
    mask: Annotated[MaskSettings, For("task"), RESULT] = by_table()
    """What is written of the tokens that fit a mask."""
    embedding: Annotated[EmbeddingSettings, For("task"), RESULT] = by_table()
    """How the hidden states of a text become one vector."""
    transcribe: Annotated[TranscribeSettings, For("task"), RESULT] = by_table()
    """How what is said is written down."""
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], RESULT] = "auto"
    """Precision of weights and computation. auto: bf16 on a GPU that has it, fp16 on one before Ampere, fp32 on CPU."""
    batch_size: Annotated[int, Field(ge=1, le=4096), RESULT] = 4
    """Outputs computed at once. Results do not depend on the number of shards, only on this."""
    seed: Annotated[Seed, For("task"), RESULT] = by_table()
    """Seed of rows that have none of their own."""
    shards: Annotated[int, Field(ge=1, le=4096), RESULT] = 1
    """Pods that share the outputs; each resumes where it stopped. A shard has consecutive outputs, so that the files of
    all shards together have the order of the inputs.
    """
    parallelism: Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BUDGET] = None
    """Shards that work at once; all when left out. Read when the run is created: to apply a change to a running job,
    suspend and resume it.
    """
    max_failed_shards: Annotated[int, Field(ge=0, le=4095), BUDGET] = 0
    """Shards that may fail for good while the others go on. 0: the first one stops all of them, because what it failed
    of may be common to all. The job fails in either case; what was generated stays in the workspace. Read when the run
    is created.
    """
    max_failed_rows: Annotated[Annotated[int, Field(ge=0)] | None, CIRCUMSTANCES] = None
    """Outputs that may fail. One that cannot be made is a line with the reason (`error`), and all others are made. The
    job fails if more have failed than this; when left out, if not one row can be worked on: a mistake in one row of a
    million should not cost the others, and `kubectl get gj` shows how many failed. If a failed job gets a higher limit,
    it goes on with what it has.
    """
    resources: Annotated[GenerateResources, RESULT] = Field(default_factory=GenerateResources)
    workspace: Annotated[Workspace, PLACE] = Field(default_factory=Workspace)
    volumes: Annotated[Volumes, CIRCUMSTANCES] = Field(default_factory=list)
    """Claims and config maps of the namespace that every pod of the job sees, read-only: data, models, prompts."""
    stores: Annotated[Stores, CIRCUMSTANCES] = Field(default_factory=list)
    """How files are read whose address begins with s3://, gs:// or az://: credentials, and the server."""
    hub: Annotated[OutputsHub | None, PUBLICATION] = None
    prepare: Annotated[PhaseResources | None, CIRCUMSTANCES] = None
    publish: Annotated[PhaseResources | None, CIRCUMSTANCES] = None
    scheduling: Annotated[Scheduling, CIRCUMSTANCES] = Field(default_factory=Scheduling)
    retries_per_shard: Annotated[int, Field(ge=0, le=100), BUDGET] = 3
    """How often a shard is started again after a failure of the infrastructure. Read when the run is created: to apply
    a change to a running job, suspend and resume it.
    """

    @property
    def settings(self) -> Settings:
        """The block of the job's task."""
        settings: Settings = getattr(self, to_snake(GENERATION_TASKS[self.task].settings))
        return settings

    @property
    def per_prompt(self) -> int:
        """Outputs of each row."""
        return self.settings.per_prompt

    rules: ClassVar[tuple[Rule, ...]] = (
        *row_rules(),
        *output_rules(),
        alone_on_its_claim("shards", "self.shards == 1 || (has(self.parallelism) && self.parallelism == 1)"),
        Rule(
            "self.maxFailedShards < self.shards",
            "spec.maxFailedShards: must be below spec.shards, the number of all shards",
        ),
        Rule(
            "self.resources.gpus > 0 || self.precision != 'fp16'",
            "spec.precision: fp16 needs a GPU; use fp32 or bf16 on CPU",
        ),
        Rule(
            "!has(self.entities) || self.entities.aggregation != 'none' || !has(self.inputs.columns) ||"
            " !has(self.inputs.columns.reference)",
            f"spec.inputs.columns.reference: {TOKENS_ALONE}",
        ),
        Rule(
            "!has(self.entities) || self.entities.aggregation != 'none' || !has(self.inputs.rows) ||"
            " !self.inputs.rows.exists(row, has(row.reference))",
            f"spec.inputs.rows.reference: {TOKENS_ALONE}",
        ),
        Rule(
            "self.task != 'zero-shot-classification' || (has(self.zeroShot) && has(self.zeroShot.labels))",
            "spec.zeroShot.labels: zero-shot-classification needs the labels that a text may have; set them",
        ),
        Rule(
            f"!has(self.inputs.columns) || !has(self.inputs.columns.tools) || {WITH_CHAT}",
            f"spec.inputs.columns.tools: {TOOLS_NEED_CHAT}",
        ),
        Rule(
            f"!has(self.inputs.rows) || !self.inputs.rows.exists(row, has(row.tools)) || {WITH_CHAT}",
            f"spec.inputs.rows.tools: {TOOLS_NEED_CHAT}",
        ),
        Rule(
            "self.resources.gpus > 0 || !has(self.image) || self.image.offload in ['auto', 'none']",
            "spec.image.offload: frees memory of a GPU, and the job has none; remove it, or set resources.gpus",
        ),
        Rule(
            "self.resources.gpus > 0 || !has(self.text) || !has(self.text.offload) || self.text.offload == 'none'",
            "spec.text.offload: frees memory of a GPU, and the job has none; remove it, or set resources.gpus",
        ),
        Rule(
            "!has(self.model.quantization) || !has(self.text) || !has(self.text.offload) ||"
            " self.text.offload == 'none'",
            "spec.text.offload: packed weights of bitsandbytes stay on the GPU; remove it, or model.quantization",
        ),
        Rule(
            "!has(self.model.quantization) || !has(self.adapters) || size(self.adapters) == 0",
            "spec.adapters: are merged into whole weights, which model.quantization would round with them; name the"
            " FineTuneJob in spec.model.job, whose merged weights are quantised, or remove one of the two",
        ),
        Rule(
            "!has(self.inputs.rows) || !has(self.image) || self.image.guidance > 1.0 ||"
            " !self.inputs.rows.exists(row, has(row.negativePrompt))",
            "spec.inputs.rows.negativePrompt: has no effect with image.guidance up to 1; remove it, or set guidance"
            " above 1",
        ),
    )
