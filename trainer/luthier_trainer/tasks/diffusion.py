"""A transformers Trainer for the UNet of Stable Diffusion, which learns to predict the noise in latents of images.

The frozen VAE and text encoders run in each step, because `prepare` has no GPU for them, or once before the first one
(`kept_encodings`). Text encoders that learn are one module with the UNet (`ReadingUNet`). For SDXL and an image of
1024 × 1024 pixels the VAE computes 4.9 of a step's 25 TFLOP, in fp32 (FlopCounterMode, activations checkpointed).
The random numbers of a row depend only on the seed, the step and the row. A resumed run, or one with another number of
processes, therefore sees the same noise without saving the state of a generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch.nn.functional import mse_loss
from transformers import EvalPrediction, Trainer

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute
from luthier_trainer.models import pipelines
from luthier_trainer.models.compute import count_operations, of_images
from luthier_trainer.tasks.buckets import Size
from luthier_trainer.tasks.images import PIXELS, ROW
from luthier_trainer.tasks.kept_encodings import (
    DEVIATION,
    ENCODERS,
    HIDDEN,
    MEAN,
    POOLED,
    TIME_IDS,
    KeptEncodings,
    read_batch,
)
from luthier_trainer.tasks.text_to_image import SIZE_NUMBERS, images_of_a_row
from luthier_trainer.workspace.flops import MULTIPLY_ADD

GOLDEN = 0.6180339887498949  # multiples of the golden ratio, modulo 1, cover the unit interval evenly
TOKENS = ("input_ids", "input_ids_2")  # what each of them reads of a batch


def encoders_of(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text encoders among the models of a pipeline: one of Stable Diffusion 1.5 and 2, two of XL."""
    return {name: models[name] for name in ENCODERS if name in models}


def conditions(
    encoders: Sequence[Any], tokens: Sequence[torch.Tensor], time_ids: torch.Tensor | None
) -> dict[str, Any]:
    """Return what the UNet reads beside latent and timestep, by the names of its arguments.

    `tokens`: int64 [rows, 77] for each encoder. `time_ids`: [rows, 6], of XL alone. As in the pipelines, the UNet of XL
    reads the outputs of the second to last layers, side by side, and the pooled one of the second encoder; the UNet of
    1.5 and 2 reads the last output: [rows, 77, width].
    """
    if len(encoders) == 1:
        return conditions_of(encoders[0](tokens[0])[0])
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return conditions_of(hidden, outputs[-1][0], time_ids)


def conditions_of(
    hidden: torch.Tensor, pooled: torch.Tensor | None = None, time_ids: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments of the UNet for what text encoders have made. `pooled`, `time_ids`: of XL alone."""
    if pooled is None:
        return {HIDDEN: hidden}
    return {HIDDEN: hidden, "added_cond_kwargs": {POOLED: pooled, TIME_IDS: time_ids}}


class ReadingUNet(torch.nn.Module):
    """A UNet and the text encoders that learn with it. One forward pass computes all of them, as DDP wants it."""

    config: Mapping[str, Any] = {"model_type": "custom"}  # as PEFT has it for models without one
    _supports_gradient_checkpointing = True

    def __init__(self, unet: Any, encoders: Mapping[str, Any]) -> None:
        """`encoders`: by the names of the components."""
        super().__init__()
        self.unet = unet
        self.names = tuple(encoders)
        for name, encoder in encoders.items():
            self.add_module(name, encoder)

    @property
    def encoders(self) -> list[Any]:
        return [self.get_submodule(name) for name in self.names]

    @property
    def without_adapters(self) -> list[str]:
        """The modules that get no adapter: those that the UNet does not read, and one that kohya's format has not."""
        if len(self.names) == 1:
            return []
        first, second = self.names
        layers = next(
            name for name, module in self.named_modules() if name.startswith(f"{first}.") and name.endswith(".layers")
        )
        return [f"{layers}.{len(self.get_submodule(layers)) - 1}", f"{second}.text_projection"]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        tokens: Sequence[torch.Tensor],
        time_ids: torch.Tensor | None = None,
    ) -> Any:
        """Return the output of the UNet. `sample`: noisy latents; `tokens` and `time_ids`: of `conditions`."""
        return self.unet(sample, timestep, **conditions(self.encoders, tokens, time_ids))

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
        for encoder in self.encoders:
            encoder.activation_checkpointing_enable({"use_reentrant": False})

    def disable_gradient_checkpointing(self) -> None:
        self.unet.disable_gradient_checkpointing()
        for encoder in self.encoders:
            encoder.activation_checkpointing_disable()


def learning_part(models: Mapping[str, Any], spec: FineTuneJobSpec) -> Any:
    """Return the module that gets adapters. `models`: of a pipeline, by their names in it."""
    return ReadingUNet(models["unet"], encoders_of(models)) if spec.image.train_text_encoders else models["unet"]


@dataclass(frozen=True)
class Draw:
    """The random numbers of the rows of a batch."""

    timesteps: torch.Tensor
    """int64 [rows]: the timestep of the noise schedule, from 0 (least noise) to the last one."""
    posterior: torch.Tensor
    """[rows, channels, height, width]: standard normal numbers that sample latents from the posterior of the VAE."""
    noise: torch.Tensor
    """[rows, channels, height, width]: the noise that is added to the latents."""


def draw(keys: Sequence[str], shape: torch.Size, timesteps: int) -> Draw:
    """Return the random numbers of rows, each determined by its key.

    `shape`: of the latents of a row, [channels, height, width]. `timesteps`: number of timesteps of the schedule. Each
    row has its own generator on the CPU, because the generators of GPUs differ between models of GPUs.
    """
    rows = []
    for key in keys:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        timestep = torch.randint(timesteps, (), generator=generator)
        rows.append((timestep, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)))
    return Draw(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def draw_for_training(
    seed: int, step: int, rows: Sequence[int], shape: torch.Size, timesteps: int, priors: bool = False
) -> Draw:
    """Return random numbers that are different in each step. `rows`: numbers of the rows in their split.

    `priors`: whether the images of the class follow, one for each row.
    """
    keys = [f"{seed}:{step}:{row}" for row in rows]
    return draw([*keys, *(f"{key}:prior" for key in keys if priors)], shape, timesteps)


def draw_for_evaluation(seed: int, rows: Sequence[int], shape: torch.Size, timesteps: int) -> Draw:
    """Return random numbers that are the same in each evaluation. `rows`: numbers of the rows in their split.

    The timesteps of consecutive rows are spread evenly, because the loss depends on the timestep more than on anything
    else.
    """
    drawn = draw([f"{seed}:held-out:{row}" for row in rows], shape, timesteps)
    spread = torch.tensor([int((row + 0.5) * GOLDEN % 1 * timesteps) for row in rows])
    return Draw(spread, drawn.posterior, drawn.noise)


@dataclass(frozen=True)
class FrozenModels:
    """The frozen models of a pipeline, and its noise schedule."""

    vae: AutoencoderKL
    """In fp32: the VAE of Stable Diffusion XL overflows in fp16 and loses detail in bf16."""
    text_encoders: Sequence[Any]
    """Empty where they learn."""
    schedule: DDPMScheduler
    """Its `prediction_type` decides what the UNet predicts: epsilon (the noise) or v_prediction (the velocity)."""

    def to(self, device: torch.device) -> None:
        """Freeze the models and move them to `device`."""
        for model in (self.vae, *self.text_encoders):
            model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def likely_latents(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the VAE's posterior, each fp32 [rows, channels, h / 8, w / 8].

        `pixels`: fp32 [rows, 3, h, w] with values from -1 to 1.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def posterior(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the latents of a batch: those that are kept, or of `likely_latents`."""
        if MEAN in inputs:
            return inputs[MEAN], inputs[DEVIATION]
        return self.likely_latents(inputs[PIXELS])

    def release(self) -> None:
        """Free the memory of the weights: all batches have encodings from now on."""
        for model in (self.vae, *self.text_encoders):
            model.to("meta")

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents of the VAE, scaled to a variance of about 1 for the UNet. The shape stays the same."""
        config = self.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            return latents * config.scaling_factor
        mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
        return (latents - mean) * config.scaling_factor / deviation

    def read(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model that learns reads of the captions and sizes of a batch, by the names of its arguments.

        That is what the text encoders make of it (`conditions`), or have made of it (`kept_encodings`), or the tokens
        themselves if they learn, too.
        """
        if HIDDEN in inputs:
            return conditions_of(inputs[HIDDEN], inputs.get(POOLED), inputs.get(TIME_IDS))
        tokens, time_ids = [inputs[name] for name in TOKENS if name in inputs], inputs.get("time_ids")
        if not self.text_encoders:
            return {"tokens": tokens, "time_ids": time_ids}
        with torch.no_grad():
            return conditions(self.text_encoders, tokens, time_ids)

    def target(self, latents: torch.Tensor, drawn: Draw) -> torch.Tensor:
        """Return what the UNet should predict, [rows, channels, height, width]. `latents`: scaled, same shape."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, drawn.noise, drawn.timesteps)
        return drawn.noise

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return how much rows count in the loss by Min-SNR (arXiv:2303.09556), fp32 [rows].

        `timesteps`: int64 [rows]. Where no signal is left (schedules with zero terminal SNR), that of epsilon is 1.
        """
        kept = self.schedule.alphas_cumprod.to(timesteps.device)[timesteps].float()
        ratio = kept / (1 - kept)
        if self.schedule.config.prediction_type == "v_prediction":
            return ratio.clamp(max=gamma) / (ratio + 1)
        return (gamma / ratio).clamp(max=1)


class DiffusionTrainer(Trainer):
    """Trains the adapter of a UNet, or of a `ReadingUNet`.

    Its batches have `pixel_values`, `input_ids` and `labels` (the numbers of the rows), those of XL also `input_ids_2`
    and `time_ids`; or `labels` and what is made of the others (`kept_encodings`). With prior preservation, the images
    of the class follow those to learn, one for each row.
    """

    train_dataset: Any
    eval_dataset: Any
    """Datasets of transformers' Trainer; the latter is None without held-out rows."""

    def __init__(
        self,
        *,
        frozen: FrozenModels,
        min_snr_gamma: float | None = None,
        prior_weight: float = 1.0,
        kept_in: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """`min_snr_gamma`: None: all timesteps count alike. `prior_weight`: of the images of the class. `kept_in`: the
        folder for encodings if they are computed before the training.
        """
        model, args = kwargs["model"], kwargs["args"]
        # transformers would set `use_cache` in the configuration, but those of diffusers cannot be changed.
        model.config = None
        if args.activation_checkpointing:
            # transformers would call a method that only its own models have. diffusers uses the non-reentrant
            # implementation of checkpointing, as `training.arguments` asks for.
            model.get_base_model().enable_gradient_checkpointing()
            args.activation_checkpointing = False
        super().__init__(compute_loss_func=self._loss, **kwargs)
        self.frozen, self.min_snr_gamma, self.prior_weight = frozen, min_snr_gamma, prior_weight
        self._rows = 0
        """Rows of the present batch."""
        self._weights: torch.Tensor | None = None
        """How much the rows of the present batch count, fp32 [rows]; None: all alike."""
        self.kept_in = kept_in
        if kept_in is None:
            self.frozen.to(self.args.device)

    def train(self, *args: Any, **options: Any) -> Any:
        if self.kept_in is not None:
            self._keep_encodings(self.kept_in)
        return super().train(*args, **options)

    def _keep_encodings(self, folder: Path) -> None:
        """Let all rows be encoded, and learn from the encodings. VAE and text encoders leave the device then.

        The model that learns leaves it meanwhile, so that the device holds less than in a step.
        """
        self.model.to("cpu")
        self.frozen.to(self.args.device)
        kept = KeptEncodings(folder, self, self.frozen.text_encoders[0].dtype)
        self.train_dataset = kept.of(self.train_dataset, "train", self._encoded)
        if self.eval_dataset is not None:
            self.eval_dataset = kept.of(self.eval_dataset, "eval", self._encoded)
        self.frozen.release()
        self.data_collator = read_batch
        self.model.to(self.args.device)

    def _encoded(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the encodings of a row of the dataset, each [images of the row, ...]."""
        batch = self._prepare_inputs(self.data_collator([row]))
        mean, deviation = self.frozen.likely_latents(batch[PIXELS])
        read = self.frozen.read(batch)
        return {MEAN: mean, DEVIATION: deviation, HIDDEN: read[HIDDEN], **read.get("added_cond_kwargs", {})}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch; with `return_outputs` also the loss of each row, fp32 [rows]."""
        given, target = self.denoising(inputs, model.training)
        self._weights, self._rows = None, len(inputs[ROW])
        if self.min_snr_gamma is not None and model.training:
            self._weights = self.frozen.min_snr_weights(given["timestep"][: len(inputs[ROW])], self.min_snr_gamma)
        # transformers removes `labels` before it calls the model, and passes them to the loss function.
        loss, outputs = super().compute_loss(model, given | {"labels": target}, True, num_items_in_batch)
        return (loss, {"losses": row_losses(outputs.sample, target)}) if return_outputs else loss

    def _loss(self, outputs: Any, target: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean squared error over the `num_items_in_batch` rows of the step, or over those of the batch.

        As in diffusers' script of DreamBooth, the loss of an image of the class is added with its weight, without
        Min-SNR.
        """
        losses = row_losses(outputs.sample, target)
        priors = losses[self._rows :]
        losses = losses[: self._rows]
        if self._weights is not None:
            losses = losses * self._weights
        if len(priors):
            losses = losses + self.prior_weight * priors
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    def denoising(self, inputs: dict[str, Any], learning: bool) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the arguments of the model for a batch, and what it should predict, [rows, channels, height, width].

        `learning`: True draws random numbers for a training step, False draws them for an evaluation.
        """
        mean, deviation = self.frozen.posterior(inputs)
        rows, shape, timesteps = inputs[ROW].tolist(), mean.shape[1:], self.frozen.schedule.config.num_train_timesteps
        if learning:
            priors = len(mean) > len(rows)
            drawn = draw_for_training(self.args.seed, self.state.global_step, rows, shape, timesteps, priors)
        else:
            drawn = draw_for_evaluation(self.args.seed, rows, shape, timesteps)
        drawn = Draw(*(part.to(mean.device) for part in (drawn.timesteps, drawn.posterior, drawn.noise)))
        latents = self.frozen.scaled(mean + deviation * drawn.posterior)
        given = {
            "sample": self.frozen.schedule.add_noise(latents, drawn.noise, drawn.timesteps),
            "timestep": drawn.timesteps,
            **self.frozen.read(inputs),
        }
        return given, self.frozen.target(latents, drawn)


def macs_of(found: Mapping[str, Any], spec: FineTuneJobSpec, size: Size) -> Compute:
    """Return the multiply-adds of a step for one row: an image of `size`, or with prior preservation two.

    `found`: the models of a pipeline on the meta device, by their names in it. All weights of the part that gets
    adapters learn.
    """
    vae, model = found["vae"], learning_part(found, spec)
    images = images_of_a_row(spec)
    encoders = list(encoders_of(found).values())
    with torch.device("meta"):
        tokens = [torch.empty(images, e.config.max_position_embeddings, dtype=torch.int64) for e in encoders]
        time_ids = torch.empty(images, SIZE_NUMBERS)
    unit = pipelines.pixels_of_a_latent(vae)

    def frozen() -> None:
        vae.encode(torch.empty(images, 3, size.height, size.width, device="meta"))
        if not learns:
            conditions(encoders, tokens, time_ids)

    learns = isinstance(model, ReadingUNet)
    read = {"tokens": tokens, "time_ids": time_ids} if learns else conditions(encoders, tokens, time_ids)
    inputs = {
        "sample": torch.empty(
            images, vae.config.latent_channels, size.height // unit, size.width // unit, device="meta"
        ),
        "timestep": torch.empty(images, device="meta"),
        **read,
    }
    beside = 0 if spec.image.cache_encodings else sum(count_operations(frozen).values()) // MULTIPLY_ADD
    return of_images(model, inputs).model_copy(update={"frozen_models": beside})


def row_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each row, fp32 [rows]. Both tensors: [rows, channels, height, width]."""
    return mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


class RowLosses:
    """Computes evalLoss, the mean of the losses of all held-out rows."""

    def __init__(self) -> None:
        self.loss, self.rows = 0.0, 0

    def reduce(self, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the losses of the rows, [rows], as a double tensor of shape [rows, 1]."""
        return losses.double()[:, None]

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.loss += gathered.predictions.sum().item()
        self.rows += len(gathered.predictions)
        if not compute_result:
            return {}
        mean = self.loss / self.rows
        self.loss, self.rows = 0.0, 0
        return {"loss": mean}


def load_learning(path: Path, spec: FineTuneJobSpec, dtype: torch.dtype, field: str) -> Any:
    """Load the part of the pipeline in `path` that gets adapters, in `dtype`.

    `field`: the field that messages name. Raises Failure if a model cannot be loaded.
    """
    names = pipelines.classes(pipelines.index_of(path, field), field)
    wanted = [name for name in names if name == "unet" or (spec.image.train_text_encoders and name in ENCODERS)]
    return learning_part({name: pipelines.load_model(path, name, dtype, field) for name in wanted}, spec)


def load_frozen(path: Path, spec: FineTuneJobSpec, dtype: torch.dtype, field: str) -> FrozenModels:
    """Load the models of the pipeline in `path` that do not learn: text encoders in `dtype`, and the VAE in fp32.

    `field`: the field that messages name. Raises Failure if a model cannot be loaded.
    """
    index = pipelines.index_of(path, field)
    config = pipelines.read_scheduler(path, index, field).config
    names = (
        [] if spec.image.train_text_encoders else [name for name in pipelines.classes(index, field) if name in ENCODERS]
    )
    encoders = [pipelines.load_model(path, name, dtype, field) for name in names]
    vae = pipelines.load_model(path, "vae", torch.float32, field)
    return FrozenModels(vae, encoders, DDPMScheduler.from_config(config))
