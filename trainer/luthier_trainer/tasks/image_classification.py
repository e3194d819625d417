"""image-classification: one label for an image. What the model sees is what its own processor makes of it, without augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageClassification, BaseImageProcessor

from luthier_trainer.tasks.classification import Classification

Batch = dict[str, torch.Tensor]


class ImageClassification(Classification):
    auto = AutoModelForImageClassification

    def collator(self, processor: BaseImageProcessor) -> Callable[[list[dict[str, Any]]], Batch]:
        def collate(rows: list[dict[str, Any]]) -> Batch:
            """Images, decoded as they are read, and labels → pixels [rows, channels, height, width] and labels [rows]."""
            images = [row["pixel_values"].convert("RGB") for row in rows]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate
