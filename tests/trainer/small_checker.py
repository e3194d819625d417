"""A small model that checks images (`image.safety`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

LABELS = ("normal", "nsfw", "gore")


def write_checker(folder: Path, **config: Any) -> Path:
    """A small classifier, whose scores of images differ."""
    torch.manual_seed(5)
    given = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.6,
        "id2label": dict(enumerate(LABELS)),
    }
    ViTForImageClassification(ViTConfig(**given | config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
