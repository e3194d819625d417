"""FineTuneJob: adapt a model to a dataset."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import SET, ApiModel, Rule
from luthier_api.methods import MethodType, Strategy
from luthier_api.quantity import Bytes, Cores
from luthier_api.spec import (
    DatasetSource,
    Hub,
    JobControl,
    ModelSource,
    Path,
    Scheduling,
    Seed,
    ShortText,
    Volumes,
    Workspace,
    alone_on_its_claim,
    at_most_one,
    immutable,
    train_alone,
)
from luthier_api.tasks import FineTuneTask, training_tasks

LINEAR = training_tasks(lambda task: bool(task.training and task.training.quantizations))
TEXTS = training_tasks(lambda task: task.modality == "text")
LABELLED = training_tasks(lambda task: task.labels)


class Columns(ApiModel):
    """Which columns of the dataset play which role."""

    text: ShortText = "text"
    """The text to learn (causal-lm) or to classify (text-classification)."""
    image: ShortText = "image"
    """The image to classify (image-classification), with 8 bits a channel."""
    label: ShortText = "label"
    """The class of a row (text-classification, image-classification): a name or a number. Images in folders have it by
    the folder's name: FOLDER/CLASS/image.png.
    """


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
    parse_special_tokens: bool = False
    """Whether control tokens that a text spells, such as </s> or <|im_end|>, are read as these tokens: for text that a
    chat template has made. Otherwise they are ordinary text (causal-lm, text-classification).
    """
    merge_labels: bool = False
    """Whether labels that differ only in blanks, in capitals or in how a number is written (7, 007, 7.0) are one class,
    which is named as most of its rows have it. They are shown in any case (text-classification, image-classification).
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        *DatasetSource.rules,
        train_alone("split"),
        train_alone("evalSplit"),
        Rule(
            "!has(self.evalSplit) || self.evalSplit != self.split",
            "dataset.evalSplit: is what is learnt; choose another split, or parts that do not overlap, such as"
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


class Method(ApiModel):
    """Which weights learn, and how."""

    type: MethodType = "lora"
    """full: all weights. lora: low-rank adapters on a frozen model. qlora: the same on a model whose linear layers are
    quantised to 4 bits (NF4); not for image-classification.
    """
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapters (lora, qlora)."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scale of the adapters: their output counts alpha / rank (lora, qlora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters (lora, qlora). Adapters on the experts of a mixture of experts know none."""
    target_modules: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET] = ["all-linear"]
    """Modules that get an adapter: all-linear, or names such as q_proj (lora, qlora); for the experts of a mixture of
    experts, their parameters' names, such as gate_up_proj.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            "method.targetModules: all-linear takes every module already; write it alone, or list names only",
        ),
    )


class Training(ApiModel):
    """The course of the optimisation."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 1
    """Passes over the training rows, unless maxSteps is set."""
    max_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimiser steps after which training ends; overrides epochs."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. 2e-4 suits adapters; 1e-5 to 5e-5 suits full fine-tuning of a pretrained model."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate falls after the warm-up. constant: not at all, and without a warm-up; constant_with_warmup
    has one.
    """
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each weight that decays in a step, times the learning rate (AdamW); 0: none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Rows that one optimiser step sees, over all processes and accumulation steps."""
    micro_batch_size: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Rows that one process sees in one forward pass. When left out: at most 8, and on GPUs, for causal-lm, at most
    2,048 tokens or one row. Models that normalise over a batch (BatchNorm) do so over these.
    """
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Tokens of a row; longer rows are cut (causal-lm with packing: split). Images have none."""
    packing: bool = False
    """causal-lm: join all rows, separated by the end-of-text token, and cut them into blocks of maxLength. Lines of
    text files keep their breaks; there the token stands at the end of a file.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation. auto: bf16 on a GPU that has it, fp16 on one before Ampere, fp32 on CPU."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time. When left out: on GPUs where
    the model can, not on CPU.
    """
    seed: Seed = 42
    """Seed of everything that is drawn: new weights, adapters, the order of rows, and what evalFraction holds out."""
    log_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two reports of the loss."""
    eval_steps: Annotated[int | None, Field(ge=1)] = None
    """Steps between two evaluations; only before and after the training when left out."""
    save_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=100)] = 2
    """Verified checkpoints that are kept."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.schedule != 'constant' || self.warmupSteps == 0",
            "training.warmupSteps: schedule constant has no warm-up; use schedule: constant_with_warmup, or remove"
            " warmupSteps",
        ),
        Rule(
            "!has(self.maxSteps) || self.warmupSteps < self.maxSteps",
            "training.warmupSteps: training would end before the peak of the learning rate; choose fewer than maxSteps",
        ),
    )


class TrainingResources(ApiModel):
    """The pods that train: one a node."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods, each on a node of its own where there are enough."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each pod, one process on each. 0: train on CPU."""
    processes_per_node: Annotated[int | None, Field(ge=1, le=64)] = None
    """Processes of each pod of a CPU job; 1 when left out."""
    cpu: Cores | None = None
    """CPU request of each pod, in cores, for example 16 or 500m; none when left out."""
    memory: Bytes | None = None
    """Memory request and limit of each pod, for example 64Gi; neither when left out."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.processesPerNode) || self.gpusPerNode == 0",
            "resources.processesPerNode: a GPU job runs one process a GPU; remove it, or set gpusPerNode: 0 to train"
            " on CPU",
        ),
    )

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
    """Restarts after failures of the infrastructure; mistakes are never retried, preemptions cost nothing. Read when
    the run is created: to apply a change to a running job, suspend the job and let it go on.
    """


class FineTuneJobSpec(JobControl):
    """What to adapt, to what, how, and where the result goes."""

    task: FineTuneTask
    """What the model learns to do."""
    model: ModelSource
    dataset: TrainingData
    method: Method = Field(default_factory=Method)
    training: Training = Field(default_factory=Training)
    resources: TrainingResources = Field(default_factory=TrainingResources)
    strategy: Strategy = "auto"
    """How processes share the work. auto: one process alone, several by ddp. zero2 and zero3 shard optimiser and
    weights with DeepSpeed.
    """
    workspace: Workspace = Field(default_factory=Workspace)
    volumes: Volumes = Field(default_factory=list)
    """Claims and config maps of the namespace that every pod of the job sees, read-only: data, models, prompts."""
    hub: Hub | None = None
    scheduling: Scheduling = Field(default_factory=Scheduling)
    restarts: Restarts = Field(default_factory=Restarts)

    rules: ClassVar[tuple[Rule, ...]] = (
        *immutable(
            "task",
            "model",
            "dataset",
            "method",
            "training",
            "resources",
            "strategy",
            "workspace",
            "volumes",
            "scheduling",
        ),
        alone_on_its_claim("resources.nodes"),
        Rule(
            "!has(self.model.config) || self.method.type == 'full'",
            "spec.method.type: new weights (spec.model.config) are trained whole; set method.type: full",
        ),
        Rule(
            "self.method.type != 'qlora' || !self.strategy.startsWith('zero3')",
            "spec.strategy: ZeRO-3 cannot shard a model quantised to 4 bits; use ddp or zero2 with method.type: qlora",
        ),
        Rule(
            "!self.training.packing || self.task == 'causal-lm'",
            "spec.training.packing: only causal-lm can join rows; remove packing for this task",
        ),
        Rule(
            "!has(self.training.evalSteps) || has(self.dataset.evalSplit) || has(self.dataset.evalFiles) ||"
            " has(self.dataset.evalFraction)",
            "spec.training.evalSteps: no rows are held out to evaluate on; set dataset.evalSplit, evalFiles or"
            " evalFraction, or remove evalSteps",
        ),
        Rule(
            "!has(self.model.config) || self.task == 'causal-lm'",
            "spec.model.config: only causal-lm starts from new weights; set model.id, path or job for this task",
        ),
        Rule(
            "!self.model.resizeEmbeddings || self.method.type == 'full'",
            "spec.model.resizeEmbeddings: an adapter would not hold the new rows, nor would its base; set method.type:"
            " full, or add the rows in a job of its own and train the adapter on its result (model.job)",
        ),
        Rule(
            f"!self.model.resizeEmbeddings || self.task in {list(TEXTS)}",
            "spec.model.resizeEmbeddings: the rows of this task hold no text; remove resizeEmbeddings",
        ),
        Rule(
            f"self.method.type != 'qlora' || self.task in {list(LINEAR)}",
            "spec.method.type: qlora quantises linear layers, and a model of image-classification need not have any;"
            " use lora or full",
        ),
        Rule(
            f"!self.dataset.parseSpecialTokens || self.task in {list(TEXTS)}",
            "spec.dataset.parseSpecialTokens: the rows of this task hold no text; remove parseSpecialTokens",
        ),
        Rule(
            f"!self.dataset.mergeLabels || self.task in {list(LABELLED)}",
            "spec.dataset.mergeLabels: the rows of this task have no labels; remove mergeLabels",
        ),
        Rule(
            "self.task != 'image-classification' || !has(self.dataset.format) || self.dataset.format in ['imagefolder',"
            " 'parquet']",
            "spec.dataset.format: images come in folders or in parquet; use imagefolder or parquet for"
            " image-classification",
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
