"""text-to-image: Stable Diffusion XL, with LoRA adapters fused into it, over batches of prompts.

An image depends on its prompts, its seed and the batch size alone: noise comes from a CPU generator an image (those of
GPUs differ between models), batches have one size, and each latent is decoded alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_trainer.generation import lora, pipelines
from luthier_trainer.generation.encoding import encode
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.loranames import Names
from luthier_trainer.generation.records import ImageRecords
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.schedulers import eta, make_scheduler
from luthier_trainer.models.pipelines import unread_tokens
from luthier_trainer.runtime.heartbeat import beat


class ImageEngine:
    """`batch_size` images at once with the pipeline in `model_path` and the adapters of the spec."""

    records = ImageRecords(
        keys=(
            "row",
            "sample",
            "prompt",
            "negativePrompt",
            "seed",
            "input",
            "file_name",
            "error",
            "unreadTokens",
            "unreadNegativeTokens",
            "size",
            "sha256",
            "settings",
            "environment",
        )
    )

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> ImageEngine:
        """The engine with its pipeline on the device. Raises Failure."""
        adapters = [Path(path) for path in prepared.adapter_paths]
        return cls(run.spec, Path(prepared.model_path), adapters, hardware, batch_size)

    def __init__(
        self, spec: GenerateJobSpec, model_path: Path, adapters: Sequence[Path], hardware: Hardware, batch_size: int
    ) -> None:
        for library in (logging, transformers_logging):
            library.disable_progress_bar()
            # They warn in each batch that a prompt is truncated; the lines of the outputs say it once.
            library.set_verbosity_error()
        self.settings, self.batch_size, self.scheduler_name = spec.image, batch_size, spec.image.scheduler
        # Adapters are fused once, in fp32, and rounded with the weights.
        pipe = pipelines.load(model_path, torch.float32 if adapters else hardware.dtype)
        parts = {
            name: model
            for name in ("unet", "text_encoder", "text_encoder_2")
            if (model := getattr(pipe, name, None)) is not None
        }
        names = Names(parts) if adapters else None
        changes = [
            (lora.read(path, names, f"spec.adapters[{i}]"), spec.adapters[i].weight)
            for i, path in enumerate(adapters)
            if names
        ]
        lora.fuse(parts, changes)
        pipe.to(hardware.device, hardware.dtype)
        # Such a VAE overflows in fp16. diffusers moves its weights there and back for each batch; here it stays.
        if hardware.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = make_scheduler(spec.image.scheduler, pipe.scheduler, spec.image.steps)
        self.tokenizers = [t for t in (pipe.tokenizer, pipe.tokenizer_2) if t is not None]
        self.pipe, self.hardware = pipe, hardware

    def problem(self, sample: Sample) -> str | None:
        """Every text can be drawn: of one that is too long for the text encoders the beginning is read, and its line
        says so.
        """
        return None

    def group(self, sample: Sample) -> Hashable:
        """Models differ in what no negative prompt means (zeros, or the empty text), so these rows keep apart."""
        return sample.negative_prompt is not None

    @torch.inference_mode()
    def make(self, samples: Sequence[Sample]) -> list[Output]:
        batch = padded(samples, self.batch_size)
        negative = [s.negative_prompt for s in batch] if samples[0].negative_prompt is not None else None
        if hasattr(self.pipe.scheduler, "noise_sampler_seed"):
            # The SDE sampler ignores generators, and without seeds its noise never repeats.
            self.pipe.scheduler.noise_sampler_seed = [s.seed for s in batch]
        latents = self.pipe(
            prompt=[s.prompt for s in batch],
            negative_prompt=negative,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            width=self.settings.width,
            height=self.settings.height,
            generator=[torch.Generator().manual_seed(s.seed) for s in batch],
            eta=eta(self.scheduler_name),
            callback_on_step_end=heartbeat_after_step,
            output_type="latent",
        ).images
        return [self.output(sample, latents[i : i + 1]) for i, sample in enumerate(samples)]

    def output(self, sample: Sample, latent: torch.Tensor) -> Output:
        """The image file of one latent, 1 × channels × height × width."""
        pixels = self.decode(latent)
        if not torch.isfinite(pixels).all():
            return Output(
                sample,
                error=f"the image is not finite in {self.hardware.precision}; set spec.precision to bf16 or fp32",
            )
        image = self.pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]
        texts = {"unreadTokens": sample.prompt, "unreadNegativeTokens": sample.negative_prompt or ""}
        unread = {name: unread_tokens(self.tokenizers, text) for name, text in texts.items()}
        facts = {name: count for name, count in unread.items() if count}
        suffix, content = encode(image, self.settings, sample)
        return Output(sample, facts, file=content, suffix=suffix)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1], as the pipeline itself decodes them."""
        vae = self.pipe.vae
        latent = latent.to(vae.dtype)
        mean, deviation = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and deviation is not None:
            latent = latent * latent.new_tensor(deviation).view(
                1, -1, 1, 1
            ) / vae.config.scaling_factor + latent.new_tensor(mean).view(1, -1, 1, 1)
        else:
            latent = latent / vae.config.scaling_factor
        return vae.decode(latent, return_dict=False)[0]


def heartbeat_after_step(
    pipe: StableDiffusionXLPipeline, step: int, timestep: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Send a heartbeat after each step: a batch on CPU can take longer than the supervisor waits for one."""
    beat()
    return {}
