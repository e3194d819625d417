"""Images against what others say they are: a slice of diffusers' own tests, an exact solution, and an identity."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from trainer.generating import image_engine, sample
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.samples import Sample
from luthier_trainer.generation.schedulers import make_scheduler

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_dummy(folder: Path) -> None:
    """The pipeline of diffusers' tests (`get_dummy_components` of Stable Diffusion XL, 0.42), with bytes as tokens."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(2, 4),
        layers_per_block=2,
        time_cond_proj_dim=256,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[32, 64],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        sample_size=128,
    )
    torch.manual_seed(0)
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        hidden_size=32,
        intermediate_size=37,
        layer_norm_eps=1e-05,
        num_attention_heads=4,
        num_hidden_layers=5,
        pad_token_id=1,
        vocab_size=1000,
        hidden_act="gelu",
        projection_dim=32,
    )
    first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    letters = sorted(ByteLevel.alphabet())
    entries = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *[letter + "</w>" for letter in letters]]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokens = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token="<pad>")
    scheduler = EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)


def drawn(model: Path, one: Sample, **image: Any) -> numpy.ndarray:
    """An image as uint8 [height, width, 3]."""
    given = replace(one, settings=ImageSettings.model_validate(image))
    (output,) = image_engine(model, image, batch_size=1).make([given])
    assert output.file
    return numpy.asarray(Image.open(io.BytesIO(output.file())))


def test_the_slice_of_diffusers_own_test(tmp_path: Path) -> None:
    """`test_stable_diffusion_xl_euler_lcm`: the corner of the image, within the tolerance of that test."""
    with torch.random.fork_rng():
        write_dummy(tmp_path)
    painting = sample("A painting of a squirrel eating a burger", seed=0)
    found = drawn(tmp_path, painting, scheduler="lcm", steps=2, guidance=5.0, width=64, height=64)
    expect = [0.4917, 0.6555, 0.4348, 0.5219, 0.7324, 0.4855, 0.5168, 0.5447, 0.5156]
    assert numpy.abs(found[-3:, -3:, -1].flatten() / 255 - expect).max() < 1e-2


def test_guidance_towards_the_prompt_away_from_itself_is_no_guidance(sdxl: Path) -> None:
    size = {"width": 32, "height": 32, "steps": 2}
    guided = drawn(sdxl, sample("a lute", negative="a lute"), guidance=7.5, **size).astype(int)
    plain = drawn(sdxl, sample("a lute"), guidance=1.0, **size)
    other = drawn(sdxl, sample("a lute", negative="rain"), guidance=7.5, **size)
    assert numpy.abs(guided - plain).max() <= 1
    assert numpy.abs(guided - other).max() > 1


@dataclass(frozen=True)
class Solved:
    name: str
    error: float
    """Of the samples after 20 steps, at most, where data have mean 0.5 and deviation 0.6."""
    image: dict[str, Any]


SOLVED = [
    Solved(name="ddim", error=0.08, image={}),
    Solved(name="euler", error=0.08, image={}),
    Solved(name="euler", error=0.08, image={"sigmas": "karras"}),
    Solved(name="euler", error=0.08, image={"sigmas": "exponential"}),
    Solved(name="euler", error=0.12, image={"sigmas": "beta"}),
    Solved(name="dpm++2m", error=0.06, image={}),
    Solved(name="dpm++2m", error=0.06, image={"sigmas": "karras"}),
    Solved(name="deis", error=0.06, image={}),
    Solved(name="unipc", error=0.06, image={}),
    Solved(name="pndm", error=0.02, image={}),
    Solved(name="heun", error=0.05, image={}),
    Solved(name="lms", error=0.02, image={}),
    Solved(name="kdpm2", error=0.05, image={}),
]
MEAN, DEVIATION = 0.5, 0.6


def error_of(solver: Solved, steps: int) -> float:
    """Root mean square of the difference to the exact solution of the probability flow, for Gaussian data.

    The best prediction of the noise is known then: no model, and no code of a pipeline, takes part.
    """
    own = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    given = {"scheduler": solver.name, "steps": steps, **solver.image}
    scheduler = make_scheduler(ImageSettings.model_validate(given), own)
    known = own.alphas_cumprod.double()

    def alpha(timestep: torch.Tensor) -> torch.Tensor:
        """The share of the signal's variance at a time step, which need not be whole."""
        at = timestep.double().clamp(0, len(known) - 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=len(known) - 1)
        return torch.lerp(known[low].logit(), known[high].logit(), at - low).sigmoid()

    latent = torch.randn(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = latent.view(1, 1, 32, 32) * scheduler.init_noise_sigma
    first = scheduler.timesteps[0]
    begin, share = scheduler.scale_model_input(latent, first), alpha(first)
    exact = MEAN + DEVIATION * (begin - share.sqrt() * MEAN) / (share * DEVIATION**2 + 1 - share).sqrt()
    scheduler = make_scheduler(ImageSettings.model_validate(given), own)  # as new: some count their steps
    for timestep in scheduler.timesteps:
        seen, share = scheduler.scale_model_input(latent, timestep), alpha(timestep)
        noise = (1 - share).sqrt() * (seen - share.sqrt() * MEAN) / (share * DEVIATION**2 + 1 - share)
        latent = scheduler.step(noise, timestep, latent, return_dict=False)[0]
    return float((latent - exact).square().mean().sqrt())


@pytest.mark.parametrize("case", SOLVED, ids=lambda case: " ".join([case.name, *case.image.values()]))
def test_samplers_come_to_the_exact_solution(case: Solved) -> None:
    assert error_of(case, 20) < case.error
    assert error_of(case, 40) < error_of(case, 10) / 2.5
