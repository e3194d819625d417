"""FineTuneJob: adapt a model to a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from luthier_api.base import ApiModel, Rule, map_by
from luthier_api.classification import Classification
from luthier_api.dataset import TrainingData
from luthier_api.decides import BUDGET, CIRCUMSTANCES, LAYOUT, PLACE, PUBLICATION, RESULT
from luthier_api.finetune_rules import RULES
from luthier_api.grpo import Grpo
from luthier_api.marks import For, Table, TabledSpec, by_table
from luthier_api.method import Method
from luthier_api.methods import METHODS, Strategy
from luthier_api.optimizers import OPTIMIZERS
from luthier_api.preference import Preference, Reward
from luthier_api.resources import Restarts, TrainingResources
from luthier_api.schedules import EVAL_INTERVALS, SAVE_INTERVALS, SCHEDULES
from luthier_api.scheduling import Scheduling
from luthier_api.spec import Hub, JobControl, ModelSource, PhaseResources, PrepareResources, Volumes, Workspace
from luthier_api.speech import Speech
from luthier_api.stores import Stores
from luthier_api.tasks import TRAINING_TASKS, FineTuneTask
from luthier_api.texts import Answering, Embedding, Masking, Seq2Seq, Tagging
from luthier_api.tracking import Tracker
from luthier_api.training import Training


class TrainingImages(ApiModel):
    """How images are shown to a model that learns to make them."""

    resolution: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    """Pixels of both sides, a multiple of 8. Of an image the middle is taken, scaled to this size, unless bucketStep is
    set. The models of Stable Diffusion XL were trained with 1024.
    """
    bucket_step: Annotated[int | None, Field(ge=8, le=1024, multiple_of=8)] = None
    """Images keep about their shape: each is scaled and cropped to the size nearest to its aspect ratio (bucket). Sides
    of these sizes are multiples of this number, 64 for example, from half of resolution to twice as much, and none has
    more pixels than resolution × resolution. A micro-batch has images of one size, so that microBatchSize is 1 when
    left out. All images are squares when left out.
    """
    min_snr_gamma: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Min-SNR (arXiv:2303.09556, with 5): timesteps with little noise, whose errors are easy to lower and add little,
    count less. A row whose signal-to-noise ratio is above this number counts in the loss as one with this ratio. All
    timesteps count alike when left out. evalLoss counts them alike in any case.
    """
    prior_loss_weight: Annotated[float | None, Field(gt=0, le=100)] = None
    """How much the loss of an image of the class counts beside that of the image to learn (dataset.columns.prior); 1
    when left out.
    """
    train_text_encoders: bool = False
    """Whether the text encoders learn beside the UNet: one of Stable Diffusion 1.5 and 2, both of XL. They get adapters
    on the modules that method.targetModules names; q_proj, k_proj, v_proj and out_proj are those of their attention.
    """
    cache_encodings: bool = False
    """Whether VAE and text encoders run once for all images and captions, before the first step, instead of in each
    step. What they make is kept in the workspace, about 1 MB for an image of 1024 × 1024 pixels, and they leave the
    device. The result is the same.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.cacheEncodings || !self.trainTextEncoders",
            "image.cacheEncodings: keeps what text encoders make of captions, which changes where they learn"
            " (trainTextEncoders); remove one of them",
        ),
        Rule(
            "!has(self.bucketStep) || self.resolution % self.bucketStep == 0",
            "image.bucketStep: must divide image.resolution, so that a square is one of the sizes; choose another one",
        ),
    )


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
    classification: Annotated[Classification, RESULT, For("task")] = by_table()
    """What a classifier predicts, and how much each class counts."""
    seq2seq: Annotated[Seq2Seq, RESULT, For("task"), Field(alias="seq2seq")] = by_table()
    """How a model learns to write a text from another one."""
    speech: Annotated[Speech, RESULT, For("task")] = by_table()
    """How a model learns to write down what is said."""
    tagging: Annotated[Tagging, RESULT, For("task")] = by_table()
    """How a model learns to tag words."""
    answering: Annotated[Answering, RESULT, For("task")] = by_table()
    """How a model learns to find answers in texts."""
    masking: Annotated[Masking, RESULT, For("task")] = by_table()
    """Which tokens a model learns to fill in."""
    embedding: Annotated[Embedding, RESULT, For("task")] = by_table()
    """How a model learns vectors of texts."""
    image: Annotated[TrainingImages, For("task"), RESULT] = by_table()
    """How images are shown to the model."""
    resources: Annotated[TrainingResources, RESULT] = Field(default_factory=TrainingResources)
    strategy: Annotated[Strategy, LAYOUT] = "auto"
    """How processes share the work. auto: one process alone, several by ddp. DeepSpeed divides over the processes what
    the optimiser keeps (zero1), gradients, too (zero2), and weights (zero3, not with a quantised model). fsdp divides
    the same as zero3, by torch itself, on several GPUs. Only the strategy that wrote a checkpoint can resume from it.
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

    rules: ClassVar[tuple[Rule, ...]] = RULES

    @property
    def compares_rows(self) -> bool:
        """Whether what is learnt depends on which rows share a micro-batch, and so on how many they are."""
        kto = self.preference is not None and self.preference.loss_type == "kto"
        return kto or self.has_buckets or TRAINING_TASKS[self.task].compares_rows

    @property
    def has_buckets(self) -> bool:
        """Whether images are learnt in several sizes, of which a micro-batch has one."""
        return self.image is not None and self.image.bucket_step is not None
