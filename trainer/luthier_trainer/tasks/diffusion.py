"""A transformers Trainer that computes the loss of a denoising UNet (Stable Diffusion XL): the noise in latents of
images, given their captions and sizes.

The frozen VAE and text encoders run in each step, because `prepare` has no GPU for them. For SDXL and an image of
1024 × 1024 pixels the VAE computes 4.9 of a step's 25 TFLOP, in fp32 (FlopCounterMode, activations checkpointed).
What is drawn for a row depends on the seed, the step and the row alone. A resumed run, and one whose rows are divided
among more processes, therefore sees the same noise, without any state of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch.nn.functional import mse_loss
from transformers import EvalPrediction, Trainer

from luthier_trainer.models import pipelines
from luthier_trainer.tasks.images import PIXELS
from luthier_trainer.tasks.text_to_image import ROW

GOLDEN = 0.6180339887498949  # multiples of the golden ratio, modulo 1, cover the unit interval evenly


@dataclass(frozen=True)
class Draw:
    """What is drawn for the rows of a batch."""

    timesteps: torch.Tensor
    """int64 [rows]: how far the noise has come, from 0 to the schedule's last step."""
    posterior: torch.Tensor
    """[rows, channels, height, width]: which of the latents that the VAE thinks likely."""
    noise: torch.Tensor
    """[rows, channels, height, width]: what is mixed into the latents."""


def draw(keys: Sequence[str], shape: torch.Size, timesteps: int) -> Draw:
    """Draw for rows with these `keys`. `shape`: of a row's latents, channels × height × width. `timesteps`: of the
    schedule.

    Each row has a generator of its own on the CPU: those of GPUs differ between models.
    """
    rows = []
    for key in keys:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        timestep = torch.randint(timesteps, (), generator=generator)
        rows.append((timestep, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)))
    return Draw(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def draw_for_training(seed: int, step: int, rows: Sequence[int], shape: torch.Size, timesteps: int) -> Draw:
    """Draw anew for each step."""
    return draw([f"{seed}:{step}:{row}" for row in rows], shape, timesteps)


def draw_for_evaluation(seed: int, rows: Sequence[int], shape: torch.Size, timesteps: int) -> Draw:
    """Draw the same in each evaluation. The timesteps of consecutive rows are spread evenly: the loss depends more on
    them than on anything else.
    """
    drawn = draw([f"{seed}:held-out:{row}" for row in rows], shape, timesteps)
    spread = torch.tensor([int((row + 0.5) * GOLDEN % 1 * timesteps) for row in rows])
    return Draw(spread, drawn.posterior, drawn.noise)


@dataclass(frozen=True)
class FrozenModels:
    """The models of a pipeline that do not learn, and its schedule of noise."""

    vae: AutoencoderKL
    """In fp32: that of Stable Diffusion XL overflows in fp16, and loses detail in bf16."""
    text_encoders: tuple[Any, Any]
    schedule: DDPMScheduler
    """Its `prediction_type` says what the UNet predicts: epsilon (the noise), or v_prediction (the velocity)."""

    def to(self, device: torch.device) -> None:
        for model in (self.vae, *self.text_encoders):
            model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def likely_latents(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of images.

        `pixels`: fp32 [rows, 3, height, width] from -1 to 1. Results: fp32 [rows, channels, height / 8, width / 8].
        """
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the VAE as the UNet sees them: of about unit variance."""
        config = self.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            return latents * config.scaling_factor
        mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
        return (latents - mean) * config.scaling_factor / deviation

    @torch.no_grad()
    def read(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the text encoders make of captions: [rows, 77, width of both], and pooled [rows, width of the second].

        `tokens`: int64 [rows, 77] for each encoder. As in the pipeline, the last layer but one is what the UNet reads.
        """
        outputs = [
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.text_encoders, tokens, strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]

    def target(self, latents: torch.Tensor, drawn: Draw) -> torch.Tensor:
        """What the UNet should predict: [rows, channels, height, width]."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, drawn.noise, drawn.timesteps)
        return drawn.noise


class DiffusionTrainer(Trainer):
    """Trains the adapter of a UNet on batches of `pixel_values`, `input_ids`, `input_ids_2`, `time_ids` and `labels`
    (the rows' numbers).
    """

    def __init__(self, *, frozen: FrozenModels, **kwargs: Any) -> None:
        model, args = kwargs["model"], kwargs["args"]
        # transformers would set `use_cache` in it, and configurations of diffusers cannot be changed.
        model.config = None
        if args.activation_checkpointing:
            # transformers calls a method of its own models. diffusers checkpoints without re-entering, as we ask for.
            model.get_base_model().enable_gradient_checkpointing()
            args.activation_checkpointing = False
        super().__init__(compute_loss_func=denoising_loss, **kwargs)
        self.frozen = frozen
        self.frozen.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; with `return_outputs` also that of each row, fp32 [rows]."""
        given, target = self.denoising(inputs, model.training)
        # transformers takes `labels` away before it calls the model, and gives them to the loss function.
        loss, outputs = super().compute_loss(model, given | {"labels": target}, True, num_items_in_batch)
        return (loss, {"losses": row_losses(outputs.sample, target)}) if return_outputs else loss

    def denoising(self, inputs: dict[str, Any], learning: bool) -> tuple[dict[str, Any], torch.Tensor]:
        """Arguments of the UNet, and what it should predict, for a batch. `learning`: whether to draw for a step, or
        for an evaluation.
        """
        mean, deviation = self.frozen.likely_latents(inputs[PIXELS])
        rows, shape, timesteps = inputs[ROW].tolist(), mean.shape[1:], self.frozen.schedule.config.num_train_timesteps
        if learning:
            drawn = draw_for_training(self.args.seed, self.state.global_step, rows, shape, timesteps)
        else:
            drawn = draw_for_evaluation(self.args.seed, rows, shape, timesteps)
        drawn = Draw(*(part.to(mean.device) for part in (drawn.timesteps, drawn.posterior, drawn.noise)))
        latents = self.frozen.scaled(mean + deviation * drawn.posterior)
        hidden, pooled = self.frozen.read([inputs["input_ids"], inputs["input_ids_2"]])
        given = {
            "sample": self.frozen.schedule.add_noise(latents, drawn.noise, drawn.timesteps),
            "timestep": drawn.timesteps,
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": inputs["time_ids"]},
        }
        return given, self.frozen.target(latents, drawn)


def row_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each row: [rows, channels, height, width] twice → fp32 [rows]."""
    return mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def denoising_loss(outputs: Any, target: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error, over the rows of the step."""
    losses = row_losses(outputs.sample, target)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


class RowLosses:
    """evalLoss: the mean of the rows' losses."""

    def __init__(self) -> None:
        self.loss, self.rows = 0.0, 0

    def reduce(self, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each row is all there is: [rows] → [rows, 1]."""
        return losses.double()[:, None]

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.loss += gathered.predictions.sum().item()
        self.rows += len(gathered.predictions)
        if not compute_result:
            return {}
        mean = self.loss / self.rows
        self.loss, self.rows = 0.0, 0
        return {"loss": mean}


def load_frozen(path: Path, dtype: torch.dtype, field: str) -> FrozenModels:
    """The models that do not learn, of the pipeline in `path`: text encoders in `dtype`. Raises Failure."""
    config = pipelines.read_scheduler(path, pipelines.index_of(path, field), field).config
    first, second = (pipelines.load_model(path, name, dtype, field) for name in ("text_encoder", "text_encoder_2"))
    vae = pipelines.load_model(path, "vae", torch.float32, field)
    return FrozenModels(vae, (first, second), DDPMScheduler.from_config(config))
