"""The loss of a denoising UNet: what plain diffusers computes, and noise that depends on seed, step and row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import TrainingArguments

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import ResolvedSource
from luthier_trainer.methods.apply import with_method
from luthier_trainer.models import memory
from luthier_trainer.models.memory import Setting
from luthier_trainer.models.pipelines import MODELS
from luthier_trainer.tasks.base import Model
from luthier_trainer.tasks.diffusion import (
    DiffusionTrainer,
    FrozenModels,
    draw,
    draw_for_evaluation,
    draw_for_training,
    learning_part,
)
from luthier_trainer.tasks.kept_encodings import read_batch
from luthier_trainer.tasks.text_to_image import TextToImage, collator
from trainer import measured_memory

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIDE, SEED, STEP = 32, 11, 3
CAPTIONS = ["a lute on a bench", "two lutes, seen from above"]
SIZES = [(40, 64), (96, 32)]
LATENT = torch.Size((4, SIDE // 2, SIDE // 2))


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise of this width and height."""
    width, height = size
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


ROWS = [
    {"pixel_values": picture(size, i), "caption": caption, "labels": i}
    for i, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True))
]


@pytest.fixture
def pipe(sdxl: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)


@pytest.fixture
def make(pipe: StableDiffusionXLPipeline, tmp_path: Path) -> Callable[..., DiffusionTrainer]:
    """A trainer of an adapter with weights of its own on the pipeline's UNet."""

    def make(prediction: str = "epsilon", **options: Any) -> DiffusionTrainer:
        schedule = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
        torch.manual_seed(1)
        model = get_peft_model(pipe.unet, LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        trainer = DiffusionTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), seed=SEED, use_cpu=True, report_to="none"),
            frozen=FrozenModels(pipe.vae, (pipe.text_encoder, pipe.text_encoder_2), schedule),
            data_collator=collator([pipe.tokenizer, pipe.tokenizer_2], SIDE),
            **options,
        )
        trainer.state.global_step = STEP
        return trainer

    return make


def plain_conditions(
    pipe: Any, caption: str, size: tuple[int, int], top_left: tuple[int, int], target: tuple[int, int]
) -> dict[str, Any]:
    """What the pipeline gives the UNet beside latent and timestep. `size`: height and width of the image, `target`: of
    the crop.
    """
    if not hasattr(pipe, "text_encoder_2"):
        hidden, _ = pipe.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": hidden}
    hidden, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
    width = pipe.text_encoder_2.config.projection_dim
    time_ids = pipe._get_add_time_ids(size, top_left, target, hidden.dtype, text_encoder_projection_dim=width)
    return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def plain_losses(
    pipe: Any,
    unet: Any,
    schedule: DDPMScheduler,
    drawn: Any,
    rows: Sequence[dict[str, Any]] = ROWS,
    target: tuple[int, int] = (SIDE, SIDE),
) -> torch.Tensor:
    """What the pipeline's own methods and diffusers' scheduler make of the rows, one by one.

    `target`: height and width in which they are learnt.
    """
    losses = []
    for i, row in enumerate(rows):
        width, height = row["pixel_values"].size
        scale = max(target[0] / height, target[1] / width)
        left, top = (width - target[1] / scale) / 2, (height - target[0] / scale) / 2
        box = (left, top, left + target[1] / scale, top + target[0] / scale)
        crop = row["pixel_values"].resize(target[::-1], Image.Resampling.LANCZOS, box=box)
        pixels = pipe.image_processor.preprocess(crop)
        posterior = pipe.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * drawn.posterior[i : i + 1]) * pipe.vae.config.scaling_factor
        top_left = (round(top * scale), round(left * scale))
        given = plain_conditions(pipe, row["caption"], (height, width), top_left, target)
        noise, timestep = drawn.noise[i : i + 1], drawn.timesteps[i : i + 1]
        predicted = unet(schedule.add_noise(latents, noise, timestep), timestep, **given).sample
        velocity = schedule.config.prediction_type == "v_prediction"
        wanted = schedule.get_velocity(latents, noise, timestep) if velocity else noise
        losses.append(((predicted - wanted) ** 2).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("learning", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_that_of_plain_diffusers(
    make: Callable[..., DiffusionTrainer], pipe: StableDiffusionXLPipeline, prediction: str, learning: bool
) -> None:
    trainer = make(prediction)
    trainer.model.train(learning)
    batch = trainer.data_collator(ROWS)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=4)
        drawn = (
            draw_for_training(SEED, STEP, [0, 1], LATENT, 1000)
            if learning
            else draw_for_evaluation(SEED, [0, 1], LATENT, 1000)
        )
        expect = plain_losses(pipe, trainer.model, trainer.frozen.schedule, drawn)
    torch.testing.assert_close(outputs["losses"], expect, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, expect.sum() / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bucket", [(24, 40), (40, 24)], ids=str)
def test_images_of_a_bucket_are_those_of_plain_diffusers(
    make: Callable[..., DiffusionTrainer], pipe: StableDiffusionXLPipeline, bucket: tuple[int, int]
) -> None:
    """Two images of other sizes, and a repetition of the last one, which fills up the batch and counts as nothing."""
    trainer = make()
    trainer.model.train()
    rows = [row | {"bucket": [*bucket]} for row in ROWS]
    batch = trainer.data_collator([*rows, rows[-1]])
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == 2
    drawn = draw_for_training(SEED, STEP, [0, 1], torch.Size((4, bucket[0] // 2, bucket[1] // 2)), 1000)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
        expect = plain_losses(pipe, trainer.model, trainer.frozen.schedule, drawn, target=bucket)
    torch.testing.assert_close(loss, expect.sum() / 4, rtol=5e-4, atol=1e-6)  # pixels differ by one, rounded
    heights_and_widths = [[64, 40], [32, 96]]
    assert batch["time_ids"][:, :2].tolist() == heights_and_widths
    assert batch["time_ids"][:, 4:].tolist() == [[*bucket], [*bucket]]


OF_CLASS = [
    {"pixel_values": picture((48, 48), 7), "caption": "an instrument"},
    {"pixel_values": picture((32, 80), 8), "caption": "a picture of an instrument"},
]
PAIRS = [
    row | {f"prior_{name}": value for name, value in other.items()} for row, other in zip(ROWS, OF_CLASS, strict=True)
]


@pytest.mark.parametrize("gamma", [None, 0.1])
def test_prior_preservation_is_that_of_dreambooth(
    make: Callable[..., DiffusionTrainer], pipe: StableDiffusionXLPipeline, gamma: float | None
) -> None:
    """By diffusers' train_dreambooth_lora_sdxl.py: `loss + args.prior_loss_weight * prior_loss`, means over a batch."""
    trainer = make(prior_weight=0.5, min_snr_gamma=gamma)
    trainer.model.train()
    drawn = draw_for_training(SEED, STEP, [0, 1], LATENT, 1000, priors=True)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(PAIRS))
        losses = plain_losses(pipe, trainer.model, trainer.frozen.schedule, drawn, [*ROWS, *OF_CLASS])
    weights = torch.ones(2)
    if gamma is not None:
        weights = (gamma / compute_snr(trainer.frozen.schedule, drawn.timesteps[:2])).clamp(max=1)
    expect = (weights * losses[:2]).mean() + 0.5 * losses[2:].mean()
    torch.testing.assert_close(loss, expect, rtol=1e-4, atol=1e-6)
    assert len({*drawn.timesteps.tolist()}) == 4


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["images", "pairs"])
def test_encodings_are_those_of_the_pipeline(
    make: Callable[..., DiffusionTrainer], pipe: StableDiffusionXLPipeline, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """What is kept of a row, and batches of it: posterior of the VAE, outputs of the text encoders, size and crop."""
    trainer = make()
    expect = trainer.data_collator(rows)
    with torch.no_grad():
        posterior = pipe.vae.encode(expect["pixel_values"]).latent_dist
        captions = [row[name] for name in ("caption", "prior_caption") if name in rows[0] for row in rows]
        hidden, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        tensors = {f"{row['labels']}.{name}": t for row in rows for name, t in trainer._encoded(row).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "kept.safetensors")
    kept = [{"labels": row["labels"], "encodings": str(tmp_path / "kept.safetensors")} for row in rows]
    found = read_batch([*kept, kept[-1]])
    wanted = {"latents_mean": posterior.mean, "latents_deviation": posterior.std, "encoder_hidden_states": hidden}
    wanted |= {"text_embeds": pooled, "time_ids": expect["time_ids"], "labels": expect["labels"]}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


TARGETS = ["to_q", "to_v", "q_proj", "v_proj"]


def spec_of(text_encoders: bool, **method: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "task": "text-to-image",
            "model": {"id": "a/b"},
            "dataset": {"id": "a/c"},
            "image": {"resolution": SIDE, "trainTextEncoders": text_encoders},
            "method": {"type": "lora", "rank": 4, "targetModules": TARGETS, **method},
            "resources": {"gpusPerNode": 0},
        }
    )


def of_pipeline(pipe: Any, spec: FineTuneJobSpec, folder: Path) -> DiffusionTrainer:
    """A trainer of what learns of a pipeline, with adapters that change what it computes. They are in `pipe`, too."""
    models = {name: getattr(pipe, name) for name in MODELS if hasattr(pipe, name)}
    learning = learning_part(models, spec)
    torch.manual_seed(1)
    model = with_method(learning, spec.method, None, [], deepspeed=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    encoders = [models[name] for name in MODELS[2:] if name in models]
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    frozen = FrozenModels(pipe.vae, [] if spec.image.train_text_encoders else encoders, schedule)
    tokenizers = [getattr(pipe, name) for name in ("tokenizer", "tokenizer_2") if hasattr(pipe, name)]
    args = TrainingArguments(str(folder), seed=SEED, use_cpu=True, report_to="none")
    trainer = DiffusionTrainer(model=model, args=args, frozen=frozen, data_collator=collator(tokenizers, SIDE))
    trainer.state.global_step = STEP
    return trainer


@pytest.mark.parametrize(("kind", "text_encoders"), [("sdxl", True), ("sd", True), ("sd", False)])
def test_text_encoders_learn_beside_the_unet(
    kind: str, text_encoders: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The loss is that of the whole pipeline with these adapters, and each weight of them gets a gradient."""
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(kind))
    targets = TARGETS if text_encoders else TARGETS[:2]
    trainer = of_pipeline(pipe, spec_of(text_encoders, targetModules=targets), tmp_path)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS), num_items_in_batch=2)
    drawn = draw_for_training(SEED, STEP, [0, 1], LATENT, 1000)
    with torch.no_grad():
        expect = plain_losses(pipe, pipe.unet, trainer.frozen.schedule, drawn)
    torch.testing.assert_close(loss, expect.mean(), rtol=1e-4, atol=1e-6)

    loss.backward()
    learning = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(weight.grad is not None and weight.grad.any() for weight in learning.values())
    assert any(".text_encoder." in name for name in learning) == text_encoders
    gradients = {name: weight.grad.clone() for name, weight in learning.items()}
    trainer.model.zero_grad()
    trainer.model.get_base_model().enable_gradient_checkpointing()
    trainer.compute_loss(trainer.model, trainer.data_collator(ROWS), num_items_in_batch=2).backward()
    for name, weight in learning.items():
        torch.testing.assert_close(weight.grad, gradients[name], msg=name)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_is_that_of_diffusers(make: Callable[..., DiffusionTrainer], prediction: str) -> None:
    """By the lines of diffusers' training scripts, over all timesteps."""
    frozen, every = make(prediction).frozen, torch.arange(1000)
    snr = compute_snr(frozen.schedule, every)
    least = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
    expect = least / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(frozen.min_snr_weights(every, 5.0), expect)


@pytest.mark.parametrize("learning", [True, False], ids=["training", "evaluation"])
def test_min_snr_weighs_what_is_learnt_alone(make: Callable[..., DiffusionTrainer], learning: bool) -> None:
    trainer = make(min_snr_gamma=0.1)
    trainer.model.train(learning)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS), True, num_items_in_batch=4)
    weights = torch.ones(2)
    if learning:
        drawn = draw_for_training(SEED, STEP, [0, 1], LATENT, 1000)
        weights = (0.1 / compute_snr(trainer.frozen.schedule, drawn.timesteps)).clamp(max=1)
        assert weights.min() < 1
    torch.testing.assert_close(loss, (weights * outputs["losses"]).sum() / 4, rtol=1e-4, atol=1e-6)


def test_without_signal_a_row_counts_as_it_is(make: Callable[..., DiffusionTrainer]) -> None:
    frozen = make().frozen
    frozen.schedule.alphas_cumprod[-1] = 0.0
    assert frozen.min_snr_weights(torch.tensor([999]), 5.0).item() == 1.0


def test_noise_of_a_row_depends_on_nothing_beside_it() -> None:
    together, alone = draw(["a", "b", "c"], LATENT, 1000), draw(["b"], LATENT, 1000)
    for part in ("timesteps", "posterior", "noise"):
        assert torch.equal(getattr(together, part)[1:2], getattr(alone, part))


def test_noise_is_drawn_anew_for_each_row_step_and_seed() -> None:
    drawn = [
        draw_for_training(seed, step, [row], LATENT, 1000).noise for seed in (1, 2) for step in (0, 1) for row in (0, 1)
    ]
    drawn.append(draw_for_evaluation(1, [0], LATENT, 1000).noise)
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(drawn)


def test_held_out_rows_cover_the_timesteps_evenly() -> None:
    timesteps = draw_for_evaluation(0, range(100), torch.Size((1, 1, 1)), 1000).timesteps
    assert torch.histc(timesteps.float(), bins=10, min=0, max=1000).tolist() == pytest.approx([10] * 10, abs=1)


def test_latents_with_statistics_of_their_own() -> None:
    """What the pipeline undoes before it decodes."""
    mean, deviation = [0.1, -0.2, 0.3, 0.4], [1.5, 2.0, 0.5, 0.8]
    config = SimpleNamespace(latents_mean=mean, latents_std=deviation, scaling_factor=0.5)
    frozen = FrozenModels(SimpleNamespace(config=config), (None, None), None)  # type: ignore[arg-type]
    latents = torch.arange(4.0).view(1, 4, 1, 1)
    found = frozen.scaled(latents).flatten().tolist()
    assert found == pytest.approx([(i - m) / d * 0.5 for i, (m, d) in enumerate(zip(mean, deviation, strict=True))])


@pytest.mark.parametrize("text_encoders", [False, True], ids=["UNet", "text encoders"])
def test_a_step_holds_what_is_planned(text_encoders: bool, pipe: Any, sdxl: Path, tmp_path: Path) -> None:
    """What autograd keeps, counted by its hooks. On a CPU, oneDNN allocates for convolutions what GPUs do not."""
    spec = spec_of(text_encoders, targetModules=TARGETS if text_encoders else TARGETS[:2])
    trainer = of_pipeline(pipe, spec, tmp_path)
    pixels = [ROWS[0] | {"labels": i} for i in range(5)]
    kept, peak = measured_memory.of_step(
        lambda: trainer.compute_loss(trainer.model, trainer.data_collator(pixels)), trainer.model
    )
    task = TextToImage()
    model = Model(ResolvedSource(source="a/b"), sdxl, None, None)
    trial = task.trial(model, spec, None, None)
    assert not isinstance(trial, str)
    with torch.device("meta"):
        adapted = with_method(trial.model, spec.method, None, trial.heads, deepspeed=False)
    step = memory.step_of(adapted, trial, Setting("cpu", None))
    assert -0.02 <= (step.kept_fixed + 5 * step.kept_per_row) / kept - 1 <= 0.05
    highest = max(moment.fixed + 5 * moment.per_row + moment.gradients for moment in step.moments)
    assert -0.02 <= highest / peak - 1 <= 0.1


def test_encodings_leave_the_device(sdxl: Path) -> None:
    """The plan of a step has neither VAE nor text encoders, and no operations of theirs."""
    spec = spec_of(False, targetModules=TARGETS[:2])
    cached = spec.model_copy(update={"image": spec.image.model_copy(update={"cache_encodings": True})})
    task, model = TextToImage(), Model(ResolvedSource(source="a/b"), sdxl, None, None)
    facts, macs = [], []
    for asked in (spec, cached):
        trial = task.trial(model, asked, None, None)
        assert not isinstance(trial, str)
        with torch.device("meta"):
            adapted = with_method(trial.model, asked.method, None, trial.heads, deepspeed=False)
        step = memory.step_of(adapted, trial, Setting("cpu", None))
        facts.append((len(trial.beside), step.kept_per_row, max(m.fixed + 5 * m.per_row for m in step.moments)))
        compute = task.compute(model, asked, None, None)
        assert compute is not None
        macs.append(compute.frozen_models)
    assert (facts[0][0], facts[1][0]) == (3, 0)
    assert facts[1][1] <= facts[0][1]
    assert facts[1][2] <= facts[0][2]
    assert macs[0] > 0 == macs[1]
