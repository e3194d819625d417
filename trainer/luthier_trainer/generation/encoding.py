"""Encodes images as files of the format that the user chose. A PNG also carries metadata on how it was made."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from luthier_api.generate import ImageSettings
from luthier_trainer.generation.samples import Sample

# Times of one 1024 × 1024 image on one core: level 1 takes 88 ms, Pillow's own level 6 takes 439 ms for 16 % less.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("png", {"compress_level": 1}),
    "webp": ("webp", {"lossless": True, "method": 0}),
    "jpeg": ("jpg", {"quality": 95}),
}


def encode(image: Image, settings: ImageSettings, sample: Sample) -> tuple[str, bytes]:
    """Return suffix and content of the file.

    A PNG carries the text `parameters`, which many viewers show, and `luthier`, the same data as JSON. Neither names
    the row, so the same prompt and seed give the same bytes, independent of their position in the inputs.
    """
    suffix, options = FORMATS[settings.format]
    if settings.format == "png":
        made_of = {
            name: value for name, value in sample.facts().items() if name in ("prompt", "negativePrompt", "seed")
        }
        facts = made_of | {"scheduler": settings.scheduler, "steps": settings.steps, "guidance": settings.guidance}
        info = PngInfo()
        info.add_itxt("parameters", parameters(settings, sample))
        info.add_itxt("luthier", json.dumps(facts, ensure_ascii=False))
        options = options | {"pnginfo": info}
    file = io.BytesIO()
    image.save(file, format=settings.format, **options)
    return suffix, file.getvalue()


def parameters(settings: ImageSettings, sample: Sample) -> str:
    """Return how an image was made, in the text format that image viewers for Stable Diffusion parse."""
    negative = f"\nNegative prompt: {sample.negative_prompt}" if sample.negative_prompt else ""
    return (
        f"{sample.prompt}{negative}\nSteps: {settings.steps}, Sampler: {settings.scheduler}, CFG scale:"
        f" {settings.guidance}, Seed: {sample.seed}, Size: {settings.width}x{settings.height}"
    )
