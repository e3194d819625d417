"""Real images, and models small enough for one core that learn them: scikit-learn's handwritten digits (1,797 of 8 × 8
pixels).

`python tests/trainer/digits.py FOLDER` writes digits and models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
)

SIDE = 16  # pixels that the models look at; the processor scales the digits up
VIT = ViTConfig(
    image_size=SIDE,
    patch_size=8,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.1,  # 0.02 is for hundreds of dimensions
)
RESNET = ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False
)


def write_digits(folder: Path, digits: Sequence[int] = range(10), each: int = 40, skip: int = 0) -> Path:
    """`each` images of each of `digits`, after the first `skip` of it, in a folder named after it."""
    found = load_digits()
    for digit in digits:
        (folder / str(digit)).mkdir(parents=True)
        for i in [i for i, label in enumerate(found.target) if label == digit][skip : skip + each]:
            Image.fromarray((found.images[i] * 15.9).astype("uint8")).save(folder / str(digit) / f"{i}.png")
    return folder


def captioned(folder: Path, pictures: Path) -> Path:
    """The pictures in one folder, each with its caption."""
    folder.mkdir()
    lines = []
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        Image.open(path).convert("RGB").resize((32, 32)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"the digit {path.parent.name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_model(folder: Path, config: PreTrainedConfig = VIT, seed: int = 1, **processor: Any) -> Path:
    """A model with new weights, and its image processor."""
    torch.manual_seed(seed)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ViTImageProcessor(**({"size": {"height": SIDE, "width": SIDE}} | processor)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    top = Path(sys.argv[1])
    write_digits(top / "digits")
    save_model(top / "vit")
    save_model(top / "resnet", RESNET)
