"""GenerateJob: run a model, with or without adapters, over many inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator
from pydantic.alias_generators import to_camel, to_snake

from luthier_api.base import SET, ApiModel, Format, Rule, model_in
from luthier_api.decides import BUDGET, CIRCUMSTANCES, LAYOUT, PLACE, PUBLICATION, RESULT
from luthier_api.marks import For, Table, TabledSpec, by_table
from luthier_api.outputs import BATCH, LINES, OUTPUT_FORMATS, InputForm, OutputFormat
from luthier_api.overriding import WHOLE_JOB, overriding, sweeping
from luthier_api.quantity import Bytes, Cores, GpuBytes
from luthier_api.samplers import SchedulerName, Sigmas, TimestepSpacing, samplers
from luthier_api.scheduling import Scheduling
from luthier_api.spec import (
    LABEL,
    DatasetSource,
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
    ShortText,
    Volumes,
    Workspace,
    alone_on_its_claim,
    exactly_one,
    train_alone,
)
from luthier_api.speech import Language, SpeechTask
from luthier_api.stores import Stores
from luthier_api.tasks import GENERATION_TASKS, GenerateTask

OtherJob = Annotated[
    str,
    Field(min_length=1, max_length=40),
    Format(f"^{LABEL}$", "must be the name of a GenerateJob: lower-case letters, digits and '-'"),
]
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


class OneOutput(ApiModel):
    """The settings of a task that makes one output of each row."""

    per_prompt: ClassVar[int] = 1


class ClassifySettings(OneOutput):
    """What is written of the scores of the labels."""

    top_k: Annotated[int | None, Field(ge=1)] = None
    """Labels whose scores are written, the highest first; all of them when left out."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A row has each label with at least this score, where the model gives a row any number of labels
    (`problem_type: multi_label_classification`). Others give it the one with the highest score.
    """


class EntitySettings(OneOutput):
    """How the labels of tokens become entities."""

    aggregation: Literal["none", "simple", "first", "average", "max"] = "simple"
    """none: each token is one. simple: neighbours of one label. first, average and max: whole words, whose label is
    that of the first token, of the mean of the scores, or of the highest score.
    """
    stride: Annotated[int | None, Field(ge=0, le=65536)] = None
    """Tokens that two parts share of a text that is longer than the model reads. Left out: such a text is not divided.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.stride) || self.aggregation != 'none'",
            "entities.stride: tokens that stand in two parts would be there twice; set another entities.aggregation",
        ),
    )


class AnswerSettings(OneOutput):
    """How the answer is found in its context."""

    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 30
    """Tokens of an answer, at most."""
    window: Annotated[int, Field(ge=16, le=65536)] = 384
    """Tokens of the question and a part of the context that are read at once, as far as the model has positions."""
    stride: Annotated[int, Field(ge=0, le=65536)] = 128
    """Tokens of the context that two windows share."""
    allow_none: bool = False
    """Whether there may be no answer, as models learn it from SQuAD 2.0. It is the empty text then."""
    none_threshold: float = 0.0
    """There is no answer where its score is above that of the best one by more than this."""
    top_k: Annotated[int, Field(ge=1, le=100)] = 1
    """Answers that are written, the best first."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.noneThreshold == 0.0 || self.allowNone",
            "answers.noneThreshold: has no effect where each question has an answer; set answers.allowNone",
        ),
    )


class ZeroShotSettings(OneOutput):
    """The labels, and how the model is asked for them."""

    labels: Annotated[Annotated[list[ShortText], SET] | None, Field(min_length=1, max_length=100)] = None
    """The labels of the job, which have no default. The model reads each text once for each of them."""
    hypothesis: Annotated[str, Field(max_length=1000)] = "This example is {}."
    """The sentence about a text that is true if {} is its label."""
    multi_label: bool = False
    """Whether a text can have any number of the labels: each has a score of its own, and all scores need not add up to
    1.
    """
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With multiLabel, a text has each label with at least this score."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.hypothesis.contains('{}')",
            "zeroShot.hypothesis: has no {} for the label; write it, such as This text is about {}.",
        ),
        Rule(
            "self.threshold == 0.5 || self.multiLabel",
            "zeroShot.threshold: a text has one label, that with the highest score; set zeroShot.multiLabel",
        ),
    )


class TranscribeSettings(OneOutput):
    """How what is said is written down."""

    language: Language | None = None
    """Code of the language that is spoken, such as en. Left out: that of the model's generation_config.json, or else
    the model tells it of each file. The output says which. Models of one language have none.
    """
    task: SpeechTask | None = None
    """What models of several languages write: the language that is spoken, or English. Left out: as the model's
    generation_config.json says, or else the language that is spoken.
    """
    num_beams: Annotated[int, Field(ge=1, le=16)] = 1
    """1: the likeliest token at each step. More: a search with that many beams."""
    long_audio: Literal["windows", "refuse"] = "windows"
    """Audio that is longer than the model hears at once (Whisper 30 s). windows: it is written down window after
    window, by timestamps of the model. refuse: its row is an error.
    """


class MaskSettings(OneOutput):
    """What is written of the tokens that fit a mask."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """Tokens for each mask, the likeliest first."""


class EmbeddingSettings(OneOutput):
    """How the hidden states of a text become one vector. The card of a model says how it was trained."""

    pooling: Literal["mean", "cls", "last"] = "mean"
    """mean: that of all tokens; cls: the first token; last: the last token, for decoders."""
    normalize: bool = True
    """Whether vectors have the length 1, so that their product is the cosine between them."""


class TextSettings(ApiModel):
    """How text is generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Tokens after which a text ends, unless the model ends it before. Prompt and text together must fit the model."""
    min_new_tokens: Annotated[int, Field(ge=0, le=1_048_576)] = 0
    """Tokens before which the model cannot end a text. A string of `stop` ends it all the same."""
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], SET, Field(max_length=16)] = Field(
        default_factory=list
    )
    """Strings that end a text where the first of them appears. They are no part of it."""
    json_schema: Annotated[str | None, Field(min_length=2, max_length=32768), For("task"), WHOLE_JOB] = None
    """JSON schema that a text fits, as JSON text: only tokens that lead to such a document can follow. A text that ends
    by `maxNewTokens` may be the beginning of one.
    """
    regex: Annotated[str | None, Field(min_length=1, max_length=4096), For("task"), WHOLE_JOB] = None
    """Regular expression that a text matches from beginning to end, in the syntax of Rust. Only tokens that lead to
    such a text can follow.
    """
    chat: Annotated[bool, For("task"), WHOLE_JOB] = by_table()
    """Whether prompts are written with the chat template of the model, as after a training on conversations: a prompt
    is then the message of a user, or a list of messages. An adapter's template comes before the model's. A text also
    ends with the token that ends a turn.
    """
    system_prompt: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """Message of the system that stands before the messages of each row which has none. Needs chat."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0: always take the most likely token. Above: sample."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens whose probabilities add up to this; 1: from all. Needs a temperature."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the k likeliest tokens; 0: from all. Needs a temperature."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Draw from tokens at least this times as likely as the likeliest one; 0: from all. Needs a temperature."""
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the tokens whose information is nearest to the expected one, until their probabilities add up to this;
    1: from all. Needs a temperature.
    """
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Tokens that stand in the prompt or the text are made less likely by this factor; 1: none, below 1: likelier."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens that stand in the text, as in OpenAI's API; the prompt does not count."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of a token for each time that it stands in the text, as in OpenAI's API."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] = 0
    """No sequence of this many tokens stands twice in prompt and text; 0: any may."""
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Above 1: beam search with this many beams, and the likeliest text of all is taken. Prompts are then worked on one
    by one.
    """
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Of beam search: above 1 prefers longer texts, below 1 shorter ones."""
    per_prompt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Texts for each row; above 1 needs a temperature."""
    prefix: Annotated[str, Field(max_length=1000), For("task"), WHOLE_JOB] = by_table()
    """Is written before each text, as some models expect it, such as `summarize: `."""
    source_language: Annotated[ShortText, For("task"), WHOLE_JOB] = by_table()
    """Language of the texts, by the code of the model's tokenizer, such as eng_Latn. Needed by models of many
    languages.
    """
    target_language: Annotated[ShortText, For("task"), WHOLE_JOB] = by_table()
    """Language of the translations, likewise."""
    offload: Annotated[Literal["none", "layers"], For("task"), WHOLE_JOB] = by_table()
    """What waits in the memory of the node until the GPU computes with it. layers: those that repeat, which are nearly
    the whole model. Each token then takes as long as copying them to the GPU. The texts stay the same.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.perPrompt == 1 || self.temperature > 0.0",
            "text.perPrompt: several texts for a row would be the same without a temperature; set text.temperature",
        ),
        *(
            Rule(
                f"self.{name} == {off} || self.temperature > 0.0",
                f"text.{name}: without a temperature the likeliest token is taken; set text.temperature, or remove"
                f" {name}",
            )
            for name, off in (("topP", "1.0"), ("topK", "0"), ("minP", "0.0"), ("typicalP", "1.0"))
        ),
        Rule(
            "self.minNewTokens <= self.maxNewTokens",
            "text.minNewTokens: is more than text.maxNewTokens; lower it",
        ),
        Rule(
            "self.numBeams == 1 || self.temperature == 0.0",
            "text.numBeams: beam search takes the likeliest text and draws none; remove text.temperature, or numBeams",
        ),
        *(
            Rule(
                f"self.numBeams == 1 || self.{name} == {off}",
                f"text.{name}: has no effect in beam search; remove it, or text.numBeams",
            )
            for name, off in (("presencePenalty", "0.0"), ("frequencyPenalty", "0.0"))
        ),
        Rule(
            "self.numBeams == 1 || !has(self.stop) || size(self.stop) == 0",
            "text.stop: has no effect in beam search; remove it, or text.numBeams",
        ),
        Rule(
            "!has(self.systemPrompt) || (has(self.chat) && self.chat)",
            "text.systemPrompt: is a message of a chat; set text.chat: true, or remove it",
        ),
        Rule(
            "!has(self.jsonSchema) || !has(self.regex)",
            "text.regex: is one of two constraints; remove it, or text.jsonSchema",
        ),
        *(
            Rule(
                f"self.numBeams == 1 || !has(self.{name})",
                f"text.{name}: has no effect in beam search; remove it, or text.numBeams",
            )
            for name in ("jsonSchema", "regex")
        ),
        Rule(
            "self.lengthPenalty == 1.0 || self.numBeams > 1",
            "text.lengthPenalty: is of beam search; set text.numBeams, or remove lengthPenalty",
        ),
    )


def _only(field: str, names: Collection[str]) -> Rule:
    """The rule that `image.field` belongs to some samplers."""
    listed = ", ".join(f"'{name}'" for name in names)
    return Rule(
        f"!has(self.{field}) || self.scheduler in [{listed}]",
        f"image.{field}: applies to {', '.join(names)}; remove it, or choose one of these as image.scheduler",
    )


ImageMetadata = Literal["parameters", "luthier", "xmp"]
"""What a file of an image says of itself."""


class Refiner(ApiModel):
    """A second model that does the last steps of each image: exactly one of id and path."""

    id: Repository | None = None
    """Repository on the Hub, for example stabilityai/stable-diffusion-xl-refiner-1.0."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods."""
    start: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of the denoising that the model does before."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "path"), "refiner: set exactly one of id and path"),
        Rule(
            "!has(self.revision) || has(self.id)", "refiner.revision: only a model of the Hub has revisions; remove it"
        ),
    )


class ImageSettings(ApiModel):
    """How images are generated."""

    scheduler: SchedulerName = "default"
    """Sampler. default: the one that the model's repository names. One that cannot keep what the model was trained with
    (a zero terminal SNR) is refused.
    """
    sigmas: Sigmas | None = None
    """How the noise levels of the steps are spread: as Karras et al. do, exponentially, or by a beta distribution. Left
    out: evenly in the time of the training.
    """
    timestep_spacing: TimestepSpacing | None = None
    """Which time steps of the training the steps are. Left out: as the model's repository says."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 5.0
    """Classifier-free guidance scale; up to 1 turns it off."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share by which the guided prediction is scaled back to the deviation of the unguided one, against too much
    exposure; 0.7 for models with a zero terminal SNR.
    """
    guidance_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps before guidance begins. A step without guidance takes half the time; without guidance in the
    first ones images are more varied.
    """
    guidance_end: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps after which guidance ends."""
    strength: Annotated[float, Field(gt=0, le=1), For("task")] = by_table()
    """How much of an image is made anew: share of the steps that are done, after noise was added to it. 1: nothing is
    left of it where it is changed.
    """
    refiner: Annotated[Refiner | None, For("task"), WHOLE_JOB] = None
    """The refiner of Stable Diffusion XL. Adapters are added to the model alone."""
    long_prompts: Annotated[Literal["refuse", "chunk"], WHOLE_JOB] = "refuse"
    """Prompts that are longer than the text encoders read (75 tokens). refuse: the row is an error. chunk: they are
    encoded in parts of 75 tokens, as web UIs for Stable Diffusion do.
    """
    width: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    """Pixels, a multiple of 8. Models are at their best near the size that they were trained with."""
    height: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    """Pixels, a multiple of 8."""
    per_prompt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Images for each row."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """File format; png and webp are lossless."""
    metadata: Annotated[Annotated[list[ImageMetadata], SET], Field(max_length=3), WHOLE_JOB] = [
        "parameters",
        "luthier",
    ]
    """What each file says of itself; nothing with []. parameters: prompts and settings, as web UIs for Stable Diffusion
    write and read them. luthier: the same and more as JSON (model, adapters, versions). xmp: that a model has made it
    (DigitalSourceType of IPTC).
    """
    vae_tiling: Annotated[bool, WHOLE_JOB] = False
    """Whether images that are larger than those of the VAE's training are decoded in overlapping tiles. Takes less
    memory, and changes the images a little.
    """
    attention_slicing: Annotated[bool, WHOLE_JOB] = False
    """Whether attention is computed a part at a time. Takes less memory where an image is large, and more time."""
    offload: Annotated[Literal["auto", "none", "models", "layers"], WHOLE_JOB] = "auto"
    """What waits in the memory of the node until the GPU computes with it: models that are not in use, or all layers.
    Takes more time, layers much more. The images stay the same. auto: as little as fits the memory of the GPU, and
    nothing where that is not known.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        _only("sigmas", samplers(lambda sampler: sampler.sigmas)),
        _only("timestepSpacing", samplers(lambda sampler: sampler.spacing)),
        Rule(
            "self.guidanceRescale == 0.0 || self.guidance > 1.0",
            "image.guidanceRescale: has no effect with guidance up to 1; remove it, or set guidance above 1",
        ),
        Rule(
            "self.guidanceStart < self.guidanceEnd",
            "image.guidanceStart: must be below image.guidanceEnd; to leave guidance out, set guidance: 1",
        ),
        *(
            Rule(
                f"self.{name} == {whole} || self.guidance > 1.0",
                f"image.{name}: has no effect with guidance up to 1; remove it, or set guidance above 1",
            )
            for name, whole in (("guidanceStart", "0.0"), ("guidanceEnd", "1.0"))
        ),
        Rule(
            "!has(self.refiner) || self.guidanceStart == 0.0 && self.guidanceEnd == 1.0",
            "image.refiner: the steps of two models have no common guidanceStart and guidanceEnd; remove them, or the"
            " refiner",
        ),
    )


Settings = TextSettings | ImageSettings | OneOutput
"""The blocks of the tasks."""


BLOCKS: Mapping[str, type[ApiModel]] = {"text": TextSettings, "image": ImageSettings}
"""The blocks of settings of which rows can override fields."""
RowOverrides = overriding(BLOCKS, "RowOverrides", "What a row overrides of the settings of the job.")


ROWS_SIZE = 65536
"""Characters of the texts of all rows in a manifest. The operator and etcd hold every job whole. Not bytes: the API
server counts what it costs to convert each text at its longest, and refuses the CRD.
"""
TEXTS = (
    "prompt",
    "negativePrompt",
    "tools",
    "text",
    "question",
    "context",
    "image",
    "initImage",
    "mask",
    "audio",
    "reference",
)
"""Fields of a row that hold a text, or a path."""


def _size(name: str) -> str:
    """CEL: characters of a text of `row`."""
    return f"(has(row.{name}) ? size(row.{name}) : 0)"


class Row(ApiModel):
    """One input."""

    prompt: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """The text to continue (text-generation), or what the image shows (text-to-image). With `inputs.template`, a text
    for {prompt}.
    """
    fields: Annotated[dict[str, Annotated[str, Field(max_length=8192)]] | None, Field(max_length=64), For("task")] = (
        None
    )
    """Texts for `inputs.template`, by their names there. Each output repeats them under `input`."""
    tools: Annotated[str | None, Field(min_length=2, max_length=8192), For("task")] = None
    """The tools that the model can call: a list of JSON schemas, as JSON text. Needs text.chat, whose template writes
    them.
    """
    negative_prompt: Annotated[str | None, Field(max_length=8192), For("task")] = None
    """What the image should not show. An empty text is none, as an empty cell of a dataset is."""
    text: Annotated[str | None, Field(min_length=1, max_length=ROWS_SIZE), For("task")] = None
    """The text that the model reads."""
    question: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """The question that the context answers."""
    context: Annotated[str | None, Field(min_length=1, max_length=ROWS_SIZE), For("task")] = None
    """The text in which the answer stands."""
    image: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """The image that the model looks at: the path of a file inside the pods."""
    init_image: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """The image that is changed: the path of a file inside the pods. It is scaled to image.width and image.height."""
    mask: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """Where the image is changed: white in another one, likewise. Left out: everywhere."""
    audio: Annotated[str | None, Field(min_length=1, max_length=1024), For("task")] = None
    """The audio that the model hears: the path of a file inside the pods."""
    reference: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """What the output should be: the text, the label, the answer, or the tags of the words (B-PER O O). From the
    outputs that have one the metrics of the job are computed.
    """
    id: Annotated[str | None, Field(min_length=1, max_length=512)] = None
    """Identifier of this row, which each of its outputs repeats."""
    seed: Annotated[Seed | None, For("task")] = None
    """Seed of this row. Left out: derived from the job's seed and from the row, by its id or else by its contents."""
    overrides: RowOverrides | None = None  # type: ignore[valid-type]  # drawn from the blocks
    """What this row overrides of the settings of the job, such as {image: {steps: 50}}."""


class InputColumns(ApiModel):
    """Which columns of the dataset play which role."""

    prompt: Annotated[ShortText, For("task")] = by_table()
    """The prompt. Text files hold one a line and need no name here."""
    tools: Annotated[ShortText | None, For("task")] = None
    """The tools that the model can call: a list of JSON schemas, or its JSON text; an empty cell has none. Needs
    text.chat, whose template writes them.
    """
    text: Annotated[ShortText, For("task")] = by_table()
    """The text that the model reads. Text files hold one a line and need no name here."""
    question: Annotated[ShortText, For("task")] = by_table()
    """The question that the context answers."""
    context: Annotated[ShortText, For("task")] = by_table()
    """The text in which the answer stands."""
    image: Annotated[ShortText, For("task")] = by_table()
    """The image that the model looks at: images, or paths of files inside the pods, which may be relative to the folder
    of the file that names them. Text files hold a path a line and need no name here.
    """
    init_image: Annotated[ShortText, For("task")] = by_table()
    """The image that is changed, likewise. It is scaled to image.width and image.height, whatever its own shape is."""
    mask: Annotated[ShortText, For("task")] = by_table()
    """Where the image is changed: white in another one. Used where there is such a column; a name other than the
    default must exist.
    """
    audio: Annotated[ShortText, For("task")] = by_table()
    """The audio that the model hears: WAV, FLAC or MP3 files, or paths of them inside the pods, which may be relative
    to the folder of the file that names them. Text files hold a path a line and need no name here.
    """
    negative_prompt: Annotated[ShortText, For("task")] = by_table()
    """What the image should not show. Used where there is such a column; a name other than the default must exist."""
    reference: Annotated[ShortText | None, For("task")] = None
    """What the output should be: a text; a label, a list of labels or a number; the answer or a list of them, as in
    SQuAD; or entities (label, start, end), or the tags of the words (B-PER, I-PER, O). From the outputs that have one
    the metrics of the job are computed, with an empty cell there is none.
    """
    id: ShortText | None = None
    """Identifier of the row, which each of its outputs repeats. The seed of a row that has none is derived from it."""
    seed: Annotated[ShortText, For("task")] = by_table()
    """Seed of the row, a whole number below 2^32. Used where there is such a column; a name other than the default must
    exist.
    """
    settings: Annotated[dict[str, ShortText] | None, Field(max_length=64)] = None
    """Columns that override fields of the task's settings, by the names of the fields: {steps: n_steps}. An empty cell
    overrides nothing.
    """
    carry: Annotated[Annotated[list[ShortText], SET] | None, Field(max_length=100)] = None
    """Other columns that each output repeats under `input`, such as ids; all of them when left out, none with []. Text
    files have the line there.
    """


class InputData(DatasetSource):
    """Rows from files or from the Hub."""

    split: ShortText = "train"
    """Split of a Hub dataset; slices such as train[:100] work."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *DatasetSource.rules,
        train_alone("split"),
        Rule(
            "!has(self.format) || self.format != 'webdataset'",
            "dataset.format: archives of WebDataset are read by FineTuneJobs only; write the prompts into a file of"
            " JSON lines",
        ),
    )


class SweepLists(ApiModel):
    """Lists of values, by what they are values of."""

    fields: Annotated[
        dict[str, Annotated[list[Annotated[str, Field(max_length=8192)]], Field(min_length=1, max_length=64)]] | None,
        Field(max_length=16),
    ] = None
    """Texts for `inputs.template`, by their names there."""
    seed: Annotated[list[Seed] | None, Field(min_length=1, max_length=1000), For("task")] = None
    """Seeds, instead of those of the rows."""


SweepValues = sweeping(BLOCKS, "SweepValues", SweepLists)


class Sweep(ApiModel):
    """Works on each row several times, with other values: exactly one of zip and product."""

    zip: SweepValues | None = None  # type: ignore[valid-type]  # drawn from the blocks
    """The first values of all lists together, then the second ones, and so on: all lists are of one length."""
    product: SweepValues | None = None  # type: ignore[valid-type]
    """Each value of a list with each one of the others. The last list changes fastest."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("zip", "product"), "sweep: set exactly one of zip and product"),
    )


class Inputs(ApiModel):
    """The rows to work on: exactly one of rows, dataset and job."""

    rows: Annotated[list[Row] | None, Field(min_length=1, max_length=1000)] = None
    """Rows written here: a handful, with at most 65536 characters in all. More belong into a file or a dataset."""
    dataset: InputData | None = None
    """Rows from files or from the Hub."""
    job: OtherJob | None = None
    """A GenerateJob of the same namespace: each of its outputs is a row, in their order. `columns` says which of their
    columns are read, such as {prompt: text}. An output that could not be made is an error here, too.
    """
    columns: InputColumns | None = None
    """Names of the columns of the dataset, or of the outputs of the other job."""
    form: Annotated[InputForm, For("task")] = by_table()
    """What rows of a dataset are. columns: each column is what `columns` says. openai-batch: each row is a request of
    OpenAI's Batch API (custom_id, method, url, body), whose body overrides fields of `text`. A request that asks for
    something else is an error, which names the field.
    """
    template: Annotated[str | None, Field(min_length=1, max_length=8192), For("task")] = None
    """The prompt of each row, with texts of the row in it: "a {thing} in the style of {style}". A name stands for a
    column of the dataset, for one of `rows[].fields`, or for a list of `sweep`; {{ and }} stand for braces.
    """
    sweep: Sweep | None = None
    """Works on each row several times, with other values. Each time is a row of its own in the outputs."""
    truncate: Annotated[bool, For("task")] = by_table()
    """Whether a text that is longer than the model reads is cut at its end, and counted. Otherwise its row is an
    error, which says how long the text is.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("rows", "dataset", "job"), "inputs: set exactly one of rows, dataset and job"),
        Rule(
            "!has(self.job) || has(self.columns)",
            "inputs.columns: says which column of the outputs of inputs.job is read; set it, such as {prompt: text}",
        ),
        Rule(
            f"!has(self.form) || self.form != '{BATCH}' || has(self.dataset) && !has(self.columns) &&"
            " !has(self.template) && !has(self.sweep)",
            f"inputs.form: requests ({BATCH}) are rows of inputs.dataset and say themselves what is asked; remove"
            " columns, template and sweep, and set dataset",
        ),
        Rule(
            "!has(self.rows) || !has(self.columns)",
            "inputs.columns: rows that stand in the job have no columns to name; remove it, or set inputs.dataset",
        ),
        Rule(
            f"!has(self.rows) || self.rows.map(row, {' + '.join(map(_size, TEXTS))}).sum() <= {ROWS_SIZE}",
            f"inputs.rows: more than {ROWS_SIZE} characters in all; put the rows into a file and name it in"
            " inputs.dataset.files: of a ConfigMap or a claim (spec.volumes), or of a dataset (inputs.dataset.id)",
        ),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _dataset_has_columns(cls, data: Any, handler: ModelWrapValidatorHandler[Inputs]) -> Inputs:
        inputs = handler(data)
        if inputs.dataset and not inputs.columns and inputs.form != BATCH:
            return inputs.model_copy(update={"columns": InputColumns()})
        return inputs


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


def overridable(block: str) -> list[str]:
    """The fields of a block of settings that a row can override, by their names in a manifest."""
    if block not in BLOCKS:
        return []
    model = model_in(RowOverrides.model_fields[block].annotation)
    assert model is not None
    return [field.alias or to_camel(name) for name, field in model.model_fields.items()]


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
