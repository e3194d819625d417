"""FineTuneJob: adapt a model to a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from luthier_api.attention import ATTENTIONS
from luthier_api.base import SET, ApiModel, Format, Rule, map_by
from luthier_api.decides import BUDGET, CIRCUMSTANCES, LAYOUT, PLACE, PUBLICATION, RESULT
from luthier_api.formats import FORMATS, DatasetFormat
from luthier_api.forms import LOSSES_OF_FORMS, LossOn, RowForm, TemplateName
from luthier_api.marks import For, Table, TabledSpec, by_table, works_with
from luthier_api.methods import METHODS, QUANTIZATIONS, STRATEGIES, MethodType, ParameterPrecision, Strategy
from luthier_api.optimizers import OPTIMIZERS
from luthier_api.quantity import Bytes, Cores, GpuBytes
from luthier_api.rewards import FIELDS as REWARD_FIELDS
from luthier_api.rewards import REWARDS, RewardType
from luthier_api.rows import Deduplicate, Mix, RowFilter
from luthier_api.schedules import EVAL_INTERVALS, SAVE_INTERVALS, SCHEDULES
from luthier_api.scheduling import Scheduling
from luthier_api.spec import (
    DatasetSource,
    Hub,
    JobControl,
    JobName,
    KeyName,
    ModelSource,
    ObjectName,
    Path,
    PhaseResources,
    PrepareResources,
    Repository,
    Revision,
    ShortText,
    Volumes,
    Workspace,
    alone_on_its_claim,
    at_most_one,
    exactly_one,
    source_rules,
    train_alone,
)
from luthier_api.stores import Stores
from luthier_api.tasks import BEST_METRICS, EVAL_LOSS, TASKS, TEXT_OPTIONS, TRAINING_TASKS, FineTuneTask
from luthier_api.trackers import TRACKERS, TrackerType
from luthier_api.training import Training
from luthier_api.variants import rules as type_rules


class Columns(ApiModel):
    """Which columns of the dataset play which role."""

    text: Annotated[ShortText, For("task")] = by_table()
    """The text to learn (causal-lm) or to classify (text-classification), or the caption of the image (text-to-image).
    """
    prompt: Annotated[ShortText, For("task")] = by_table()
    """The text that the completion or both answers continue, which follow it directly, without a blank between them; or
    messages. For causal-lm also the instruction of Alpaca. For preference and reward, rows need not have it: then it is
    what both answers begin with alike.
    """
    completion: Annotated[ShortText | None, For("task")] = by_table()
    """What the model shall write after the prompt: text, or messages. For preference with lossType kto, the answer that
    the label rates.
    """
    messages: Annotated[ShortText | None, For("task")] = by_table()
    """A conversation: a list of messages with role (system, user, assistant, tool) and content; in ShareGPT, from and
    value. One with the weight 0 is read, but not learnt.
    """
    tools: Annotated[ShortText | None, For("task")] = by_table()
    """The tools that a conversation can call, as JSON schemas. Used where there is such a column."""
    system: Annotated[ShortText | None, For("task")] = by_table()
    """The system message of a row of ShareGPT or Alpaca. Used where there is such a column."""
    input: Annotated[ShortText | None, For("task")] = by_table()
    """What an instruction of Alpaca is about. Used where there is such a column."""
    chosen: Annotated[ShortText, For("task")] = by_table()
    """The answer to prefer: text, or messages, with or without those of the prompt."""
    rejected: Annotated[ShortText, For("task")] = by_table()
    """The answer to avoid: as `chosen`."""
    image: Annotated[ShortText, For("task")] = by_table()
    """The image to classify or to learn, with 8 bits a channel."""
    label: Annotated[ShortText, For("task")] = by_table()
    """The class of a row: a name or a number. Images in folders have it by the folder's name: FOLDER/CLASS/image.png.
    For preference with lossType kto, whether the answer is good: true or false, or 1 or 0.
    """


class ChatTemplate(ApiModel):
    """How messages are written as text: exactly one of name, file and text."""

    name: TemplateName | None = None
    """A template that Luthier brings. zephyr and alpaca end each turn with the end-of-text token of the model, and suit
    any model; chatml needs the tokens <|im_start|> and <|im_end|>.
    """
    file: Path | None = None
    """A file inside the pods with a Jinja template: chat_template.jinja, or a tokenizer_config.json that has one."""
    text: Annotated[str | None, Field(min_length=1, max_length=65536)] = None
    """A Jinja template. Text between {% generation %} and {% endgeneration %} is what the assistant writes."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("name", "file", "text"), "spec.dataset.chatTemplate: set exactly one of name, file and text"),
    )


STREAMS = "has(self{0}.streaming) && self{0}.streaming"
"""CEL: whether rows are read while the model learns."""


def of_streaming() -> Iterator[Rule]:
    """Yield the rules of what in `dataset` cannot be had of rows that are not known before the training."""
    not_streamed = f"!({STREAMS.format('')})"
    for field, remedy in (
        ("mix", "with streaming there is one source; name it in dataset, or remove streaming"),
        ("deduplicate", "would have to know all rows; remove it, or remove streaming"),
        (
            "evalFraction",
            "is a share of an unknown number of rows; use evalSplit: train[:1000], with split:"
            " train[1000:], or evalFiles",
        ),
    ):
        yield Rule(f"{not_streamed} || !has(self.{field})", f"dataset.{field}: {remedy}")
    streamed = [name for name, info in FORMATS.items() if info.streamed]
    yield Rule(
        f"{not_streamed} || !has(self.format) || self.format in {streamed}",
        f"dataset.format: files of {', '.join(streamed)} are streamed; choose one of these, or remove streaming",
    )
    for field, part, example in (
        ("split", "[0-9]+:", "train or train[1000:]"),
        ("evalSplit", ":[0-9]+", "test, test[:1000] or train[:1000]"),
    ):
        pattern = f"^[-._a-zA-Z0-9]+([^-._a-zA-Z0-9]{part}.)?$"  # brackets, which CEL would want escaped
        yield Rule(
            f"{not_streamed} || !has(self.{field}) || self.{field}.matches('{pattern}')",
            f"dataset.{field}: a stream has no known end, of which a share could be taken; write {example}",
        )
    yield Rule(
        f"!has(self.shuffleBuffer) || {STREAMS.format('')}",
        "dataset.shuffleBuffer: belongs to streaming, without which all rows are shuffled; set streaming: true, or"
        " remove it",
    )


class TrainingData(DatasetSource):
    """The rows to learn from, and those held out to measure with."""

    mix: Mix | None = None
    """Several sources of rows, instead of `id` and `files`."""
    split: ShortText = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: ShortText | None = None
    """Split to evaluate on; slices work."""
    eval_files: Annotated[list[Path] | None, Field(min_length=1, max_length=256)] = None
    """Files to evaluate on."""
    eval_fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of the training rows, chosen by `training.seed`, that is held out to evaluate on. Rows with equal content
    are all learnt or all held out.
    """
    filter: RowFilter | None = None
    """Which rows are used."""
    streaming: Annotated[bool, For("task")] = by_table()
    """Read the rows while the model learns, instead of preparing them all in the workspace: for data that does not fit
    there. `training.maxSteps` says when the training ends; `prepare` looks at the first rows only. docs/data.md says
    what else is different.
    """
    shuffle_buffer: Annotated[int | None, Field(ge=0, le=1_000_000), For("task")] = by_table()
    """With `streaming`: encoded rows in a row of the stream that are shuffled with each other; 10,000 when left out.
    Files are then read in random order, too. 0: the order of the files. A process keeps twice as many in memory.
    """
    deduplicate: Deduplicate | None = None
    """exact: of rows with equal content the first one is learnt, and none that is equal to a held-out row; each of
    `evalSplit` and `evalFiles` is held out once. Content is equal if it is so after Unicode's NFKC, in lower case and
    with one blank for all blanks in a row; an image is its file.
    """
    columns: Columns = Field(default_factory=Columns)
    form: Annotated[RowForm | None, For("task")] = by_table()
    """What rows are: text; prompt-completion; messages, a conversation; sharegpt or alpaca, which are converted to
    messages. When left out, the columns tell: those that are named in `columns`, or else those of the file.
    """
    chat_template: Annotated[ChatTemplate | None, For("task")] = by_table()
    """How messages are written as text. When left out, by the template of the model's tokenizer. The result has the
    template with which it was trained.
    """
    parse_special_tokens: Annotated[bool, For("task")] = by_table()
    """Whether control tokens that a text spells, such as </s> or <|im_end|>, become these tokens. Set it for texts that
    were made with a chat template. Otherwise such spellings are ordinary text.
    """
    merge_labels: Annotated[bool, For("task")] = by_table()
    """Whether labels that differ only in blanks, in capitals or in how a number is written (7, 007, 7.0) are one class,
    which is named as most of its rows have it. They are shown in any case.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *source_rules("dataset", "mix"),
        Rule(
            "!has(self.mix) || (self.split == 'train' && !has(self.evalSplit) && !has(self.evalFiles))",
            "dataset.mix: split and evalSplit belong to each of its sources, and there are no evalFiles; name them"
            " there, or use evalFraction",
        ),
        train_alone("split"),
        train_alone("evalSplit"),
        Rule(
            "!has(self.evalSplit) || self.evalSplit != self.split",
            "dataset.evalSplit: is also the training split; choose another split, or parts that do not overlap, such as"
            " train[:90%] and train[90%:]",
        ),
        Rule(
            at_most_one("evalSplit", "evalFiles", "evalFraction"),
            "dataset: set at most one of evalSplit, evalFiles and evalFraction",
        ),
        Rule(
            "!has(self.evalFiles) || has(self.files)",
            "dataset.evalFiles: belongs to dataset.files; use evalSplit for a Hub dataset",
        ),
        *of_streaming(),
    )


Pattern = Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=64)]
Layer = Annotated[int, Field(ge=0, le=10_000)]


InitLoraWeights = Annotated[
    str,
    Format(
        "^(gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]{1,2}|loftq)$",
        "must be gaussian, orthogonal, olora, pissa, pissa_niter_N, for example pissa_niter_16, or loftq",
    ),
]


class Method(ApiModel):
    """Which weights learn, and how."""

    type: MethodType = "lora"
    """full: all weights. lora: low-rank adapters on a frozen model. qlora: the common name of lora on a model whose
    linear layers are quantised to 4 bits (`model.quantization.type: nf4`).
    """
    rank: Annotated[int, Field(ge=1, le=1024), For("method")] = by_table()
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1, le=4096), For("method")] = by_table()
    """Scale of the adapters: their output counts alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), For("method")] = by_table()
    """Dropout before the adapters. Adapters on the experts of a mixture of experts have none."""
    target_modules: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method")] = by_table()
    """Modules that get an adapter: all-linear, or names such as q_proj, or regular expressions for the end of the names
    of linear modules; for the experts of a mixture of experts, their parameters' names, such as gate_up_proj.
    """
    rslora: Annotated[bool, For("method"), For("task")] = by_table()
    """Scale the adapters' output by alpha / sqrt(rank) instead of alpha / rank, so that a large rank learns as fast as
    a small one (rsLoRA, arXiv:2312.03732).
    """
    dora: Annotated[bool, For("method"), For("task")] = by_table()
    """Learn the norm of each row of the weights beside its direction (DoRA, arXiv:2402.09353)."""
    rank_pattern: Annotated[Pattern, For("method"), For("task")] = by_table()
    """Name of modules, or a regular expression for the end of their names → their rank instead of `rank`. The first one
    that matches counts.
    """
    alpha_pattern: Annotated[Pattern, For("method"), For("task")] = by_table()
    """The same for `alpha`."""
    layers: Annotated[list[Layer], Field(min_length=1, max_length=1000), For("method"), For("task")] = by_table()
    """Numbers of the layers that get adapters, from 0; all when left out."""
    init_lora_weights: Annotated[InitLoraWeights, For("method"), For("task")] = by_table()
    """What adapters begin as, by PEFT's names. When left out: A is random and B zero. gaussian: another random A.
    orthogonal: both random, with a product of zero (even ranks only). pissa: the largest singular values of the weights
    (arXiv:2404.02948); pissa_niter_16: the same with a fast approximation. olora: their QR decomposition
    (arXiv:2406.01775). With pissa and olora the base stays as it is, and the result is an adapter of twice the rank.
    loftq: what the base in nf4 or fp4 has lost (arXiv:2310.08659, one iteration); the result fits the base in that type
    alone, and model.job of other jobs merges it so.
    """
    bias: Annotated[Literal["none", "all", "lora_only"], For("method"), For("task")] = by_table()
    """Biases of the model that are trained beside the adapters, and saved with them. all: all of them. lora_only: those
    of modules with an adapter. vLLM loads no such adapters; merge them for it.
    """
    modules_to_save: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method"), For("task")] = (
        by_table()
    )
    """Modules that are trained whole beside the adapters, and saved with them, such as embed_tokens, lm_head or norm.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.targetModules) || !('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            "method.targetModules: all-linear takes every module already; write it alone, or list names only",
        ),
    )


class Preference(ApiModel):
    """How a model learns to prefer answers."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """How strongly the model is held to the one it started from: larger values change it less."""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "kto"] = "sigmoid"
    """Of pairs of answers: sigmoid, DPO (arXiv:2305.18290); robust, DPO for pairs of which some are the wrong way round
    (arXiv:2403.00409), as many as `labelSmoothing` says; hinge, SLiC (arXiv:2305.10425); ipo, IPO (arXiv:2310.12036),
    which overfits less where one answer is always preferred. Of answers that are good or bad each:
    kto, KTO (arXiv:2402.01306), for rows with the columns completion and label; it takes pairs apart.
    """
    label_smoothing: Annotated[float | None, Field(gt=0, lt=0.5)] = None
    """With robust: the share of pairs whose answers are the wrong way round."""
    desirable_weight: Annotated[float | None, Field(gt=0, le=100)] = None
    """With kto: how much a good answer counts. When neither weight is set, the rarer kind of answers gets the weight
    with which both kinds count alike, and the status says so.
    """
    undesirable_weight: Annotated[float | None, Field(gt=0, le=100)] = None
    """With kto: how much a bad answer counts."""
    precompute_reference: bool = False
    """Compute what the reference model says of all rows once, before the first step, and keep it in the workspace. It
    takes memory for one model less with method full, and time for one pass less in each epoch. Not with kto, which also
    compares answers to other prompts, in each step others.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.lossType == 'kto' || !has(self.desirableWeight) && !has(self.undesirableWeight)",
            "preference: desirableWeight and undesirableWeight apply to lossType kto; remove them, or choose it",
        ),
        Rule(
            "self.lossType != 'kto' || !self.precomputeReference",
            "preference.precomputeReference: not with lossType kto, which compares answers to other prompts in each"
            " step; remove it, or choose sigmoid, robust, hinge or ipo for pairs",
        ),
        Rule(
            "(self.lossType == 'robust') == has(self.labelSmoothing)",
            "preference.labelSmoothing: robust needs it, and the other losses ignore it; set lossType: robust and, for"
            " example, labelSmoothing: 0.1, or remove both",
        ),
    )


class Reward(ApiModel):
    """How a model learns to rate answers."""

    center_rewards_coefficient: Annotated[float | None, Field(gt=0, le=1)] = None
    """How strongly the mean of all rewards is held at 0 (arXiv:2312.09244); 0.01 is usual. When left out, only
    differences between answers to the same prompt mean something.
    """


class RewardModel(ApiModel):
    """Where a reward model comes from: exactly one of id, path and job."""

    id: Repository | None = None
    """Repository on the Hub with a model for sequence classification that has one output."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods, for example on one of `volumes`."""
    job: JobName | None = None
    """A FineTuneJob of the same namespace with the task reward. An adapter is merged into its base."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "path", "job"), "model: set exactly one of id, path and job"),
        Rule(
            "!has(self.revision) || has(self.id)",
            "model.revision: only a model of the Hub has revisions; set id or remove it",
        ),
    )


def of_reward_types() -> Iterator[Rule]:
    """Yield the rules that a field belongs to some types of rewards only, and that a type needs a field."""
    for field in REWARD_FIELDS:
        types = [name for name, info in REWARDS.items() if field in info.needs + info.takes]
        yield Rule(
            f"!has(self.{field}) || self.type in {types}",
            f"rewards.{field}: applies to {', '.join(types)}; remove it, or choose another type",
        )
    for name, info in REWARDS.items():
        for field in info.needs:
            yield Rule(
                f"self.type != '{name}' || has(self.{field})", f"rewards.{field}: a reward of type {name} needs it"
            )


FunctionName = Annotated[
    str,
    Field(max_length=253),
    Format("^[A-Za-z_][A-Za-z0-9_]*$", "must be the name of a function of Python, such as reward"),
]


class RewardFunction(ApiModel):
    """A number for each completion, of which more is better."""

    type: RewardType
    """exactMatch: 1 if the completion, without blanks around it, is the text in `column` of its row, else 0. regex: 1
    if `pattern` is found in it, else 0. length: 1 for a completion of `tokens` tokens, and less in proportion to its
    distance from there, down to 0. json: 1 if it is a JSON value, else 0. model: the output of a reward model. python:
    what a function of your own returns, where the administrator allows it (`jobs.pythonRewards` of the chart).
    """
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """Factor in the sum of all rewards. A negative one makes less of it better."""
    column: ShortText | None = None
    """Column of the dataset with the text to match (exactMatch)."""
    pattern: Annotated[str | None, Field(min_length=1, max_length=1000)] = None
    """Regular expression of Python (regex). With exactMatch: what its first group finds last in the completion is
    compared, so that a model may explain its answer.
    """
    tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Tokens of a completion (length), with its end-of-text token."""
    shorter: bool | None = None
    """Whether shorter completions are as good (length); false when left out."""
    keys: Annotated[list[ShortText] | None, Field(min_length=1, max_length=64)] = None
    """Keys that the value must have, which must then be an object (json)."""
    model: RewardModel | None = None
    """The reward model (model)."""
    file: Path | None = None
    """Python file inside the pods, for example of a config map in `volumes` (python). `prepare` tries the function and
    keeps a copy of the file, which the training uses. The function runs in a process of its own, without credentials.
    """
    function: FunctionName | None = None
    """Function of `file`; `reward` when left out (python). It is called as TRL calls its own, with the keywords
    `prompts`, `completions`, `completion_ids` and `columns`, and returns a number for each completion.
    """
    columns: Annotated[list[ShortText] | None, Field(min_length=1, max_length=32)] = None
    """Columns of the dataset that the function gets by their names (python)."""
    timeout_seconds: Annotated[int | None, Field(ge=1, le=86400)] = None
    """Seconds within which the function has to rate the completions of a step (python); 60 when left out. A function
    that takes longer ends the training.
    """

    rules: ClassVar[tuple[Rule, ...]] = tuple(of_reward_types())


class Grpo(ApiModel):
    """How a model learns from rewards for what it writes (GRPO, arXiv:2402.03300)."""

    rewards: Annotated[list[RewardFunction], Field(max_length=8)] = Field(default_factory=list)
    """What is rewarded. The rewards of a completion are multiplied by their weights and added."""
    generations: Annotated[int, Field(ge=2, le=256)] = 8
    """Completions of each prompt, which are compared with each other. batchSize counts completions, and is a multiple
    of it.
    """
    max_completion_length: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Tokens after which a completion is cut off. Prompts have training.maxLength tokens less these at most."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Of the sampling: higher values make completions more diverse."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that the sampled tokens have together."""
    beta: Annotated[float, Field(ge=0, le=10)] = 0.0
    """How strongly the model is held to the one it started from. 0: not at all, and no reference model is in memory."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """dapo: the mean over all tokens of a step (arXiv:2503.14476). grpo: the mean over the tokens of each completion
    first. dr_grpo: the sum over tokens by maxCompletionLength (arXiv:2503.20783), without a preference for lengths.
    """
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By which standard deviation rewards are divided: over the completions of a prompt, over those of the step, or by
    none.
    """
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss. They are rewarded in any case."""

    @property
    def runs_code(self) -> bool:
        """Whether code of the user runs in the pods."""
        return any(reward.type == "python" for reward in self.rewards)


class TrainingImages(ApiModel):
    """How images are shown to a model that learns to make them."""

    resolution: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    """Pixels of both sides, a multiple of 8. Of an image the middle is taken, scaled to this size. The models of Stable
    Diffusion XL were trained with 1024.
    """


class TrainingResources(ApiModel):
    """The pods that train: one a node."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods, each on a node of its own where there are enough."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each pod, one process on each. 0: train on CPU."""
    processes_per_node: Annotated[int | None, Field(ge=1, le=64)] = None
    """Processes of each pod of a CPU job; 1 when left out."""
    gpu_class: Annotated[ObjectName | None, LAYOUT] = None
    """Kind of GPU, by the name that the administrator has given it (`gpuClasses` of the chart): which resource is
    requested, on which nodes, and for how much memory the run is planned. Left out: that of the namespace, or else any
    GPU.
    """
    gpu_memory: Annotated[GpuBytes | None, LAYOUT] = None
    """Memory of one GPU, for which the run is planned, for example 80Gi. Left out: that of the class of GPUs, if the
    administrator has given it. Only the plan depends on it: it requests nothing.
    """
    cpu: Annotated[Cores | None, CIRCUMSTANCES] = None
    """CPU request of each pod, in cores, for example 16 or 500m; none when left out."""
    memory: Annotated[Bytes | None, CIRCUMSTANCES] = None
    """Memory request and limit of each pod, for example 64Gi; neither when left out."""
    ephemeral_storage: Annotated[Bytes | None, CIRCUMSTANCES] = None
    """Local disk of each pod for /tmp, as request and limit, for example 50Gi. Left out: no request, and the limit that
    the administrator has set (`jobs.tmpSize` of the chart; 20Gi if they have not).
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gpuClass) || self.gpusPerNode > 0",
            "resources.gpuClass: the job requests no GPUs; remove it, or set gpusPerNode",
        ),
        Rule(
            "!has(self.gpuMemory) || self.gpusPerNode > 0",
            "resources.gpuMemory: the job requests no GPUs; remove it, or set gpusPerNode. On CPU a run is planned for"
            " resources.memory",
        ),
        Rule(
            "!has(self.processesPerNode) || self.gpusPerNode == 0",
            "resources.processesPerNode: a GPU job runs one process a GPU; remove it, or set gpusPerNode: 0 to train"
            " on CPU",
        ),
    )

    @property
    def gpus_per_pod(self) -> int:
        return self.gpus_per_node

    @property
    def processes(self) -> int:
        """Processes of each pod."""
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes over all pods."""
        return self.nodes * self.processes


class Restarts(ApiModel):
    """How often a failed run is started again."""

    max: Annotated[int, Field(ge=0, le=100)] = 3
    """Restarts after failures of the infrastructure. User errors are never retried, and preemptions do not count. Read
    when the run is created: to apply a change to a running job, suspend and resume it.
    """


TrackerUrl = Annotated[
    str,
    Field(max_length=2048),
    Format(
        "^https?://[^/@? ]+(/[^? ]*)?$",
        "must be an address such as http://mlflow.mlops.svc:5000, without a name, a password or a token in it, which"
        " belong into the Secret of secretRef",
    ),
]


class TrackerKeys(ApiModel):
    """Which key of a Secret holds which credential of a tracker."""

    token: KeyName | None = None
    """Token, sent as a bearer (mlflow)."""
    username: KeyName | None = None
    """Name of the user, together with `password` (mlflow)."""
    password: KeyName | None = None
    """Password of the user (mlflow)."""
    api_key: KeyName | None = None
    """API key (wandb)."""
    write_token: KeyName | None = None
    """Write token of the server, or a token of the Hub that may write to the Space (trackio)."""


class TrackerSecret(ApiModel):
    """Credentials of a tracker in a Secret of the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    keys: TrackerKeys
    """Keys of the Secret, for example {username: user, password: password}."""

    def credentials(self) -> dict[str, str]:
        """Credential → key of the Secret, for `luthier_api.secrets`."""
        return {name: str(key) for name, key in self.keys.dump().items()}


class Tracker(ApiModel):
    """A program that shows the course of the training."""

    type: TrackerType
    """tensorboard: event files in the folder `tracking/tensorboard` of the workspace. They have the losses, the
    learning rate, the norms of gradients and the metrics of evaluations by step, and this spec. mlflow: a run on a
    tracking server, by its REST API. wandb: a run of Weights & Biases; without `secretRef` in the folder
    `tracking/wandb` of the workspace, for `wandb sync`; the trainer image must have its package. trackio: a run on a
    trackio server, or on a Space of the Hub.
    """
    url: TrackerUrl | None = None
    """Address of the tracking server, which the pods of `run` must reach (mlflow; trackio, for a Space
    https://OWNER-NAME.hf.space; wandb: https://api.wandb.ai when left out).
    """
    experiment: ShortText | None = None
    """Experiment (mlflow) or project (wandb, trackio) of the run, created where there is none; the namespace when
    left out.
    """
    run_name: ShortText | None = None
    """Name of the run (mlflow, wandb, trackio); that of the job when left out."""
    tags: Annotated[dict[str, ShortText] | None, Field(max_length=32)] = None
    """Tags of the run (mlflow, and as KEY:VALUE wandb), besides those that Luthier sets."""

    secret_ref: TrackerSecret | None = None
    """Credentials of the tracker: `token`, or `username` and `password` (mlflow); `apiKey` (wandb); `writeToken`
    (trackio). Only the pods of `run` get them. Without the Secret, or one of its keys, the training goes on and is not
    tracked there.
    """

    rules: ClassVar[tuple[Rule, ...]] = tuple(type_rules("tracking", TRACKERS))


METHODS_OF_TASKS = {name: task.methods for name, task in TRAINING_TASKS.items()}
FORMATS_OF_TASKS = {name: task.formats for name, task in TRAINING_TASKS.items()}
QUANTIZATIONS_OF_TASKS = {name: task.quantizations for name, task in TRAINING_TASKS.items()}
QUANTIZATIONS_OF_METHODS = {name: method.quantizations for name, method in METHODS.items()}
METRICS_OF_TASKS = {
    name: (EVAL_LOSS, *(metric.name for metric in task.metrics if metric.better))
    for name, task in TRAINING_TASKS.items()
}
STRATEGIES_OF_TASKS = {name: task.strategies for name, task in TRAINING_TASKS.items()}
METHODS_OF_OPTIMIZERS = {name: optimizer.methods for name, optimizer in OPTIMIZERS.items()}
STRATEGIES_OF_OPTIMIZERS = {name: optimizer.strategies for name, optimizer in OPTIMIZERS.items()}
PARAMETERS_OF_OPTIMIZERS = {name: optimizer.parameters for name, optimizer in OPTIMIZERS.items()}
SCHEDULES_OF_OPTIMIZERS = {name: optimizer.schedules for name, optimizer in OPTIMIZERS.items()}
STRATEGIES_OF_METHODS = {name: method.strategies for name, method in METHODS.items()}
STRATEGIES_OF_QUANTIZATIONS = {name: quantization.strategies for name, quantization in QUANTIZATIONS.items()}

COMPUTE_LOGITS = [
    name for name, info in TASKS.items() if info.training and info.auto_model == "CausalLM" and "trl" in info.tags
]
"""Tasks whose trainer computes the logits itself, from the weights of the output layer."""
NO_ROWS_IN_ADAPTER = (
    "self.method.type == 'full' || !(has(self.model.addSpecialTokens) || has(self.model.resizeEmbeddings) &&"
    " self.model.resizeEmbeddings)"
)
"""CEL: no adapter holds rows of the embedding for new tokens."""


BEGINS_RANDOM = "!has(self.method.initLoraWeights) || self.method.initLoraWeights == 'gaussian'"
"""CEL: the beginning of adapters does not depend on the weights."""
NO_LOFTQ = "!has(self.method.initLoraWeights) || self.method.initLoraWeights != 'loftq'"
"""CEL: adapters do not begin as what quantised weights have lost."""
FOUR_BITS = [name for name, quantization in QUANTIZATIONS.items() if quantization.bits == 4]
IN_FP32 = "!has(self.training.parameterPrecision) || self.training.parameterPrecision == 'fp32'"
"""CEL: the weights that learn rest in fp32."""
ON_GPUS = [name for name, attention in ATTENTIONS.items() if attention.gpu]
OF_PACKED_ROWS = [name for name, attention in ATTENTIONS.items() if attention.packed_only]
IN_16_BITS = [name for name, attention in ATTENTIONS.items() if attention.half]
COMPARED_WITHOUT = [
    name
    for name, task in TRAINING_TASKS.items()
    if "method.initLoraWeights" in task.options and "method.bias" not in task.options
]
"""Tasks that switch the adapter off to make a reference model (see `tasks.SAVED_OPTIONS`)."""


class FineTuneJobSpec(JobControl, TabledSpec):
    """Model, dataset, method and resources of a fine-tuning, and where its result goes."""

    tables: ClassVar[Mapping[str, Table]] = {
        "task": Table(TRAINING_TASKS, selector="task", noun="task"),
        "method": Table(METHODS, selector="method.type", noun="method"),
        "optimizer": Table(OPTIMIZERS, selector="training.optimizer", noun="optimizer"),
        "schedule": Table(SCHEDULES, selector="training.schedule", noun="schedule"),
        "eval_every": Table(EVAL_INTERVALS, selector="training.evalEvery", noun="evalEvery"),
        "save_every": Table(SAVE_INTERVALS, selector="training.saveEvery", noun="saveEvery"),
    }

    task: Annotated[FineTuneTask, RESULT]
    """What the model learns to do."""
    model: Annotated[ModelSource, RESULT]
    dataset: Annotated[TrainingData, RESULT]
    method: Annotated[Method, RESULT] = Field(default_factory=Method)
    training: Annotated[Training, RESULT] = Field(default_factory=Training)
    preference: Annotated[Preference, RESULT, For("task")] = by_table()
    """How a model learns to prefer answers."""
    reward: Annotated[Reward, RESULT, For("task")] = by_table()
    """How a model learns to rate answers."""
    grpo: Annotated[Grpo, RESULT, For("task")] = by_table()
    """How a model learns from rewards for what it writes."""
    image: Annotated[TrainingImages, For("task"), RESULT] = by_table()
    """How images are shown to the model."""
    resources: Annotated[TrainingResources, RESULT] = Field(default_factory=TrainingResources)
    strategy: Annotated[Strategy, LAYOUT] = "auto"
    """How processes share the work. auto: one process alone, several by ddp. DeepSpeed divides over the processes what
    the optimiser keeps (zero1), gradients, too (zero2), and weights (zero3, not with a quantised model). Only the
    strategy that wrote a checkpoint can resume from it.
    """
    workspace: Annotated[Workspace, PLACE] = Field(default_factory=Workspace)
    volumes: Annotated[Volumes, CIRCUMSTANCES] = Field(default_factory=list)
    """Claims and config maps of the namespace that every pod of the job sees, read-only: data, models, prompts."""
    stores: Annotated[Stores, CIRCUMSTANCES] = Field(default_factory=list)
    """How files are read whose address begins with s3://, gs:// or az://: credentials, and the server."""
    tracking: Annotated[list[Tracker], Field(max_length=4), map_by("type"), CIRCUMSTANCES] = Field(default_factory=list)
    """Where the course of the training is shown besides metrics and log; nowhere when left out. A tracker that fails
    never stops or slows the training: the status says how many reports it has lost.
    """
    hub: Annotated[Hub | None, PUBLICATION] = None
    prepare: Annotated[PrepareResources | None, CIRCUMSTANCES] = None
    publish: Annotated[PhaseResources | None, CIRCUMSTANCES] = None
    scheduling: Annotated[Scheduling, CIRCUMSTANCES] = Field(default_factory=Scheduling)
    restarts: Annotated[Restarts, BUDGET] = Field(default_factory=Restarts)

    rules: ClassVar[tuple[Rule, ...]] = (
        alone_on_its_claim("resources.nodes", "self.resources.nodes == 1"),
        *works_with("task", METHODS_OF_TASKS, "method.type", METHODS),
        *works_with("task", FORMATS_OF_TASKS, "dataset.?format", get_args(DatasetFormat)),
        *works_with("task", QUANTIZATIONS_OF_TASKS, "model.?quantization.type", QUANTIZATIONS),
        *works_with("dataset.?form", LOSSES_OF_FORMS, "training.?lossOn", get_args(LossOn)),
        *works_with("method.type", QUANTIZATIONS_OF_METHODS, "model.?quantization.type", QUANTIZATIONS),
        *works_with("task", STRATEGIES_OF_TASKS, "strategy", STRATEGIES),
        *works_with("method.type", STRATEGIES_OF_METHODS, "strategy", STRATEGIES),
        *works_with("model.?quantization.type", STRATEGIES_OF_QUANTIZATIONS, "strategy", STRATEGIES),
        *works_with("task", METRICS_OF_TASKS, "training.?metric", BEST_METRICS),
        Rule(
            f"!(self.task in {COMPUTE_LOGITS}) || {NO_ROWS_IN_ADAPTER}",
            "spec.model: TRL (1.16) computes the logits of this task without what an adapter holds of the output layer;"
            " use method.type: full, or add the tokens in a job of task causal-lm and name it in model.job",
        ),
        Rule(
            f"!self.strategy.startsWith('zero3') || {NO_ROWS_IN_ADAPTER}",
            "spec.model: PEFT (0.21) reads the rows of new tokens from an embedding that ZeRO-3 divides in a way that"
            " has not been proven; use strategy zero2 or ddp, or remove addSpecialTokens and resizeEmbeddings",
        ),
        Rule(
            "!has(self.method.bias) || self.method.bias == 'none' || self.method.type != 'qlora' &&"
            " !has(self.model.quantization)",
            "spec.method.bias: bitsandbytes (0.50) rounds the biases of quantised modules to 16 bits in each step, in"
            " which small updates are lost; use method.type: lora without model.quantization, or remove bias",
        ),
        Rule(
            f"{BEGINS_RANDOM} || self.method.initLoraWeights == 'loftq' || self.method.type != 'qlora' &&"
            " !has(self.model.quantization)",
            "spec.method.initLoraWeights: is computed from weights or in their type, which here are of few bits; use"
            " loftq or gaussian, or method.type: lora without model.quantization",
        ),
        Rule(
            f"{NO_LOFTQ} || self.method.type == 'qlora' || has(self.model.quantization) &&"
            f" self.model.quantization.type in {FOUR_BITS}",
            "spec.method.initLoraWeights: loftq begins as what 4 bits lose of the weights; use method.type: qlora, or"
            f" model.quantization.type: {' or '.join(FOUR_BITS)}, or remove it",
        ),
        Rule(
            f"{NO_LOFTQ} || self.strategy in ['auto', 'ddp']",
            "spec.method.initLoraWeights: loftq has not been proven with DeepSpeed; use strategy auto or ddp",
        ),
        Rule(
            f"{NO_LOFTQ} || !(self.task in {COMPARED_WITHOUT})",
            "spec.method.initLoraWeights: this task switches the adapter off to compare with the model that training"
            " begins from, and with loftq a part of that model is in the adapter; use gaussian, or remove it",
        ),
        Rule(
            f"{BEGINS_RANDOM} || !self.strategy.startsWith('zero3')",
            "spec.method.initLoraWeights: ZeRO-3 divides the weights from which adapters begin; use gaussian, or"
            " strategy zero2 or ddp",
        ),
        Rule(
            f"{NO_LOFTQ} || !has(self.method.dora) || !self.method.dora",
            "spec.method.dora: PEFT (0.21) computes DoRA's magnitudes before loftq changes what they are norms of;"
            " remove dora, or initLoraWeights",
        ),
        Rule(
            f"{BEGINS_RANDOM} || self.method.initLoraWeights == 'loftq' || !has(self.method.dora) || !self.method.dora",
            "spec.method.initLoraWeights: DoRA divides by a norm of what the adapter has become, beside which its"
            " beginning cannot be subtracted; use gaussian, or remove dora",
        ),
        Rule(
            "self.task != 'grpo' || has(self.grpo) && size(self.grpo.rewards) > 0",
            "spec.grpo.rewards: the task grpo needs a reward, such as type: exactMatch with column: answer; add one",
        ),
        Rule(
            "self.task != 'grpo' || !has(self.grpo) || !self.grpo.rewards.exists(r, r.type == 'python') ||"
            " !has(self.tracking) || !self.tracking.exists(t, has(t.secretRef))",
            "spec.tracking.secretRef: the pods of run would hold credentials that the code of a reward of type python"
            " could read; remove secretRef, or that reward",
        ),
        Rule(
            "self.task != 'grpo' || !has(self.grpo) || self.training.batchSize % self.grpo.generations == 0",
            "spec.grpo.generations: training.batchSize counts completions, and must be a multiple of generations",
        ),
        Rule(
            "self.task != 'grpo' || !has(self.grpo) || self.grpo.maxCompletionLength <"
            f" (has(self.training.maxLength) ? self.training.maxLength : {TEXT_OPTIONS['training.maxLength']})",
            "spec.grpo.maxCompletionLength: leaves no room for a prompt; choose less than training.maxLength",
        ),
        *(
            Rule(f"!({STREAMS.format('.dataset')}) || {wanted}", message)
            for wanted, message in (
                (
                    "has(self.training.maxSteps)",
                    "spec.training.maxSteps: a stream has no known end, so that epochs cannot be counted; set it",
                ),
                (
                    "!has(self.training.groupByLength) || !self.training.groupByLength",
                    "spec.training.groupByLength: orders the rows of an epoch, and a stream has none; remove it, or use"
                    " packing: isolated",
                ),
                (
                    "!has(self.training.packing) || self.training.packing != 'concatenate'",
                    "spec.training.packing: concatenate joins all rows, which a stream does not know; use isolated",
                ),
                (
                    "!has(self.model.config)",
                    "spec.model.config: the tokenizer of a new model is made of all rows, which a stream does not know;"
                    " name a model by id, path or job, or remove dataset.streaming",
                ),
                (
                    "self.training.evalEvery == 'steps'",
                    "spec.training.evalEvery: a stream has no epochs; use evalSteps",
                ),
                (
                    "self.training.saveEvery == 'steps'",
                    "spec.training.saveEvery: a stream has no epochs; use saveSteps",
                ),
            )
        ),
        *works_with("training.optimizer", METHODS_OF_OPTIMIZERS, "method.type", METHODS),
        *works_with("training.optimizer", STRATEGIES_OF_OPTIMIZERS, "strategy", STRATEGIES),
        *works_with(
            "training.optimizer", PARAMETERS_OF_OPTIMIZERS, "training.?parameterPrecision", get_args(ParameterPrecision)
        ),
        Rule(
            f"{IN_FP32} || self.strategy in ['auto', 'ddp']",
            "spec.training.parameterPrecision: DeepSpeed keeps the weights in fp32 itself, divided over the GPUs; use"
            " strategy auto or ddp, or remove it",
        ),
        Rule(
            f"{IN_FP32} || self.training.precision == 'bf16' ||"
            " self.training.precision == 'auto' && self.resources.gpusPerNode > 0",
            "spec.training.parameterPrecision: bf16 needs a computation in bf16; set precision: bf16",
        ),
        Rule(
            "!has(self.training.torchCompile) || !self.training.torchCompile || !self.strategy.startsWith('zero3')",
            "spec.training.torchCompile: ZeRO-3 gathers weights inside of blocks, which torch cannot compile; use"
            " strategy ddp, zero1 or zero2, or remove it",
        ),
        Rule(
            "!has(self.training.tf32) || !self.training.tf32 || self.resources.gpusPerNode > 0",
            "spec.training.tf32: needs GPUs; remove it on CPU",
        ),
        *works_with("training.optimizer", SCHEDULES_OF_OPTIMIZERS, "training.schedule", SCHEDULES),
        *(
            Rule(
                f"{unused} || has(self.dataset.evalSplit) || has(self.dataset.evalFiles) ||"
                " has(self.dataset.evalFraction) || (has(self.dataset.mix) && self.dataset.mix.sources.exists(s,"
                " has(s.evalSplit)))",
                f"spec.training.{field}: no rows are held out to evaluate on; set dataset.evalSplit, evalFiles or"
                f" evalFraction, or remove {field}",
            )
            for field, unused in (
                ("evalSteps", "!has(self.training.evalSteps)"),
                ("evalEvery", "self.training.evalEvery == 'steps'"),
            )
        ),
        Rule(
            "self.resources.gpusPerNode > 0 || !has(self.training.attention) ||"
            f" !(self.training.attention in {ON_GPUS})",
            f"spec.training.attention: {', '.join(ON_GPUS)} need GPUs; use auto, sdpa or eager on CPU",
        ),
        Rule(
            f"!has(self.training.attention) || !(self.training.attention in {OF_PACKED_ROWS}) ||"
            " has(self.training.packing) && self.training.packing == 'isolated'",
            "spec.training.attention: varlen is for rows that share maxLength; set packing: isolated, or use auto",
        ),
        Rule(
            f"!has(self.training.attention) || !(self.training.attention in {IN_16_BITS}) ||"
            " self.training.precision != 'fp32'",
            f"spec.training.attention: {', '.join(IN_16_BITS)} compute in 16 bits; use precision: auto or bf16, or"
            " attention: auto",
        ),
        Rule(
            "self.resources.gpusPerNode > 0 || self.training.precision != 'fp16'",
            "spec.training.precision: fp16 needs a GPU; use fp32 or bf16 on CPU",
        ),
        Rule(
            "!has(self.training.microBatchSize) || self.training.batchSize % (self.training.microBatchSize *"
            " self.resources.nodes * (self.resources.gpusPerNode > 0 ? self.resources.gpusPerNode :"
            " (has(self.resources.processesPerNode) ? self.resources.processesPerNode : 1))) == 0",
            "spec.training.batchSize: must be a multiple of microBatchSize times the number of processes",
        ),
        Rule(
            "self.training.batchSize % (self.resources.nodes * (self.resources.gpusPerNode > 0 ?"
            " self.resources.gpusPerNode : (has(self.resources.processesPerNode) ? self.resources.processesPerNode :"
            " 1))) == 0",
            "spec.training.batchSize: must be a multiple of the number of processes (nodes times GPUs or processes a"
            " node)",
        ),
    )
