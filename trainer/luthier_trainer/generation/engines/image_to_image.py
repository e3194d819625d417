"""image-to-image: images made of others with the pipelines of Stable Diffusion, whole or where a mask is white.

An image depends only on its prompts, its seed, its image and mask, and the batch size, as with text-to-image
(`images`): diffusers encodes each image alone, with the noise generator of its sample.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.images import ImageEngine, image_settings, known_arguments
from luthier_trainer.generation.guidance import guided_within
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.pictures import Pictures
from luthier_trainer.generation.pipelines import check_strength
from luthier_trainer.generation.records import SCORE, UNSAFE, ImageRecords, keys_of
from luthier_trainer.generation.samples import Sample


class ImageToImageEngine(ImageEngine):
    """Makes images of others, `batch_size` at a time."""

    records = ImageRecords(keys=keys_of("image-to-image", ("file_name", "size", SCORE, UNSAFE)))
    pictures: Pictures
    whole: Any
    """The pipeline that changes images as a whole."""
    masked: Any
    """The pipeline that changes what is white in a mask."""

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Self:
        """Return the engine with its pipelines on the device. Raises Failure if one or an adapter cannot be loaded."""
        engine = super().load(run, prepared, hardware, batch_size)
        engine.pictures = Pictures(WorkspaceFolder(Path(run.workspace)))
        # They share the components, also those that wait elsewhere for the GPU.
        engine.whole, engine.masked = (
            kind.from_pipe(engine.pipe) for kind in (AutoPipelineForImage2Image, AutoPipelineForInpainting)
        )
        for pipe in (engine.whole, engine.masked):
            pipe.set_progress_bar_config(disable=True)
        return engine

    def check_settings(self, sample: Sample) -> None:
        """Check that the pipelines can work with the settings of a sample. Raises Failure if they cannot."""
        super().check_settings(sample)
        check_strength(hasattr(self.pipe, "text_encoder_2"), image_settings(sample))

    def group(self, sample: Sample) -> Hashable:
        """Return what samples of a batch have in common: also whether there is a mask."""
        return super().group(sample), "mask" in sample.cells

    def denoised(self, batch: Sequence[Sample], more: dict[str, Any]) -> torch.Tensor:
        settings = image_settings(batch[0])
        images = [self.pictures.opened(sample.cells["initImage"]) for sample in batch]
        given: dict[str, Any] = {"strength": settings.strength}
        if "mask" in batch[0].cells:
            pipe = self.masked
            given["mask_image"] = [self.pictures.opened(sample.cells["mask"], "L") for sample in batch]
            given |= {"height": settings.height, "width": settings.width}
        else:
            pipe = self.whole
        given["image"] = [
            pipe.image_processor.resize(image, height=settings.height, width=settings.width) for image in images
        ]
        pipe.scheduler = self.pipe.scheduler
        with guided_within(pipe, settings):
            latents: torch.Tensor = pipe(
                **self.prompts_for(batch[0]).arguments(batch),
                **known_arguments(pipe, more),  # those of Stable Diffusion 1 and 2 know less than XL's
                **given,
            ).images
        if self.upcasts:
            self.pipe.vae.to(torch.float32)  # diffusers has put it back into fp16 after encoding
        return latents
