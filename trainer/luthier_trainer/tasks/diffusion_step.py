"""A step of `text-to-image` on the meta device, from which memory is planned. Imports torch at the top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.models.memory import Forward, Trial
from luthier_trainer.models.pipelines import pixels_of_a_latent
from luthier_trainer.runtime.devices import DTYPES
from luthier_trainer.tasks.base import Batch
from luthier_trainer.tasks.buckets import Size
from luthier_trainer.tasks.diffusion import (
    TOKENS,
    Draw,
    FrozenModels,
    ReadingUNet,
    encoders_of,
    learning_part,
    row_losses,
)
from luthier_trainer.tasks.images import PIXELS
from luthier_trainer.tasks.kept_encodings import DEVIATION, HIDDEN, MEAN, POOLED, TIME_IDS
from luthier_trainer.tasks.text_to_image import SIZE_NUMBERS, images_of_a_row
from luthier_trainer.workspace.plan import plan_precision


def of_images(found: Mapping[str, Any], schedule: Any, spec: FineTuneJobSpec, size: Size) -> Trial:
    """Return a step over images of `size`, as `diffusion.DiffusionTrainer` computes it.

    `found`: the models of a pipeline on the meta device, by their names in it. `schedule`: configuration of its noise.
    """
    precision = plan_precision(spec.training.precision, spec.resources.gpus_per_node)
    computed = DTYPES["bf16" if precision == "auto" else precision]
    encoders = [encoder.to(computed) for encoder in encoders_of(found).values()]
    model = learning_part(found, spec)
    resting = [] if isinstance(model, ReadingUNet) else encoders
    for other in (found["vae"], *resting):
        other.requires_grad_(False).eval()
    frozen = FrozenModels(found["vae"], resting, DDPMScheduler.from_config(schedule))
    frozen.schedule.alphas_cumprod = frozen.schedule.alphas_cumprod.to("meta")  # the first step would move them
    words = encoders[0].config.max_position_embeddings

    def batch(rows: int) -> Batch:
        rows *= images_of_a_row(spec)
        with torch.device("meta"):
            if spec.image.cache_encodings:
                return encodings(rows)
            tokens = {name: torch.empty((rows, words), dtype=torch.int64) for name in TOKENS[: len(encoders)]}
            sizes = {"time_ids": torch.empty(rows, SIZE_NUMBERS)} if len(encoders) > 1 else {}
            return {PIXELS: torch.empty(rows, 3, size.height, size.width), **tokens, **sizes}

    def encodings(images: int) -> Batch:
        """What is kept of `images` images (`kept_encodings`)."""
        unit = pixels_of_a_latent(found["vae"])
        latents = (images, found["vae"].config.latent_channels, size.height // unit, size.width // unit)
        texts = [encoder.config for encoder in encoders]
        kept = {MEAN: torch.empty(latents), DEVIATION: torch.empty(latents)}
        kept[HIDDEN] = torch.empty(images, words, sum(config.hidden_size for config in texts), dtype=computed)
        if len(texts) > 1:
            kept |= {POOLED: torch.empty(images, texts[1].projection_dim, dtype=computed)}
            kept |= {TIME_IDS: torch.empty(images, SIZE_NUMBERS)}
        return kept

    def step(forward: Forward, batch: dict[str, Any]) -> torch.Tensor:
        mean, deviation = frozen.posterior(batch)
        timesteps = torch.empty(len(mean), dtype=torch.int64, device="meta")
        drawn = Draw(timesteps, torch.empty_like(mean), torch.empty_like(mean))
        latents = frozen.scaled(mean + deviation * drawn.posterior)
        given = {
            "sample": frozen.schedule.add_noise(latents, drawn.noise, drawn.timesteps),
            "timestep": drawn.timesteps,
            **frozen.read(batch),
        }
        target = frozen.target(latents, drawn)
        return row_losses(forward(**given)["sample"], target).mean()

    beside = () if spec.image.cache_encodings else (found["vae"], *resting)
    return Trial(model, batch, None, [], step=step, beside=beside)
