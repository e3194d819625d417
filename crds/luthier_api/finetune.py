"""FineTuneJob: adapt a model to a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from luthier_api.base import SET, ApiModel, Rule
from luthier_api.decides import BUDGET, CIRCUMSTANCES, LAYOUT, PLACE, PUBLICATION, RESULT
from luthier_api.formats import DatasetFormat
from luthier_api.forms import LOSSES_OF_FORMS, LossOn, RowForm, TemplateName
from luthier_api.marks import For, Table, TabledSpec, by_table, works_with
from luthier_api.methods import METHODS, QUANTIZATIONS, STRATEGIES, MethodType, Strategy
from luthier_api.optimizers import OPTIMIZERS, OptimizerName
from luthier_api.quantity import Bytes, Cores
from luthier_api.schedules import EVAL_INTERVALS, SAVE_INTERVALS, SCHEDULES, Interval, ScheduleName
from luthier_api.scheduling import Scheduling
from luthier_api.spec import (
    DatasetSource,
    Hub,
    JobControl,
    ModelSource,
    ObjectName,
    Path,
    PhaseResources,
    Seed,
    ShortText,
    Volumes,
    Workspace,
    alone_on_its_claim,
    at_most_one,
    exactly_one,
    train_alone,
)
from luthier_api.tasks import BEST_METRICS, EVAL_LOSS, TRAINING_TASKS, BestMetric, FineTuneTask


class Columns(ApiModel):
    """Which columns of the dataset play which role."""

    text: Annotated[ShortText, For("task")] = by_table()
    """The text to learn (causal-lm) or to classify (text-classification), or the caption of the image (text-to-image).
    """
    prompt: Annotated[ShortText, For("task")] = by_table()
    """The text that the completion or both answers continue. They follow it directly, without a blank between them. For
    causal-lm also messages, and the instruction of Alpaca.
    """
    completion: Annotated[ShortText | None, For("task")] = by_table()
    """What the model shall write after the prompt: text, or messages."""
    messages: Annotated[ShortText | None, For("task")] = by_table()
    """A conversation: a list of messages with role (system, user, assistant, tool) and content; in ShareGPT, from and
    value.
    """
    tools: Annotated[ShortText | None, For("task")] = by_table()
    """The tools that a conversation can call, as JSON schemas. Used where there is such a column."""
    system: Annotated[ShortText | None, For("task")] = by_table()
    """The system message of a row of ShareGPT or Alpaca. Used where there is such a column."""
    input: Annotated[ShortText | None, For("task")] = by_table()
    """What an instruction of Alpaca is about. Used where there is such a column."""
    chosen: Annotated[ShortText, For("task")] = by_table()
    """The answer to prefer."""
    rejected: Annotated[ShortText, For("task")] = by_table()
    """The answer to avoid."""
    image: Annotated[ShortText, For("task")] = by_table()
    """The image to classify or to learn, with 8 bits a channel."""
    label: Annotated[ShortText, For("task")] = by_table()
    """The class of a row: a name or a number. Images in folders have it by the folder's name: FOLDER/CLASS/image.png.
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


class TrainingData(DatasetSource):
    """The rows to learn from, and those held out to measure with."""

    split: ShortText = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: ShortText | None = None
    """Split to evaluate on; slices work."""
    eval_files: Annotated[list[Path] | None, Field(min_length=1, max_length=256)] = None
    """Files to evaluate on."""
    eval_fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of the training rows, chosen by `training.seed`, that is held out to evaluate on."""
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
        *DatasetSource.rules,
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
    )


Pattern = Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=64)]
Layer = Annotated[int, Field(ge=0, le=10_000)]


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
    """Modules that get an adapter: all-linear, or names such as q_proj; for the experts of a mixture of experts, their
    parameters' names, such as gate_up_proj.
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

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.targetModules) || !('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            "method.targetModules: all-linear takes every module already; write it alone, or list names only",
        ),
    )


Packing = Literal["none", "isolated", "concatenate"]


class ScheduleOptions(ApiModel):
    """Options of `training.schedule`, as transformers has them."""

    num_cycles: Annotated[float, Field(gt=0, le=1000), For("schedule")] = by_table()
    """Waves of the cosine; 0.5 falls once. Of cosine_with_restarts: how often it falls."""
    min_lr_rate: Annotated[float, Field(ge=0, lt=1), For("schedule")] = by_table()
    """Learning rate at the end, as a share of learningRate."""
    warmup_lr_rate: Annotated[float, Field(ge=0, lt=1), For("schedule")] = by_table()
    """Learning rate of the first step, as a share of learningRate; one step of the warm-up when left out."""
    power: Annotated[float, Field(gt=0, le=100), For("schedule")] = by_table()
    """Exponent of the fall."""
    lr_end: Annotated[float, Field(ge=0, lt=1), For("schedule")] = by_table()
    """Learning rate at the end."""
    timescale: Annotated[int, Field(ge=1), For("schedule")] = by_table()
    """Steps after which the learning rate begins to fall noticeably; those of the warm-up when left out, or 10,000."""
    num_decay_steps: Annotated[int, Field(ge=1), For("schedule")] = by_table()
    """Steps of the fall at the end; a tenth of all when left out."""
    warmup_type: Annotated[Literal["linear", "cosine", "1-sqrt"], For("schedule")] = by_table()
    """Shape of the warm-up."""
    decay_type: Annotated[Literal["linear", "cosine", "1-sqrt"], For("schedule")] = by_table()
    """Shape of the fall at the end."""
    min_lr_ratio: Annotated[float, Field(ge=0, lt=1), For("schedule")] = by_table()
    """Learning rate at the end, as a share of learningRate."""


class OptimizerOptions(ApiModel):
    """Options of `training.optimizer`."""

    beta1: Annotated[float, Field(ge=0, lt=1), For("optimizer")] = by_table()
    """Share of the mean of the gradients that stays in a step."""
    beta2: Annotated[float, Field(ge=0, lt=1), For("optimizer")] = by_table()
    """Share of the mean of the squared gradients that stays in a step; of Lion: of its momentum."""
    epsilon: Annotated[float, Field(gt=0, lt=1), For("optimizer")] = by_table()
    """Added to the denominator."""
    momentum: Annotated[float, Field(ge=0, lt=1), For("optimizer")] = by_table()
    """Share of the momentum that stays in a step."""


class EarlyStopping(ApiModel):
    """When a training ends before its last step, because evaluations get no better any more."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Evaluations in a row without an improvement of `metric` after which the training ends."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """An improvement is more than this."""


class Training(ApiModel):
    """Length, learning rate, batches and precision of the training."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 1
    """Passes over the training rows, unless maxSteps is set."""
    max_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimiser steps after which training ends; overrides epochs."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. 2e-4 suits adapters; 1e-5 to 5e-5 suits full fine-tuning of a pretrained model."""
    schedule: ScheduleName = "linear"
    """How the learning rate falls after the warm-up, by transformers' names. constant: not at all, and without a
    warm-up; constant_with_warmup has one.
    """
    schedule_options: ScheduleOptions = Field(default_factory=ScheduleOptions)
    """Options of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from zero."""
    warmup_ratio: Annotated[float | None, Field(gt=0, lt=1)] = None
    """The same as a share of all steps, rounded up."""
    optimizer: OptimizerName = "adamw_torch_fused"
    """The optimiser, by transformers' names; what each needs is on the page of memory."""
    optimizer_options: OptimizerOptions = Field(default_factory=OptimizerOptions)
    """Options of the optimiser."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each weight that decays in a step, times the learning rate; 0: none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Rows that one optimiser step sees, over all processes and accumulation steps."""
    micro_batch_size: Annotated[int | None, Field(ge=1, le=1_000_000), LAYOUT] = None
    """Rows that one process sees in one forward pass. When left out: at most 8, and on GPUs, for causal-lm, at most
    2,048 tokens or one row. Models that normalise over a batch (BatchNorm) do so over these.
    """
    max_length: Annotated[int, Field(ge=8, le=1_048_576), For("task")] = by_table()
    """Tokens of a row; longer rows are cut (with packing: split)."""
    packing: Annotated[Packing, For("task")] = by_table()
    """Whether rows share the maxLength tokens that the model reads at once; batchSize then counts these. isolated:
    whole rows share them, and the model sees of each row what it sees of it alone. Only a row that is longer than
    maxLength is split. concatenate: for continued pre-training. All rows are joined, separated by the end-of-text
    token, and cut into blocks of maxLength, within which the model sees across rows. Lines of text files keep their
    breaks; there the token stands at the end of a file.
    """
    loss_on: Annotated[LossOn | None, For("task")] = by_table()
    """Which tokens the model learns to write. all: every token. completions: those after the prompt. assistant: those
    of the assistant's turns, with the token that ends a turn. When left out: assistant for conversations, completions
    for prompts and completions, all for texts.
    """
    group_by_length: Annotated[bool, For("task")] = by_table()
    """Rows of similar lengths share a step, so that the model computes less padding. The steps are still in random
    order. Not with packing, which leaves hardly any padding.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation. auto: bf16 on a GPU that has it, fp16 on one before Ampere, fp32 on CPU."""
    gradient_checkpointing: Annotated[bool | None, LAYOUT] = None
    """Recompute activations in the backward pass: less memory, about a third more time. When left out: on GPUs where
    the model can, not on CPU.
    """
    seed: Seed = 42
    """Seed of everything random: new weights, adapters, the order of rows, and the rows that evalFraction holds out."""
    log_steps: Annotated[int, Field(ge=1), CIRCUMSTANCES] = 10
    """Steps between two reports of the loss."""
    eval_every: Interval = "steps"
    """steps: evaluate every `evalSteps`. epoch: after each pass over the training rows."""
    eval_steps: Annotated[int | None, Field(ge=1), For("eval_every")] = by_table()
    """Steps between two evaluations; only before and after the training when left out."""
    save_every: Annotated[Interval, CIRCUMSTANCES] = "steps"
    """steps: save a checkpoint every `saveSteps`. epoch: after each pass over the training rows."""
    save_steps: Annotated[int, Field(ge=1), For("save_every"), CIRCUMSTANCES] = by_table()
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=100), CIRCUMSTANCES] = 2
    """Verified checkpoints that are kept, the newest ones. With loadBestModel the best one is kept beside them."""
    load_best_model: bool = False
    """Deliver the weights of the best evaluation instead of those after the last step. A checkpoint is saved whenever
    an evaluation is better than all before.
    """
    metric: BestMetric | None = None
    """What loadBestModel and earlyStopping compare; evalLoss when left out. Whether more or less of it is better
    follows from the metric.
    """
    early_stopping: EarlyStopping | None = None
    """End the training when evaluations get no better. The job is then Complete, and its status says why."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.groupByLength) || !self.groupByLength || !has(self.packing) || self.packing == 'none'",
            "training.groupByLength: packed rows have hardly any padding; remove it, or remove packing",
        ),
        Rule(
            "self.schedule != 'constant' || self.warmupSteps == 0 || self.optimizer == 'schedule_free_adamw'",
            "training.warmupSteps: schedule constant has no warm-up; use schedule: constant_with_warmup, or remove"
            " warmupSteps",
        ),
        Rule(
            "!has(self.maxSteps) || self.warmupSteps < self.maxSteps",
            "training.warmupSteps: training would end before the peak of the learning rate; choose fewer than maxSteps",
        ),
        Rule(
            "!has(self.warmupRatio) || self.warmupSteps == 0",
            "training.warmupRatio: warmupSteps says how long the warm-up is; set one of them",
        ),
        Rule(
            "!has(self.warmupRatio) || self.schedule != 'constant' || self.optimizer == 'schedule_free_adamw'",
            "training.warmupRatio: schedule constant has no warm-up; use schedule: constant_with_warmup, or remove"
            " warmupRatio",
        ),
        Rule(
            "!has(self.scheduleOptions.lrEnd) || self.scheduleOptions.lrEnd < self.learningRate",
            "training.scheduleOptions.lrEnd: the learning rate would not fall; choose less than learningRate",
        ),
        Rule(
            "!has(self.maxSteps) || !has(self.scheduleOptions.numDecaySteps) ||"
            " self.scheduleOptions.numDecaySteps + self.warmupSteps <= self.maxSteps",
            "training.scheduleOptions.numDecaySteps: warm-up and decay are longer than maxSteps; choose fewer steps",
        ),
        Rule(
            "!has(self.metric) || self.loadBestModel || has(self.earlyStopping)",
            "training.metric: nothing is chosen by it; set loadBestModel or earlyStopping, or remove it",
        ),
        Rule(
            "!self.loadBestModel && !has(self.earlyStopping) || self.evalEvery == 'epoch' || has(self.evalSteps)",
            "training.evalSteps: loadBestModel and earlyStopping compare evaluations during the training; set evalSteps"
            " or evalEvery: epoch",
        ),
    )


class Preference(ApiModel):
    """How a model learns to prefer answers."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """How strongly the model is held to the one it started from: larger values change it less."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO (arXiv:2305.18290). hinge: SLiC (arXiv:2305.10425). ipo: IPO (arXiv:2310.12036), which overfits less
    where one answer is always preferred.
    """


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
    gpu_class: Annotated[ObjectName | None, CIRCUMSTANCES] = None
    """Kind of GPU, by the name that the administrator has given it (`gpuClasses` of the chart): which resource is
    requested, and on which nodes. Left out: that of the namespace, or else any GPU.
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
SCHEDULES_OF_OPTIMIZERS = {name: optimizer.schedules for name, optimizer in OPTIMIZERS.items()}
STRATEGIES_OF_METHODS = {name: method.strategies for name, method in METHODS.items()}
STRATEGIES_OF_QUANTIZATIONS = {name: quantization.strategies for name, quantization in QUANTIZATIONS.items()}


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
    image: Annotated[TrainingImages, For("task"), RESULT] = by_table()
    """How images are shown to the model."""
    resources: Annotated[TrainingResources, RESULT] = Field(default_factory=TrainingResources)
    strategy: Annotated[Strategy, LAYOUT] = "auto"
    """How processes share the work. auto: one process alone, several by ddp. zero2 and zero3 shard optimiser and
    weights with DeepSpeed; zero3 not with a quantised model. Only the strategy that wrote a checkpoint can resume from
    it.
    """
    workspace: Annotated[Workspace, PLACE] = Field(default_factory=Workspace)
    volumes: Annotated[Volumes, CIRCUMSTANCES] = Field(default_factory=list)
    """Claims and config maps of the namespace that every pod of the job sees, read-only: data, models, prompts."""
    hub: Annotated[Hub | None, PUBLICATION] = None
    prepare: Annotated[PhaseResources | None, CIRCUMSTANCES] = None
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
            "!self.training.loadBestModel || !self.strategy.startsWith('zero')",
            "spec.training.loadBestModel: DeepSpeed's shards of a checkpoint are not loaded after a training; use"
            " strategy ddp, or remove loadBestModel",
        ),
        Rule(
            "!has(self.method.dora) || !self.method.dora || !self.strategy.startsWith('zero')",
            "spec.method.dora: DeepSpeed divides the weights whose norms DoRA reads in each step; use strategy ddp, or"
            " remove dora",
        ),
        *works_with("training.optimizer", METHODS_OF_OPTIMIZERS, "method.type", METHODS),
        *works_with("training.optimizer", STRATEGIES_OF_OPTIMIZERS, "strategy", STRATEGIES),
        *works_with("training.optimizer", SCHEDULES_OF_OPTIMIZERS, "training.schedule", SCHEDULES),
        *(
            Rule(
                f"{unused} || has(self.dataset.evalSplit) || has(self.dataset.evalFiles) ||"
                " has(self.dataset.evalFraction)",
                f"spec.training.{field}: no rows are held out to evaluate on; set dataset.evalSplit, evalFiles or"
                f" evalFraction, or remove {field}",
            )
            for field, unused in (
                ("evalSteps", "!has(self.training.evalSteps)"),
                ("evalEvery", "self.training.evalEvery == 'steps'"),
            )
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
