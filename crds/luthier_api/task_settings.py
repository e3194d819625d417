"""The blocks of a GenerateJob that hold the settings of its task: text, image, classify and so on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import SET, ApiModel, Rule
from luthier_api.marks import For, by_table
from luthier_api.overriding import WHOLE_JOB
from luthier_api.samplers import SchedulerName, Sigmas, TimestepSpacing, samplers
from luthier_api.spec import Path, Repository, Revision, ShortText, exactly_one
from luthier_api.speech import Language, SpeechTask


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


AspectRatio = Literal[
    "1:4", "1:3", "9:21", "1:2", "9:16", "10:16", "2:3", "3:4", "4:5",
    "1:1",
    "5:4", "4:3", "3:2", "16:10", "16:9", "2:1", "21:9", "3:1", "4:1",
]  # fmt: skip
"""Width to height of an image."""
ImageMetadata = Literal["parameters", "luthier", "xmp"]
"""What a file of an image says of itself."""


ImageLabel = Annotated[str, Field(min_length=1, max_length=200)]
"""A label of a model that classifies images."""


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


class Safety(ApiModel):
    """A model that classifies each image, and what becomes of those that it calls unsafe: exactly one of id and path.

    It is one of transformers for image-classification, with safetensors, such as Falconsai/nsfw_image_detection.
    """

    id: Repository | None = None
    """Repository on the Hub."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods."""
    labels: Annotated[Annotated[list[ImageLabel], SET], Field(min_length=1, max_length=32)]
    """Labels of this model that mean unsafe, for example nsfw. The score of an image is the sum of their
    probabilities.
    """
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Score from which on an image is unsafe."""
    policy: Literal["flag", "withhold"] = "flag"
    """What becomes of an unsafe image. flag: it is kept, and its line says so. withhold: no file is written, and its
    line is the record of an error, which counts as a failed row.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "path"), "safety: set exactly one of id and path"),
        Rule(
            "!has(self.revision) || has(self.id)", "safety.revision: only a model of the Hub has revisions; remove it"
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
    """Classifier-free guidance scale; up to 1 turns it off. FLUX reads it as an input of the model."""
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
    aspect_ratio: AspectRatio | None = None
    """Width to height, in place of both: the size nearest to it among those for models that were trained with 512 or
    1024 pixels, as diffusers lists them. Each output says its size. Other models need width and height.
    """
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
    or a part of it (DigitalSourceType of IPTC), which one, and Luthier's version.
    """
    safety: Annotated[Safety | None, WHOLE_JOB] = None
    """A second model that looks at each image. Left out, no image is checked."""
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
            "!has(self.aspectRatio) || self.width == 1024 && self.height == 1024",
            "image.aspectRatio: decides on width and height; remove them, or aspectRatio",
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
