"""The tasks, one row each: what a FineTuneJob can learn and a GenerateJob can make.

The API's types, its CEL rules, the docs and the trainer's checks are drawn from these rows. Imports no torch: what a
task does stands in `luthier_trainer`, and tests on both sides hold that each row has an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from luthier_api.formats import DatasetFormat
from luthier_api.forms import ROLES
from luthier_api.methods import (
    COMPARED,
    OF_AUDIO,
    OF_IMAGES,
    OF_TEXTS,
    STRATEGIES,
    UNSHARDED,
    MethodType,
    QuantizationType,
    Strategy,
)

Modality = Literal["text", "image", "audio", "speech"]
FineTuneTask = Literal[
    "causal-lm",
    "seq2seq",
    "preference",
    "text-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "embedding",
    "reward",
    "grpo",
    "image-classification",
    "audio-classification",
    "speech-recognition",
    "text-to-image",
]
"""The rows of `TASKS` that have a training half."""
GenerateTask = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "text-generation",
    "text-to-image",
    "zero-shot-classification",
    "fill-mask",
    "feature-extraction",
    "summarization",
    "translation",
    "text2text-generation",
    "image-to-text",
    "image-to-image",
    "automatic-speech-recognition",
]
"""The rows of `TASKS` that have a generation half."""
BestMetric = Literal[
    "evalLoss",
    "perplexity",
    "rewardAccuracy",
    "rewardMargin",
    "reward",
    "accuracy",
    "precision",
    "recall",
    "f1",
    "f1Micro",
    "f1Macro",
    "mse",
    "mae",
    "pearson",
    "exactMatch",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "recallAt1",
    "mrr",
    "tripletAccuracy",
    "wer",
    "cer",
]
"""What checkpoints can be compared by: the loss, and those metrics in `TASKS` of which more or less is better."""
BEST_METRICS: tuple[str, ...] = get_args(BestMetric)
EVAL_LOSS = "evalLoss"
"""The metric that every task has; less is better."""


@dataclass(frozen=True)
class TaskMetric:
    """A figure of an evaluation, as the task's code returns it."""

    name: str
    """Its key in metrics.json and in the status."""
    title: str
    """As model cards and pages call it."""
    better: Literal["higher", "lower"] | None = None
    """Which of two values is better; None: it does not rate the model."""


@dataclass(frozen=True)
class TrainingTask:
    """What a FineTuneJob of the task reads, and how it may learn."""

    columns: dict[str, str]
    """Roles in `dataset.columns` that each row must have → the column's name unless the job gives another. Not those of
    causal-lm, which depend on the form of the rows (`forms`).
    """
    formats: tuple[DatasetFormat, ...]
    """Formats of files that can hold such rows."""
    methods: tuple[MethodType, ...]
    """Methods that suit the models of the task."""
    metrics: tuple[TaskMetric, ...]
    """What an evaluation tells beside the loss."""
    sequences: int = 0
    """Sequences of tokens in a row for which a model computes logits over its vocabulary."""
    compares_rows: bool = False
    """Whether the loss of a row depends on the other rows of its micro-batch."""
    optional_columns: dict[str, str | None] = field(default_factory=dict)
    """The same as `columns` for roles that rows need not have; None: no default."""
    quantizations: tuple[QuantizationType, ...] = ()
    """Types in which a frozen model of the task may rest. bitsandbytes quantises linear layers alone, and a model that
    looks at images may be made of convolutions.
    """
    strategies: tuple[Strategy, ...] = STRATEGIES
    """Those that the task's trainer works with. A method or a quantisation may allow fewer."""
    settings: str | None = None
    """The block of the spec that belongs to the task."""
    options: dict[str, Any] = field(default_factory=dict)
    """Path in the spec → default, of the other fields that belong to the task; None: no default."""
    why: Mapping[str, str] = field(default_factory=dict)
    """Name of `methods`, `quantizations` or `strategies` → why it is restricted."""

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Path in the spec → default, of all fields that belong to the task. Other tasks refuse them."""
        roles: dict[str, Any] = self.columns | self.optional_columns
        columns = {f"dataset.columns.{role}": name for role, name in roles.items()}
        quantization = {"model.quantization": None} if self.quantizations else {}
        settings: dict[str, Any] = {self.settings: {}} if self.settings else {}
        return columns | quantization | settings | self.options

    @property
    def new_model(self) -> bool:
        """Whether training can start from new weights (`model.config`)."""
        return "model.config" in self.options


ROW_SETTINGS = ("inputs.rows[].overrides", "inputs.sweep.zip", "inputs.sweep.product")
"""Where values of a block of settings stand for some rows. They belong to the tasks to which the block belongs."""
TEMPLATES = ("inputs.template", "inputs.rows[].fields")
"""Fields that write prompts. They belong to the tasks whose rows have one."""
IMAGES = ("image", "initImage", "mask")
"""Roles whose cells are images: a row of `inputs.rows` has the path of a file there."""
AUDIO = ("audio",)
"""Roles whose cells are audio files, likewise."""
SEED = "seed"
"""Role of the seed of a row, and the field of the seed of a job."""
TOOLS = "tools"
"""Role of the tools that a conversation can call. A chat template writes them into the prompt."""
REFERENCE = "reference"
"""Role of what an output should be, with which it is compared."""


@dataclass(frozen=True)
class GenerationTask:
    """What a GenerateJob of the task reads, and where its settings stand."""

    columns: dict[str, str]
    """Roles that each row must have, in `inputs.rows` or as a column → the column's name unless the job gives
    another. The first is what text files hold.
    """
    optional_columns: dict[str, str | None]
    """The same for roles that rows need not have; None: no default, the job names the column."""
    settings: str
    """The block of the spec that belongs to the task."""
    options: dict[str, Any] = field(default_factory=dict)
    """Path in the spec → default, of the other fields that belong to the task; None: no default."""
    metrics: tuple[TaskMetric, ...] = ()
    """What follows from comparing outputs with references; none: outputs of the task have no reference."""

    @property
    def roles(self) -> dict[str, str | None]:
        """Role → default name of its column, of all roles that rows can have."""
        required: dict[str, str | None] = {**self.columns}
        reference = {REFERENCE: None} if self.metrics else {}
        return required | self.optional_columns | reference

    @property
    def main_role(self) -> str:
        """The role of the text, or of the image, that the task works on."""
        return next(iter(self.columns))

    @property
    def draws(self) -> bool:
        """Whether outputs depend on a seed."""
        return SEED in self.optional_columns

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Path in the spec → default, of all fields that belong to the task. Other tasks refuse them."""
        columns: dict[str, Any] = {f"inputs.columns.{role}": name for role, name in self.roles.items()}
        cells: dict[str, Any] = {f"inputs.rows[].{role}": None for role in self.roles}
        own = {path: default for path, default in self.options.items() if path.startswith(f"{self.settings}.")}
        rows = {f"{place}.{path}": None for place in ROW_SETTINGS for path in (self.settings, *own)}
        seeds = {SEED: 0, "inputs.sweep.zip.seed": None, "inputs.sweep.product.seed": None} if self.draws else {}
        templates = dict.fromkeys(TEMPLATES) if self.main_role == "prompt" else {}
        return columns | cells | rows | seeds | templates | {self.settings: {}} | self.options


@dataclass(frozen=True)
class TaskInfo:
    """A task: what its models are, and what can be done with them."""

    modality: Modality
    """What the rows hold, and so what prepares them: a tokenizer, an image processor, or a feature extractor. speech:
    audio and text, and both of a processor.
    """
    pipeline_tag: str
    """The Hub's name of the task."""
    auto_model: str | None = None
    """transformers' classes of such models are named for it: AutoModelFor<auto_model>. An empty text: AutoModel, which
    has no head. None: they are diffusers'.
    """
    peft_task_type: str | None = None
    """PEFT's name of the task. For those it has no name for, its adapters remember the class of their base model."""
    tags: tuple[str, ...] = ()
    """Further tags of its model cards."""
    head: bool = False
    """Whether a head of the model answers, instead of tokens or images. A head for other outputs is made anew."""
    unused: tuple[str, ...] = ()
    """Names of modules, or of single weights, that such models may have and the task does not use: they need not be in
    the files, and learn nothing.
    """
    training: TrainingTask | None = None
    """None: no FineTuneJob does this task."""
    generation: GenerationTask | None = None
    """None: no GenerateJob does this task."""

    @property
    def auto_class(self) -> str | None:
        """transformers' class that loads such models; None: they are diffusers'."""
        if self.auto_model is None:
            return None
        return f"AutoModelFor{self.auto_model}" if self.auto_model else "AutoModel"

    @property
    def library(self) -> Literal["transformers", "diffusers"]:
        """The library that its models are of."""
        return "diffusers" if self.auto_model is None else "transformers"

    @property
    def generated(self) -> GenerationTask:
        """The generation half. Raises ValueError for a task that no GenerateJob does."""
        if self.generation is None:
            raise ValueError("no GenerateJob does this task")
        return self.generation


UNPROVEN = "this task has been proven with these alone"
"""Why some tasks allow few methods."""
LORA_ALONE = "TRL's trainers (1.16) have been proven with these alone"
"""Why the tasks of TRL allow few methods."""

TEXT_FORMATS: tuple[DatasetFormat, ...] = ("csv", "json", "jsonl", "parquet", "arrow", "text", "webdataset")
TABLE_FORMATS: tuple[DatasetFormat, ...] = ("csv", "json", "jsonl", "parquet", "arrow", "webdataset")
IMAGE_FORMATS: tuple[DatasetFormat, ...] = ("imagefolder", "parquet", "arrow", "webdataset")
AUDIO_FORMATS: tuple[DatasetFormat, ...] = ("csv", "json", "jsonl", "parquet", "arrow")

RESULT_OPTIONS: dict[str, Any] = {"model.job": None}
"""Fields of the tasks that can work with the result of a FineTuneJob as their model."""
QUANTIZED_OPTIONS: dict[str, Any] = {"model.quantization": None}
"""Fields of the tasks of a GenerateJob whose models are of transformers, which quantises them on loading."""
READING_OPTIONS: dict[str, Any] = RESULT_OPTIONS | QUANTIZED_OPTIONS | {"inputs.truncate": False}
"""Fields of the tasks of a GenerateJob that read a text in one pass of the model."""
PEFT_OPTIONS: dict[str, Any] = dict.fromkeys(
    f"method.{name}" for name in ("rslora", "dora", "rankPattern", "alphaPattern", "layers", "initLoraWeights")
)
"""Fields of the tasks whose adapters are saved in PEFT's form, which says how they are scaled. diffusers' does not."""
TEXT_OPTIONS: dict[str, Any] = (
    RESULT_OPTIONS
    | PEFT_OPTIONS
    | {
        "training.maxLength": 1024,
        "training.attention": "auto",
        "training.torchCompile": False,
        "training.groupByLength": False,
        "dataset.parseSpecialTokens": False,
        "model.resizeEmbeddings": False,
        "model.addSpecialTokens": None,
    }
)
"""Fields of the tasks whose rows hold text."""
NOISE_OPTIONS: dict[str, Any] = {"training.neftuneNoiseAlpha": None}
"""Fields of the tasks that read texts and do not compare with a reference model, whose embeddings are the same ones."""
SAVED_OPTIONS: dict[str, Any] = {"method.modulesToSave": None, "method.bias": "none"}
"""Fields of the tasks whose adapters can hold weights of the base, and are not switched off to make a reference model:
what they hold would stay.
"""
SMOOTHING_OPTIONS: dict[str, Any] = {"training.labelSmoothing": None}
"""Fields of the tasks whose loss is the cross-entropy of labels."""
NEW_OPTIONS: dict[str, Any] = {"model.config": None, "model.tokenizer": None}
"""Fields of the tasks that can begin with new weights, and a tokenizer made of their rows."""
TEMPLATE_OPTIONS: dict[str, Any] = {"dataset.chatTemplate": None}
"""Fields of the tasks whose rows can hold messages."""
CHAT_OPTIONS: dict[str, Any] = TEMPLATE_OPTIONS | {"dataset.form": None, "training.lossOn": None}
"""Fields of the tasks that learn what is written in conversations."""
LABEL_OPTIONS: dict[str, Any] = {"dataset.mergeLabels": False}
"""Fields of the tasks whose rows have a class each."""

AUDIO_OPTIONS: dict[str, Any] = RESULT_OPTIONS | PEFT_OPTIONS | SAVED_OPTIONS | {"training.maxSeconds": None}
"""Fields of the tasks whose rows hold audio."""
AUDIO_LIMITS: Mapping[str, str] = {
    "methods": "virtual tokens stand before tokens, which audio lacks, and qlora needs weights in few bits",
    "quantizations": "a model that hears begins with convolutions, which stay as they are, and has not been proven so",
    "strategies": "a model that hears has not been proven in shards",
}
"""Why the tasks whose rows hold audio allow less."""

LABEL_METRICS = (
    TaskMetric("accuracy", "Accuracy", better="higher"),
    TaskMetric("f1Macro", "F1 (macro, over all labels)", better="higher"),
    TaskMetric("majorityShare", "Share of the commonest class"),
)
SEVERAL_LABEL_METRICS = (
    *LABEL_METRICS,
    TaskMetric("f1Micro", "F1 (micro, over all labels)", better="higher"),
)
TEXT_LABEL_METRICS = (
    *SEVERAL_LABEL_METRICS,
    TaskMetric("mse", "Mean squared error", better="lower"),
    TaskMetric("mae", "Mean absolute error", better="lower"),
    TaskMetric("pearson", "Pearson correlation", better="higher"),
)
ENTITY_METRICS = (
    TaskMetric("precision", "Precision of entities", better="higher"),
    TaskMetric("recall", "Recall of entities", better="higher"),
    TaskMetric("f1", "F1 of entities", better="higher"),
    TaskMetric("f1Macro", "F1 (macro, over all types)", better="higher"),
)
WRITTEN_METRICS = (
    TaskMetric("exactMatch", "Share of texts that equal their reference", better="higher"),
    TaskMetric("rouge1", "ROUGE-1 (F, words of a to z and 0 to 9)", better="higher"),
    TaskMetric("rouge2", "ROUGE-2 (F, words of a to z and 0 to 9)", better="higher"),
    TaskMetric("rougeL", "ROUGE-L (F, words of a to z and 0 to 9)", better="higher"),
    TaskMetric("bleu", "BLEU (0 to 100; sacrebleu, 13a, smoothing exp)", better="higher"),
)
"""Of texts that a model has written, compared with references."""
SPEECH_METRICS = (
    TaskMetric("wer", "Word error rate (jiwer)", better="lower"),
    TaskMetric("cer", "Character error rate (jiwer)", better="lower"),
)
ANSWER_METRICS = (
    TaskMetric("exactMatch", "Exact match (SQuAD)", better="higher"),
    TaskMetric("f1", "F1 (SQuAD)", better="higher"),
    TaskMetric("f1Answerable", "F1 of the questions with an answer"),
    TaskMetric("unanswerableAccuracy", "Share of the questions without an answer of which this was told"),
)

STREAM_OPTIONS: dict[str, Any] = {"dataset.streaming": False, "dataset.shuffleBuffer": None}
"""Fields of the tasks whose rows can be read while the model learns."""
TOKEN_FILTERS: dict[str, Any] = {"dataset.filter.minTokens": None, "dataset.filter.maxTokens": None}
PAIR_METRICS = (
    TaskMetric("rewardAccuracy", "Share of pairs whose chosen answer has the higher reward", better="higher"),
    TaskMetric("rewardMargin", "Reward of the chosen answers above that of the rejected ones", better="higher"),
)

SEQ2SEQ = TaskInfo(
    modality="text",
    pipeline_tag="summarization",
    auto_model="Seq2SeqLM",
    peft_task_type="SEQ_2_SEQ_LM",
    generation=GenerationTask(
        columns={"text": "text"},
        optional_columns={SEED: "seed"},
        settings="text",
        options=READING_OPTIONS | {"text.prefix": None, "text.sourceLanguage": None, "text.targetLanguage": None},
        metrics=WRITTEN_METRICS,
    ),
)
"""Tasks whose models have an encoder and a decoder. They differ in their names on the Hub."""

TASKS: Mapping[str, TaskInfo] = {
    "causal-lm": TaskInfo(
        modality="text",
        pipeline_tag="text-generation",
        auto_model="CausalLM",
        peft_task_type="CAUSAL_LM",
        training=TrainingTask(
            columns={},
            optional_columns=dict.fromkeys(ROLES),
            formats=TEXT_FORMATS,
            sequences=1,
            methods=OF_TEXTS,
            quantizations=("nf4", "fp4", "int8"),
            options=TEXT_OPTIONS
            | CHAT_OPTIONS
            | NOISE_OPTIONS
            | SMOOTHING_OPTIONS
            | SAVED_OPTIONS
            | TOKEN_FILTERS
            | STREAM_OPTIONS
            | NEW_OPTIONS
            | {"training.packing": "none"},
            metrics=(TaskMetric("perplexity", "Perplexity", better="lower"),),
        ),
    ),
    "seq2seq": TaskInfo(
        modality="text",
        pipeline_tag="text2text-generation",
        auto_model="Seq2SeqLM",
        peft_task_type="SEQ_2_SEQ_LM",
        training=TrainingTask(
            columns={"source": "source", "target": "target"},
            formats=TABLE_FORMATS,
            sequences=1,
            methods=COMPARED,
            why={"methods": UNPROVEN},
            quantizations=("nf4", "fp4", "int8"),
            settings="seq2seq",
            options=TEXT_OPTIONS | NEW_OPTIONS | NOISE_OPTIONS | SMOOTHING_OPTIONS | SAVED_OPTIONS,
            metrics=WRITTEN_METRICS,
        ),
    ),
    "preference": TaskInfo(
        modality="text",
        pipeline_tag="text-generation",
        auto_model="CausalLM",
        peft_task_type="CAUSAL_LM",
        tags=("dpo", "trl"),
        training=TrainingTask(
            columns={"chosen": "chosen", "rejected": "rejected"},
            optional_columns=dict.fromkeys(("prompt", "completion", "label", "tools")),
            formats=TABLE_FORMATS,
            sequences=2,
            methods=COMPARED,
            quantizations=("nf4", "fp4", "int8"),
            strategies=UNSHARDED,
            why={
                "methods": LORA_ALONE,
                "strategies": "with ZeRO-3 and FSDP the reference would have to be gathered from shards, too, in each"
                " step",
            },
            settings="preference",
            options=TEXT_OPTIONS | TEMPLATE_OPTIONS,
            metrics=(
                *PAIR_METRICS,
                TaskMetric("rewardChosen", "Reward of the chosen answers"),
                TaskMetric("rewardRejected", "Reward of the rejected answers"),
                TaskMetric("kl", "KL divergence from the reference model, estimated (KTO)"),
            ),
        ),
    ),
    "text-classification": TaskInfo(
        modality="text",
        pipeline_tag="text-classification",
        auto_model="SequenceClassification",
        peft_task_type="SEQ_CLS",
        head=True,
        training=TrainingTask(
            columns={"text": "text", "label": "label"},
            formats=TABLE_FORMATS,
            methods=OF_TEXTS,
            quantizations=("nf4", "fp4", "int8"),
            settings="classification",
            options=TEXT_OPTIONS
            | NEW_OPTIONS
            | LABEL_OPTIONS
            | NOISE_OPTIONS
            | SMOOTHING_OPTIONS
            | SAVED_OPTIONS
            | TOKEN_FILTERS
            | {"classification.problem": "single"},
            metrics=TEXT_LABEL_METRICS,
        ),
        generation=GenerationTask(
            columns={"text": "text"},
            optional_columns={},
            settings="classify",
            options=READING_OPTIONS,
            metrics=TEXT_LABEL_METRICS,
        ),
    ),
    "token-classification": TaskInfo(
        modality="text",
        pipeline_tag="token-classification",
        auto_model="TokenClassification",
        peft_task_type="TOKEN_CLS",
        head=True,
        training=TrainingTask(
            columns={"words": "words", "tags": "tags"},
            formats=TABLE_FORMATS,
            methods=COMPARED,
            why={"methods": UNPROVEN},
            quantizations=("nf4", "fp4", "int8"),
            settings="tagging",
            options=TEXT_OPTIONS | NEW_OPTIONS | NOISE_OPTIONS | SMOOTHING_OPTIONS | SAVED_OPTIONS | TOKEN_FILTERS,
            metrics=(TaskMetric("accuracy", "Accuracy of words", better="higher"), *ENTITY_METRICS),
        ),
        generation=GenerationTask(
            columns={"text": "text"},
            optional_columns={},
            settings="entities",
            options=READING_OPTIONS,
            metrics=ENTITY_METRICS,
        ),
    ),
    "question-answering": TaskInfo(
        modality="text",
        pipeline_tag="question-answering",
        auto_model="QuestionAnswering",
        peft_task_type="QUESTION_ANS",
        head=True,
        training=TrainingTask(
            columns={"question": "question", "context": "context", "answers": "answers"},
            formats=TABLE_FORMATS,
            methods=COMPARED,
            why={"methods": UNPROVEN},
            quantizations=("nf4", "fp4", "int8"),
            settings="answering",
            options=TEXT_OPTIONS | NEW_OPTIONS | NOISE_OPTIONS | SAVED_OPTIONS,
            metrics=ANSWER_METRICS,
        ),
        generation=GenerationTask(
            columns={"question": "question", "context": "context"},
            optional_columns={},
            settings="answers",
            options=RESULT_OPTIONS | QUANTIZED_OPTIONS,
            metrics=ANSWER_METRICS,
        ),
    ),
    "masked-lm": TaskInfo(
        modality="text",
        pipeline_tag="fill-mask",
        auto_model="MaskedLM",
        training=TrainingTask(
            columns={"text": "text"},
            formats=TEXT_FORMATS,
            sequences=1,
            methods=COMPARED,
            why={"methods": UNPROVEN},
            quantizations=("nf4", "fp4", "int8"),
            settings="masking",
            options=TEXT_OPTIONS | NEW_OPTIONS | NOISE_OPTIONS | SAVED_OPTIONS | TOKEN_FILTERS,
            metrics=(
                TaskMetric("accuracy", "Share of masked tokens that are filled in", better="higher"),
                TaskMetric("perplexity", "Perplexity of masked tokens", better="lower"),
            ),
        ),
    ),
    "embedding": TaskInfo(
        modality="text",
        pipeline_tag="sentence-similarity",
        auto_model="",
        peft_task_type="FEATURE_EXTRACTION",
        tags=("sentence-transformers",),
        unused=("pooler",),
        training=TrainingTask(
            columns={"anchor": "anchor", "positive": "positive"},
            optional_columns={"negative": None},
            formats=TABLE_FORMATS,
            methods=COMPARED,
            why={"methods": UNPROVEN},
            quantizations=("nf4", "fp4", "int8"),
            settings="embedding",
            compares_rows=True,
            options=TEXT_OPTIONS | NEW_OPTIONS | NOISE_OPTIONS | SAVED_OPTIONS,
            metrics=(
                TaskMetric(
                    "recallAt1", "Share of texts whose partner is the nearest of all held-out ones", better="higher"
                ),
                TaskMetric("mrr", "Mean reciprocal rank of the partner among all held-out ones", better="higher"),
                TaskMetric("tripletAccuracy", "Share of triplets whose partner is nearer", better="higher"),
            ),
        ),
    ),
    "reward": TaskInfo(
        modality="text",
        pipeline_tag="text-classification",
        auto_model="SequenceClassification",
        peft_task_type="SEQ_CLS",
        tags=("reward-model", "trl"),
        head=True,
        training=TrainingTask(
            columns={"chosen": "chosen", "rejected": "rejected"},
            optional_columns={"prompt": None, "tools": None},
            formats=TABLE_FORMATS,
            methods=COMPARED,
            quantizations=("nf4", "fp4", "int8"),
            strategies=UNSHARDED,
            why={"methods": LORA_ALONE, "strategies": "neither ZeRO-3 nor FSDP has been proven with this task"},
            settings="reward",
            options=TEXT_OPTIONS | TEMPLATE_OPTIONS | SAVED_OPTIONS,
            metrics=(
                *PAIR_METRICS,
                TaskMetric("rewardMean", "Mean reward of all answers"),
                TaskMetric("rewardMin", "Lowest reward"),
                TaskMetric("rewardMax", "Highest reward"),
            ),
        ),
    ),
    "grpo": TaskInfo(
        modality="text",
        pipeline_tag="text-generation",
        auto_model="CausalLM",
        peft_task_type="CAUSAL_LM",
        tags=("grpo", "trl"),
        training=TrainingTask(
            columns={"prompt": "prompt"},
            formats=TABLE_FORMATS,
            sequences=1,
            methods=COMPARED,
            quantizations=("nf4", "fp4", "int8"),
            strategies=UNSHARDED,
            why={
                "methods": LORA_ALONE,
                "strategies": "with ZeRO-3 and FSDP each token would have to be written from shards",
            },
            settings="grpo",
            options={name: default for name, default in TEXT_OPTIONS.items() if name != "training.groupByLength"}
            | TEMPLATE_OPTIONS,
            metrics=(
                TaskMetric("reward", "Mean reward", better="higher"),
                TaskMetric("rewardStd", "Standard deviation of the rewards"),
                TaskMetric("kl", "Distance from the reference model (nats a token)"),
                TaskMetric("completionLength", "Tokens of a completion"),
                TaskMetric("clippedShare", "Share of completions that were cut off"),
                TaskMetric("zeroVarianceShare", "Share of prompts whose completions all have the same reward"),
                TaskMetric("trainReward", "Mean reward of the last reports of the training"),
            ),
        ),
    ),
    "image-classification": TaskInfo(
        modality="image",
        pipeline_tag="image-classification",
        auto_model="ImageClassification",
        head=True,
        training=TrainingTask(
            columns={"image": "image", "label": "label"},
            formats=IMAGE_FORMATS,
            methods=OF_IMAGES,
            why={
                "methods": "virtual tokens stand before tokens, which images lack, and qlora needs linear layers",
                "quantizations": "a model that looks at images may be made of convolutions, which stay as they are",
            },
            settings="classification",
            options=RESULT_OPTIONS
            | PEFT_OPTIONS
            | LABEL_OPTIONS
            | SMOOTHING_OPTIONS
            | SAVED_OPTIONS
            | {"training.augmentation": None},
            metrics=LABEL_METRICS,
        ),
        generation=GenerationTask(
            columns={"image": "image"},
            optional_columns={},
            settings="classify",
            options=RESULT_OPTIONS | QUANTIZED_OPTIONS,
        ),
    ),
    "audio-classification": TaskInfo(
        modality="audio",
        pipeline_tag="audio-classification",
        auto_model="AudioClassification",
        head=True,
        unused=("masked_spec_embed",),
        training=TrainingTask(
            columns={"audio": "audio", "label": "label"},
            formats=AUDIO_FORMATS,
            methods=OF_AUDIO,
            strategies=UNSHARDED,
            why=AUDIO_LIMITS,
            settings="classification",
            options=AUDIO_OPTIONS | LABEL_OPTIONS | SMOOTHING_OPTIONS,
            metrics=LABEL_METRICS,
        ),
    ),
    "speech-recognition": TaskInfo(
        modality="speech",
        pipeline_tag="automatic-speech-recognition",
        auto_model="SpeechSeq2Seq",
        training=TrainingTask(
            columns={"audio": "audio", "text": "text"},
            formats=AUDIO_FORMATS,
            sequences=1,
            methods=OF_AUDIO,
            strategies=UNSHARDED,
            why=AUDIO_LIMITS,
            settings="speech",
            options=AUDIO_OPTIONS | SMOOTHING_OPTIONS | {"training.maxLength": 448},
            metrics=SPEECH_METRICS,
        ),
    ),
    "text-generation": TaskInfo(
        modality="text",
        pipeline_tag="text-generation",
        auto_model="CausalLM",
        peft_task_type="CAUSAL_LM",
        generation=GenerationTask(
            columns={"prompt": "prompt"},
            optional_columns={TOOLS: None, "seed": "seed"},
            settings="text",
            options=RESULT_OPTIONS
            | QUANTIZED_OPTIONS
            | {"text.chat": False, "text.jsonSchema": None, "text.systemPrompt": None, "text.regex": None}
            | {"inputs.form": "columns", "text.offload": "none"},
            metrics=WRITTEN_METRICS,
        ),
    ),
    "text-to-image": TaskInfo(
        modality="image",
        pipeline_tag="text-to-image",
        training=TrainingTask(
            columns={"image": "image", "text": "text"},
            optional_columns={"prior": None},
            formats=IMAGE_FORMATS,
            methods=("lora",),
            strategies=("auto", "ddp"),
            why={
                "methods": "diffusers loads LoRA files, and no others",
                "strategies": "diffusers cannot load a model in the shards of ZeRO-3 or FSDP, and for ZeRO-2 an adapter"
                " is too small",
                "quantizations": "a model that looks at images is made of convolutions, which stay as they are",
            },
            settings="image",
            metrics=(),
        ),
        generation=GenerationTask(
            columns={"prompt": "prompt"},
            optional_columns={"negativePrompt": "negative_prompt", "seed": "seed"},
            settings="image",
            options={"adapters[].file": None, "image.refiner": None, "hub.contactSheet": None},
        ),
    ),
    "zero-shot-classification": TaskInfo(
        modality="text",
        pipeline_tag="zero-shot-classification",
        auto_model="SequenceClassification",
        peft_task_type="SEQ_CLS",
        head=True,
        generation=GenerationTask(
            columns={"text": "text"},
            optional_columns={},
            settings="zeroShot",
            options=READING_OPTIONS,
            metrics=SEVERAL_LABEL_METRICS,
        ),
    ),
    "fill-mask": TaskInfo(
        modality="text",
        pipeline_tag="fill-mask",
        auto_model="MaskedLM",
        generation=GenerationTask(
            columns={"text": "text"},
            optional_columns={},
            settings="mask",
            options=READING_OPTIONS,
        ),
    ),
    "feature-extraction": TaskInfo(
        modality="text",
        pipeline_tag="feature-extraction",
        auto_model="",
        peft_task_type="FEATURE_EXTRACTION",
        unused=("pooler",),
        generation=GenerationTask(
            columns={"text": "text"},
            optional_columns={},
            settings="embedding",
            options=READING_OPTIONS,
        ),
    ),
    "summarization": SEQ2SEQ,
    "translation": replace(SEQ2SEQ, pipeline_tag="translation"),
    "text2text-generation": replace(SEQ2SEQ, pipeline_tag="text2text-generation"),
    "image-to-text": TaskInfo(
        modality="image",
        pipeline_tag="image-to-text",
        auto_model="ImageTextToText",
        unused=("pooler",),
        generation=GenerationTask(
            columns={"image": "image"},
            optional_columns={SEED: "seed"},
            settings="text",
            options=QUANTIZED_OPTIONS,
        ),
    ),
    "image-to-image": TaskInfo(
        modality="image",
        pipeline_tag="image-to-image",
        generation=GenerationTask(
            columns={"prompt": "prompt", "initImage": "image"},
            optional_columns={"negativePrompt": "negative_prompt", "mask": "mask", SEED: "seed"},
            settings="image",
            options={"adapters[].file": None, "image.strength": 0.8, "hub.contactSheet": None},
        ),
    ),
    "automatic-speech-recognition": TaskInfo(
        modality="speech",
        pipeline_tag="automatic-speech-recognition",
        auto_model="SpeechSeq2Seq",
        generation=GenerationTask(
            columns={"audio": "audio"},
            optional_columns={},
            settings="transcribe",
            options=RESULT_OPTIONS | QUANTIZED_OPTIONS,
            metrics=SPEECH_METRICS,
        ),
    ),
}

TRAINING_TASKS: Mapping[str, TrainingTask] = {name: info.training for name, info in TASKS.items() if info.training}
"""The training halves of the rows that have one."""
GENERATION_TASKS: Mapping[str, GenerationTask] = {
    name: info.generation for name, info in TASKS.items() if info.generation
}
"""The generation halves of the rows that have one."""


def training_tasks(suits: Callable[[TrainingTask], bool]) -> tuple[str, ...]:
    """Names of the tasks of a FineTuneJob whose training half `suits`."""
    return tuple(name for name, task in TRAINING_TASKS.items() if suits(task))


def generation_tasks(suits: Callable[[GenerationTask], bool]) -> tuple[str, ...]:
    """Names of the tasks of a GenerateJob whose generation half `suits`."""
    return tuple(name for name, task in GENERATION_TASKS.items() if suits(task))
