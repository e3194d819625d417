"""`spec.training` of a FineTuneJob: length, learning rate, batches, precision, evaluations and checkpoints."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.attention import AttentionName
from luthier_api.augmentation import Augmentation
from luthier_api.base import ApiModel, Rule
from luthier_api.decides import CIRCUMSTANCES, LAYOUT
from luthier_api.forms import LossOn
from luthier_api.marks import For, by_table
from luthier_api.methods import Packing, ParameterPrecision
from luthier_api.optimizers import OptimizerName
from luthier_api.schedules import Interval, ScheduleName
from luthier_api.spec import Seed
from luthier_api.tasks import BestMetric


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
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1000), For("optimizer"), For("method")] = by_table()
    """LoRA+ (arXiv:2402.12354): the matrices B of the adapters, which begin at zero, and all vectors learn at this
    many times learningRate. The paper recommends about 16, with a learningRate that is half as large.
    """


class EarlyStopping(ApiModel):
    """When a training ends before its last step, because evaluations get no better any more."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Evaluations in a row without an improvement of `metric` after which the training ends."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """By how much an evaluation must be better to count as an improvement."""


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
    """The optimiser, by transformers' names. docs/training.md says what each needs."""
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
    """Tokens of a row; longer rows are cut (with packing: split; of reward and speech-recognition: left out). Of grpo:
    of a prompt and its completion together.
    """
    max_seconds: Annotated[float | None, Field(gt=0, le=3600), For("task")] = by_table()
    """Seconds of audio that the model hears of a row. Longer audio is cut (audio-classification), or its row left out
    (speech-recognition). Without it, as much as the model can hear at once (Whisper 30 s, Audio Spectrogram Transformer
    10.24 s), and 30 s of models without a limit.
    """
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
    label_smoothing: Annotated[float, Field(gt=0, lt=1), For("task")] = by_table()
    """Share of each label that is spread evenly over all classes, or over all tokens of the vocabulary. evalLoss is
    without it.
    """
    augmentation: Annotated[Augmentation, For("task")] = by_table()
    """How training images are changed at random: in the order crop, flips, randAugment, colorJitter. What is drawn
    follows from `seed`, the epoch and the row. Held-out images are never changed.
    """
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1000), For("task")] = by_table()
    """NEFTune (arXiv:2310.05914, with 5 to 15): while the model learns, uniform noise of up to neftuneNoiseAlpha /
    sqrt(tokens of the longest row × width of the embedding) is added to the embeddings of tokens.
    """
    attention: Annotated[AttentionName, LAYOUT, For("task")] = by_table()
    """How attention is computed, by transformers' names; results differ by rounding alone. auto: varlen for packing:
    isolated on GPUs, where the model can, else sdpa, or eager for models without it. varlen is torch's FlashAttention
    over the rows that share maxLength, without a mask of maxLength² entries. flex_attention is compiled in the pods.
    flash_attention_2 and 3 need packages that the image of Luthier does not have.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation. auto: bf16 on a GPU that has it, fp16 on one before Ampere, fp32 on CPU."""
    parameter_precision: Annotated[ParameterPrecision, For("method")] = by_table()
    """In which type the weights rest that method full trains. bf16: in 2 bytes instead of 4, with gradients of 2 bytes
    and moments of AdamW of 2, so that 8 billion weights fit a GPU of 80 GB. Each new weight is rounded up or down at
    random, so that small updates are not lost; gradients of several micro-batches are summed in bf16.
    """
    tf32: bool | None = None
    """Whether GPUs from Ampere on round the inputs of products in fp32 to 19 bits (TF32), which makes them several
    times faster. When left out: not with precision fp32; else yes, for what is left in fp32.
    """
    torch_compile: Annotated[bool, LAYOUT, For("task")] = by_table()
    """Compile each repeated block of the model with torch.compile: the first step takes longer, the others less time.
    The image needs a compiler for it, which the one of Luthier has only when it is built with COMPILER=gcc. Results
    differ by rounding.
    """
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
    """Steps between two checkpoints. The first one is saved after 5 % of all steps if these are 20 or more."""
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
