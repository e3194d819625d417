"""What differs between the kinds of pipelines: the model that denoises, how prompts are read, what settings do.

Stable Diffusion 1, 2 and XL have a UNet, and samplers of many classes. Stable Diffusion 3 and FLUX have a transformer,
which learned the flow from noise to images: few samplers can follow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from luthier_api.exitcodes import ExitCode
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.flow_prompts import FluxPrompts, SD3Prompts
from luthier_trainer.generation.guidance import check_interval
from luthier_trainer.generation.prompts import Prompts
from luthier_trainer.generation.schedulers import make_flow_scheduler, make_scheduler, rehearse
from luthier_trainer.models import pipelines
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice


class Family:
    """Pipelines with a UNet: Stable Diffusion 1, 2 and XL."""

    denoiser: ClassVar[str] = "unet"
    """Diffusers' name of the model that denoises."""
    adapted: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")
    """Models that adapters can change."""
    prompts: ClassVar[type[Prompts]] = Prompts
    patch: ClassVar[int] = 1
    """Elements of a latent, along one side, that the model reads as one."""
    noun: ClassVar[str] = "UNet"
    packed: ClassVar[int] = 1
    """Elements of a latent that are channels of one where the model reads it."""

    def check_model(self, denoiser: Any, vae: Any, field: str) -> None:
        """Check that the model reads a latent and nothing beside it. Raises Failure if not."""
        read, made = denoiser.config.in_channels, vae.config.latent_channels * self.packed
        if read != made:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: its {self.noun} reads {read} channels, and a latent of its VAE has {made}. Models that read"
                " a mask or another image beside it (inpainting, InstructPix2Pix, FLUX Fill) are not supported; choose"
                " one without",
            )

    def check_settings(self, denoiser: Any, vae: Any, settings: ImageSettings) -> None:
        """Check that the model can work with settings. Raises Failure if it cannot."""
        check_size(vae, settings, self.patch)
        check_interval(denoiser, settings)

    def scheduler(self, settings: ImageSettings, own: Any) -> Any:
        """Return the scheduler of the settings. `own`: that of the repository. Raises Failure if there is none."""
        return make_scheduler(settings, own)

    def check_scheduler(self, settings: ImageSettings, own: Any) -> None:
        """Check that the scheduler of the settings can do the steps. Raises Failure if it cannot."""
        rehearse(settings.scheduler, self.scheduler(settings, own))

    def report(self, denoiser: Any, rows: Iterable[Mapping[str, Any]], settings: ImageSettings) -> None:
        """Give notices for what the model has no use for."""

    def latents(self, pipe: Any, made: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
        """Return what the pipeline has made as latents, [images, channels, height, width]."""
        return made


class Flow(Family):
    """Pipelines with a transformer that learned a flow."""

    denoiser = "transformer"
    noun = "transformer"
    patch = 2

    def check_settings(self, denoiser: Any, vae: Any, settings: ImageSettings) -> None:
        """Check also that no setting is without effect. Raises Failure if one is."""
        for name, is_set in (
            ("guidanceRescale", settings.guidance_rescale > 0),
            ("attentionSlicing", settings.attention_slicing),
        ):
            if is_set:
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.image.{name}: has no effect on Stable Diffusion 3 and FLUX; remove it",
                )
        super().check_settings(denoiser, vae, settings)

    def scheduler(self, settings: ImageSettings, own: Any) -> Any:
        return make_flow_scheduler(settings, own)

    def check_scheduler(self, settings: ImageSettings, own: Any) -> None:
        self.scheduler(settings, own)


class SD3(Flow):
    """Stable Diffusion 3 and 3.5."""

    adapted = ("transformer", "text_encoder", "text_encoder_2")
    prompts = SD3Prompts

    def check_settings(self, denoiser: Any, vae: Any, settings: ImageSettings) -> None:
        """Check also that the model has positions for the image. Raises Failure if it has not."""
        super().check_settings(denoiser, vae, settings)
        side = denoiser.config.pos_embed_max_size * self.patch * pipelines.pixels_of_a_latent(vae)
        for name, size in (("width", settings.width), ("height", settings.height)):
            if size > side:
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.image.{name}: {size} is more than the {side} pixels for which this model has positions; set"
                    f" {side} or less",
                )


class Flux(Flow):
    """FLUX.1 dev and schnell."""

    adapted = ("transformer", "text_encoder")
    prompts = FluxPrompts
    packed = 4

    def report(self, denoiser: Any, rows: Iterable[Mapping[str, Any]], settings: ImageSettings) -> None:
        if not denoiser.config.guidance_embeds and settings.guidance > 1:
            notice(
                f"spec.image.guidance: this model was distilled to do without (FLUX.1 schnell), so that"
                f" {settings.guidance:g} has no effect; set guidance: 1"
            )
        if refused := sum(bool(row.get("negativePrompt")) for row in rows):
            notice(
                f"spec.inputs.columns.negativePrompt: FLUX reads none; the outputs of {refused} rows that have one will"
                " be errors. Remove them"
            )

    def latents(self, pipe: Any, made: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
        unpacked: torch.Tensor = pipe._unpack_latents(made, settings.height, settings.width, pipe.vae_scale_factor)
        return unpacked


UNET, SD_3, FLUX = Family(), SD3(), Flux()
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionXLPipeline": UNET,
    "StableDiffusionXLImg2ImgPipeline": UNET,
    "StableDiffusion3Pipeline": SD_3,
    "FluxPipeline": FLUX,
}
"""Class of a pipeline → its family."""


def check_size(vae: Any, settings: ImageSettings, patch: int = 1) -> None:
    """Check that width and height in the settings are multiples of the size of what the model reads as one.

    `patch`: elements of a latent in it, along one side. Raises Failure if not.
    """
    unit = pipelines.pixels_of_a_latent(vae) * patch
    for name, size in (("width", settings.width), ("height", settings.height)):
        if size % unit:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.image.{name}: {size} is not a multiple of {unit}, as this model wants; set"
                f" {max(1, size // unit) * unit} or {(size // unit + 1) * unit}",
            )
