"""text-to-image: pipelines of diffusers, with LoRA adapters fused into them, over batches of prompts.

An image depends only on its prompts, its seed and the batch size: each image has its own noise generator on the CPU
(those of GPUs differ between models of GPUs), all batches have one size, and each text is encoded and each latent
decoded alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.utils import logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation import lora, pipelines
from luthier_trainer.generation.encoding import FORMATS, About, encode
from luthier_trainer.generation.engines.base import Batched
from luthier_trainer.generation.families import FAMILIES
from luthier_trainer.generation.guidance import guided_within
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.prompts import Prompts
from luthier_trainer.generation.records import SCORE, UNSAFE, ImageRecords, line_keys
from luthier_trainer.generation.refiner import RefiningModel
from luthier_trainer.generation.safety import SafetyChecker
from luthier_trainer.generation.samples import Output, Sample, Unusable, padded
from luthier_trainer.generation.schedulers import eta
from luthier_trainer.generation.settings import settings
from luthier_trainer.models.loranames import Names
from luthier_trainer.models.pipelines import denoiser_of
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat


class ImageEngine(Batched):
    """Makes images, `batch_size` at a time, with the pipeline in `model_path` and the adapters of the spec."""

    records = ImageRecords(keys=line_keys("prompt", "negativePrompt", "file_name", "size", SCORE, UNSAFE))

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> Self:
        """Return the engine with its pipeline on the device. Raises Failure if it or an adapter cannot be loaded."""
        adapters = [Path(path) for path in prepared.adapter_paths]
        about = About(settings(run, prepared, hardware, batch_size), hardware.environment)
        others = map(Path, prepared.other_model_paths)
        refiner = next(others) if prepared.refiner else None
        offload = prepared.plan.offload or "none"
        engine = cls(run.spec, Path(prepared.model_path), adapters, hardware, batch_size, about, refiner, offload)
        if safety := run.spec.image.safety:
            engine.checker = SafetyChecker(next(others), safety, hardware.device)
        return engine

    def __init__(
        self,
        spec: GenerateJobSpec,
        model_path: Path,
        adapters: Sequence[Path],
        hardware: Hardware,
        batch_size: int,
        about: About,
        refiner: Path | None = None,
        offload: str = "none",
    ) -> None:
        for library in (logging, transformers_logging):
            library.disable_progress_bar()
            library.set_verbosity_error()
        self.batch_size = batch_size
        self.hardware, self.about = hardware, about
        # Adapters are fused once, in fp32, and rounded with the weights.
        pipe = pipelines.load(model_path, hardware.dtype, merging=bool(adapters))
        self.family = FAMILIES[type(pipe).__name__]
        parts = {name: model for name in self.family.adapted if (model := getattr(pipe, name, None)) is not None}
        names = Names(parts) if adapters else None
        changes = [
            (lora.read(path, names, f"spec.adapters[{i}]"), spec.adapters[i].weight)
            for i, path in enumerate(adapters)
            if names
        ]
        lora.fuse(parts, changes)
        for model in parts.values():
            model.to(hardware.dtype)
        # A VAE with `force_upcast` overflows in fp16. diffusers would convert its weights to fp32 and back for each
        # batch; here they stay in fp32.
        self.upcasts = hardware.dtype == torch.float16 and pipe.vae.config.force_upcast
        if self.upcasts:
            pipe.vae.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        self.repository_scheduler = pipe.scheduler
        pipelines.place(pipe, spec.image, hardware.device, offload)
        self.pipe = pipe
        self.prompts: dict[bool, Prompts] = {}
        """Whether there is guidance → the embeddings of prompts."""
        self.problems: dict[str, str | None] = {}
        """Variant of samples → why the model cannot work with their settings, if so."""
        self.refiner: RefiningModel | None = None
        if refiner:
            self.refiner = RefiningModel(refiner, spec.image, hardware.device, hardware.dtype, offload)
        self.checker: SafetyChecker | None = None
        self.pipes = [pipe, *([self.refiner.pipe] if self.refiner else [])]

    def problem(self, sample: Sample) -> str | None:
        """Return why no image can be made for a sample; None if it can: its prompt must be read to its end, and the
        model must be able to work with its settings.
        """
        if sample.variant not in self.problems:
            self.problems[sample.variant] = self.problem_of_settings(sample)
        return self.problems[sample.variant] or self.prompts_for(sample).problem(sample)

    def problem_of_settings(self, sample: Sample) -> str | None:
        """Return why the model cannot work with the settings of a sample; None if it can."""
        # The refiner has the scheduler and the guidance of the job, and takes latents of any size.
        if self.refiner and {*(sample.overrides or {})} - {"format", "aspectRatio", "width", "height"}:
            return "settings: with image.refiner all rows have those of the job; remove what the row overrides"
        try:
            self.check_settings(sample)
        except Failure as failure:
            return failure.message
        return None

    def check_settings(self, sample: Sample) -> None:
        """Check that the model can work with the settings of a sample. Raises Failure if it cannot."""
        settings = image_settings(sample)
        self.family.check_settings(denoiser_of(self.pipe), self.pipe.vae, settings)
        self.family.check_scheduler(settings, self.repository_scheduler)

    def prompts_for(self, sample: Sample) -> Prompts:
        """Return what encodes the prompts of a sample."""
        settings = image_settings(sample)
        guided = settings.guidance > 1
        if guided not in self.prompts:
            self.prompts[guided] = self.family.prompts(self.pipe, settings)
        return self.prompts[guided]

    def group(self, sample: Sample) -> Hashable:
        """Return the settings of a sample, and the length of its embeddings."""
        return sample.variant, self.prompts_for(sample).size(sample)

    @torch.inference_mode()
    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of samples of one group, in the same order."""
        batch, settings = padded(samples, self.batch_size), image_settings(samples[0])
        self.pipe.scheduler = self.family.scheduler(settings, self.repository_scheduler)
        for pipe in self.pipes:
            if hasattr(pipe.scheduler, "noise_sampler_seed"):
                # The SDE sampler ignores generators. Without seeds, its noise would differ in each run.
                pipe.scheduler.noise_sampler_seed = [s.seed or 0 for s in batch]
        more: dict[str, Any] = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "guidance_rescale": settings.guidance_rescale,
            "generator": [torch.Generator().manual_seed(s.seed or 0) for s in batch],
            "eta": eta(settings.scheduler),
            "callback_on_step_end": heartbeat_after_step,
            "output_type": "latent",
        }
        latents = self.denoised(batch, more)
        return [self.output(sample, latents[i : i + 1]) for i, sample in enumerate(samples)]

    def denoised(self, batch: Sequence[Sample], more: dict[str, Any]) -> torch.Tensor:
        """Return the latents of a whole batch of samples, without noise. `more`: arguments of all pipelines."""
        settings = image_settings(batch[0])
        size = {"width": settings.width, "height": settings.height}
        end = {"denoising_end": self.refiner.start} if self.refiner else {}
        with guided_within(self.pipe, settings):
            made = self.pipe(
                **self.prompts_for(batch[0]).arguments(batch), **known_arguments(self.pipe, more), **size, **end
            ).images
        latents = self.family.latents(self.pipe, made, settings)
        return self.refiner.refined(latents, batch, more) if self.refiner else latents

    def output(self, sample: Sample, latent: torch.Tensor) -> Output:
        """Return the output of a latent, [1, channels, height, width]. Only what runs on the device is done here, and
        the check of the image, if the job has one.
        """
        decoded = self.decode(latent)
        pixels, finite = as_bytes(decoded), torch.isfinite(decoded).all()
        suffix = FORMATS[image_settings(sample).format].suffix
        facts: dict[str, Any] = {}
        if self.checker and finite.item():
            pixels = pixels.cpu()
            score = self.checker.score(Image.fromarray(pixels.numpy()))
            facts = {SCORE: score, UNSAFE: self.checker.is_unsafe(score)}
            if problem := self.checker.problem(score):
                return Output(sample, facts, error=problem)
        return Output(sample, facts, file=partial(self.file, sample, pixels, finite), suffix=suffix)

    def file(self, sample: Sample, pixels: torch.Tensor, finite: torch.Tensor) -> bytes:
        """Return the file of an image, uint8 [height, width, 3]. Raises Unusable if it is not `finite`."""
        if not finite.item():
            raise Unusable(f"the image is not finite in {self.hardware.precision}; set spec.precision to bf16 or fp32")
        return encode(Image.fromarray(pixels.cpu().numpy()), image_settings(sample), sample, self.about)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the pixels of a latent, [1, 3, height, width], from -1 to 1, decoded as the pipeline does it."""
        vae = self.pipe.vae
        latent = latent.to(vae.dtype)
        mean, deviation = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and deviation is not None:
            latent = latent * latent.new_tensor(deviation).view(
                1, -1, 1, 1
            ) / vae.config.scaling_factor + latent.new_tensor(mean).view(1, -1, 1, 1)
        else:
            latent = latent / vae.config.scaling_factor
            if vae.config.shift_factor is not None:
                latent = latent + vae.config.shift_factor
        return vae.decode(latent, return_dict=False)[0]


def image_settings(sample: Sample) -> ImageSettings:
    """Return the settings of a sample."""
    assert isinstance(sample.settings, ImageSettings)
    return sample.settings


def known_arguments(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments that a pipeline has. Settings for others were refused."""
    known = signature(type(pipe).__call__).parameters
    return {name: value for name, value in given.items() if name in known}


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels from -1 to 1, [1, 3, height, width], as uint8 [height, width, 3], rounded as diffusers does it."""
    shares = (pixels[0].float() / 2 + 0.5).clamp(0, 1)
    return (shares.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()


def heartbeat_after_step(
    pipe: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Send a heartbeat after each step: a batch on a CPU can take longer than the supervisor waits for one."""
    beat()
    return {}
