"""image-classification: one label for an image. What the model sees is what its own processor makes of it, without
augmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from luthier_trainer.models.heads import twin
from luthier_trainer.tasks.classification import Classification

Batch = dict[str, torch.Tensor]
# Pixels of an image that stands for all of them: `prepare` has seen that the processor makes the same shape of any
SIDES = (
    64,
    64,
)


class ImageClassification(Classification):
    auto = AutoModelForImageClassification

    def collator(self, processor: BaseImageProcessor) -> Callable[[list[dict[str, Any]]], Batch]:
        def collate(rows: list[dict[str, Any]]) -> Batch:
            """Images, decoded as they are read, and labels → pixels [rows, channels, height, width] and labels
            [rows].
            """
            images = [row["pixel_values"].convert("RGB") for row in rows]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate

    def idle(self, model: PreTrainedModel, processor: BaseImageProcessor) -> set[str]:
        pixels = processor(images=[PIL.Image.new("RGB", SIDES)], return_tensors="pt")["pixel_values"]
        try:
            return idle_weights(model, tuple(pixels.shape[1:]))
        except Exception:  # it looks at values, which are not there; what it takes has been seen in `prepare`
            return set()


def idle_weights(model: PreTrainedModel, shape: tuple[int, ...]) -> set[str]:
    """Names of the weights that have no part in the logits of images that are `shape` [channels, height, width]: of a
    pre-training's other task, say. Seen on the meta device, without memory. Raises whatever the model does where it
    does not take such images.
    """
    bare = twin(model).eval()
    bare(pixel_values=torch.empty(2, *shape, device="meta")).logits.sum().backward()
    return {name for name, weight in bare.named_parameters() if weight.grad is None}
