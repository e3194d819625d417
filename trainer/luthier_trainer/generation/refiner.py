"""The refiner of Stable Diffusion XL, which does the last steps of the images of a base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation import pipelines
from luthier_trainer.generation.prompts import Prompts
from luthier_trainer.generation.samples import Sample
from luthier_trainer.generation.schedulers import make_scheduler


class RefiningModel:
    """The refiner in `path`. Its own VAE is not used: latents are decoded as those of the base model."""

    def __init__(self, path: Path, image: ImageSettings, device: str, dtype: torch.dtype, offload: str) -> None:
        assert image.refiner, "the spec names a refiner"
        self.start = image.refiner.start
        pipe = pipelines.load(path, dtype, pipelines.REFINER)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = make_scheduler(image, pipe.scheduler)
        pipelines.place(pipe, image, device, offload)
        self.pipe, self.prompts = pipe, Prompts(pipe, image)

    def refined(self, latents: torch.Tensor, batch: Sequence[Sample], more: dict[str, Any]) -> torch.Tensor:
        """Return the finished latents. `more`: the arguments that both models get."""
        given: Callable[..., Any] = self.pipe
        finished: torch.Tensor = given(
            **self.prompts.arguments(batch), **more, image=latents, denoising_start=self.start
        ).images
        return finished
