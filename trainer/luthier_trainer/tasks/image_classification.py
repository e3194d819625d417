"""image-classification: predict one label for an image.

The images are converted by the model's own image processor. Training images are changed at random before, if the job
asks for it (`augmentation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.load import Rows
from luthier_trainer.models import inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.augmentation import CROPPED, Augmenter
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.classification import Classification
from luthier_trainer.tasks.images import PIXELS, ImageTask, unused_parameters
from luthier_trainer.tasks.pretrained import with_labels

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedModel, TrainingArguments

    from luthier_trainer.models.memory import Trial

# Size in pixels of a sample image. `prepare` has checked that the processor makes the same shape of all images.
SIDES = (64, 64)
ROW = "row"  # column of training images that are changed at random: the number of the row
CROP = "spec.training.augmentation.crop"


class ImageClassification(Classification, ImageTask):
    """The task image-classification."""

    task = "image-classification"

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        super().check_model(model, spec, rows, labels)
        if spec.training.augmentation and spec.training.augmentation.crop:
            check_crops(model.processor)

    def encode(
        self, rows: Rows, processor: BaseImageProcessor, spec: FineTuneJobSpec, labels: list[str] | None, use: str
    ) -> Dataset:
        """Return the columns `pixel_values`, still encoded image files, and `labels`, int64.

        Only images that are changed at random have the column `ROW`: those of the training, if the job asks for it.
        """
        from datasets import Features, Image, Value

        name = spec.dataset.columns.image
        data = rows.data.select_columns([name])
        data = data if name == PIXELS else data.rename_column(name, PIXELS)
        data = data.add_column("labels", self.label_ids(rows, spec, labels))
        types = {PIXELS: Image(), "labels": Value("int64")}
        if use == "training" and spec.training.augmentation:
            data, types = data.add_column(ROW, list(range(len(data)))), types | {ROW: Value("int64")}
        return data.cast(Features(types))

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        import PIL.Image
        import torch

        from luthier_trainer.models.heads import heads_of
        from luthier_trainer.models.memory import Trial

        made = inspect.skeleton(with_labels(model.config, labels), self.task, inspect.MODEL)
        pixels = model.processor(images=[PIL.Image.new("RGB", SIDES)], return_tensors="pt")["pixel_values"]

        def batch(size: int) -> Batch:
            with torch.device("meta"):
                images = torch.empty((size, *pixels.shape[1:]))
                return {"pixel_values": images, "labels": torch.empty(size, dtype=torch.int64)}

        return Trial(made, batch, self.loss(spec), heads_of(made, self.task))

    def load_model(self, context: TrainingContext) -> LoadedModel:
        loaded = super().load_model(context)
        return replace(loaded, unused_parameters=unused_in(loaded.model, context.processor))

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # The trainer would remove `ROW`, which no model reads, before it reaches the collator.
        return super().arguments(spec, {**common, "remove_unused_columns": False})

    def collator(self, context: TrainingContext) -> ImageCollator:
        return ImageCollator(context.processor)

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        setup, training = super().trainer(context, model), context.spec.training
        if training.augmentation is None:
            return setup
        processor = context.processor
        size = size_of(processor)
        collator = ImageCollator(
            processor, Augmenter(training.augmentation, training.seed, size, int(processor.resample))
        )
        return replace(setup, collator=collator, begin_epoch=collator.begin_epoch)


class ImageCollator:
    """Makes a batch of rows with the processor of the model, and changes the training images among them at random."""

    def __init__(self, processor: BaseImageProcessor, augmenter: Augmenter | None = None) -> None:
        """`augmenter`: None: no image is changed."""
        import torch

        self.processor, self.augmenter = processor, augmenter
        # Data loader workers live for all epochs, and read here which one it is.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def begin_epoch(self, epoch: int) -> None:
        """Change images as in this epoch from now on."""
        self.epoch.fill_(epoch)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return `pixel_values` [rows, channels, height, width] and `labels` int64 [rows].

        The dataset decodes the images of `rows` when it reads them. Rows of one batch all have the column `ROW`, or
        none has.
        """
        import torch

        images = [row[PIXELS].convert("RGB") for row in rows]
        options: Mapping[str, Any] = {}
        if self.augmenter is not None and ROW in rows[0]:
            epoch, options = int(self.epoch), self.augmenter.options
            images = [self.augmenter(image, epoch, row[ROW]) for image, row in zip(images, rows, strict=True)]
        pixels = self.processor(images=images, return_tensors="pt", **options)[PIXELS]
        return {PIXELS: pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def size_of(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return height and width of the images that the processor makes."""
    import PIL.Image

    made = processor(images=[PIL.Image.new("RGB", SIDES)], return_tensors="pt")[PIXELS]
    return int(made.shape[-2]), int(made.shape[-1])


def check_crops(processor: BaseImageProcessor) -> None:
    """Check that the processor takes images that have the size of the model. Raises Failure if not."""
    import PIL.Image

    height, width = size_of(processor)
    part = PIL.Image.new("RGB", (width, height))
    made = tuple(processor(images=[part], return_tensors="pt", **CROPPED)[PIXELS].shape[-2:])
    if made != (height, width) or getattr(processor, "resample", None) is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{CROP}: the model's image processor ({type(processor).__name__}) cannot be told to leave the size of an"
            " image as it is; remove crop, or choose another model",
        )


def unused_in(model: PreTrainedModel, processor: BaseImageProcessor) -> set[str]:
    """Return the names of the parameters that do not affect the logits; an empty set if that cannot be determined."""
    import PIL.Image

    pixels = processor(images=[PIL.Image.new("RGB", SIDES)], return_tensors="pt")["pixel_values"]
    try:
        return unused_parameters(model, tuple(pixels.shape[1:]))
    except Exception:  # the model reads values, which meta tensors lack; `prepare` has checked what it accepts
        return set()
