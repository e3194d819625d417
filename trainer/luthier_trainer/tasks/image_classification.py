"""image-classification: predict one label for an image.

The images are converted by the model's own image processor, without augmentation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.load import Rows
from luthier_trainer.models import inspect
from luthier_trainer.tasks.base import Batch, Collator, LoadedModel, Model, TrainingContext
from luthier_trainer.tasks.classification import Classification
from luthier_trainer.tasks.images import PIXELS, ImageTask, unused_parameters
from luthier_trainer.tasks.pretrained import with_labels

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedModel

    from luthier_trainer.models.memory import Trial

# Size in pixels of a sample image. `prepare` has checked that the processor makes the same shape of all images.
SIDES = (64, 64)


class ImageClassification(Classification, ImageTask):
    """The task image-classification."""

    task = "image-classification"

    def encode(
        self, rows: Rows, processor: BaseImageProcessor, spec: FineTuneJobSpec, labels: list[str] | None, use: str
    ) -> Dataset:
        """Return the columns `pixel_values`, still encoded image files, and `labels`, int64."""
        from datasets import Features, Image, Value

        name = spec.dataset.columns.image
        data = rows.data.select_columns([name])
        data = data if name == PIXELS else data.rename_column(name, PIXELS)
        data = data.add_column("labels", self.label_ids(rows, spec, labels))
        return data.cast(Features({PIXELS: Image(), "labels": Value("int64")}))

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

    def collator(self, processor: BaseImageProcessor) -> Collator:
        """Return a function that makes a batch of rows with the processor of the model."""
        import torch

        def collate(rows: list[dict[str, Any]]) -> Batch:
            """Return `pixel_values` [rows, channels, height, width] and `labels` int64 [rows].

            The dataset decodes the images of `rows` when it reads them.
            """
            images = [row["pixel_values"].convert("RGB") for row in rows]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate


def unused_in(model: PreTrainedModel, processor: BaseImageProcessor) -> set[str]:
    """Return the names of the parameters that do not affect the logits; an empty set if that cannot be determined."""
    import PIL.Image

    pixels = processor(images=[PIL.Image.new("RGB", SIDES)], return_tensors="pt")["pixel_values"]
    try:
        return unused_parameters(model, tuple(pixels.shape[1:]))
    except Exception:  # the model reads values, which meta tensors lack; `prepare` has checked what it accepts
        return set()
