"""text-to-image: Stable Diffusion XL, with LoRA adapters fused into it, over batches of prompts.

An image depends only on its prompts, its seed and the batch size: each image has its own noise generator on the CPU
(those of GPUs differ between models of GPUs), all batches have one size, and each latent is decoded alone.
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
    """Makes images, `batch_size` at a time, with the pipeline in `model_path` and the adapters of the spec."""

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
        """Return the engine with its pipeline on the device. Raises Failure if it or an adapter cannot be loaded."""
        adapters = [Path(path) for path in prepared.adapter_paths]
        return cls(run.spec, Path(prepared.model_path), adapters, hardware, batch_size)

    def __init__(
        self, spec: GenerateJobSpec, model_path: Path, adapters: Sequence[Path], hardware: Hardware, batch_size: int
    ) -> None:
        for library in (logging, transformers_logging):
            library.disable_progress_bar()
            # They would warn in each batch that a prompt is truncated. The lines of the outputs record it once.
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
        # A VAE with `force_upcast` overflows in fp16. diffusers would convert its weights to fp32 and back for each
        # batch; here they stay in fp32.
        if hardware.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = make_scheduler(spec.image.scheduler, pipe.scheduler, spec.image.steps)
        self.tokenizers = [t for t in (pipe.tokenizer, pipe.tokenizer_2) if t is not None]
        self.pipe, self.hardware = pipe, hardware

    def problem(self, sample: Sample) -> str | None:
        """Return None: an image can be made for any prompt.

        The text encoders read only the beginning of a prompt that is too long, and its line records that.
        """
        return None

    def group(self, sample: Sample) -> Hashable:
        """Return whether there is a negative prompt. Without one, some models use zeros and others the empty text."""
        return sample.negative_prompt is not None

    @torch.inference_mode()
    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of samples of one group, in the same order."""
        batch = padded(samples, self.batch_size)
        negative = [s.negative_prompt for s in batch] if samples[0].negative_prompt is not None else None
        if hasattr(self.pipe.scheduler, "noise_sampler_seed"):
            # The SDE sampler ignores generators. Without seeds, its noise would differ in each run.
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
        """Return the output with the encoded image of a latent, [1, channels, height, width]."""
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
        return vae.decode(latent, return_dict=False)[0]


def heartbeat_after_step(
    pipe: StableDiffusionXLPipeline, step: int, timestep: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Send a heartbeat after each step: a batch on a CPU can take longer than the supervisor waits for one."""
    beat()
    return {}
