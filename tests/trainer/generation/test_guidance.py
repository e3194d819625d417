"""Guidance in some of the steps: the images of diffusers' own pipelines, whose scale of guidance is 1 in the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from trainer.generating import image_engine, sample

from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.guidance import check_interval, guided_within
from luthier_trainer.runtime.failure import Failure

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPT, NEGATIVE, GUIDANCE = "a lute on a bench", "rain", 7.0
SMALL = {"width": 32, "height": 32, "steps": 5, "guidance": GUIDANCE}
PARTS: list[tuple[dict[str, float], list[bool]]] = [
    ({"guidanceEnd": 0.5}, [True, True, True, False, False]),
    ({"guidanceStart": 0.4}, [False, False, True, True, True]),
    ({"guidanceStart": 0.2, "guidanceEnd": 0.8}, [False, True, True, True, False]),
]
"""Settings, and in which of 5 steps there is guidance."""


def guided_by_hand(kind: type, guided: list[bool]) -> type:
    """`kind`, a pipeline of diffusers, whose scale of guidance is 1 in some steps: nothing but the prompt counts."""

    class Pipeline(kind):
        step = 0

        @property
        def guidance_scale(self) -> float:
            return GUIDANCE if guided[self.step] else 1.0

    return Pipeline


def drawn(pipe: Any, **more: Any) -> torch.Tensor:
    """The latents that a pipeline of `guided_by_hand` draws."""
    pipe.set_progress_bar_config(disable=True)

    def next_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.step = min(step + 1, 4)
        return tensors

    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE, "output_type": "latent"}
    generator = torch.Generator().manual_seed(7)
    return pipe(**given, **more, generator=generator, callback_on_step_end=next_step).images


@pytest.mark.parametrize(("settings", "guided"), PARTS)
@pytest.mark.parametrize(("model", "kind"), [("sdxl", StableDiffusionXLPipeline), ("sd", StableDiffusionPipeline)])
def test_images_of_text(
    model: str, kind: type, settings: dict[str, float], guided: list[bool], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    engine = image_engine(folder, SMALL | settings, batch_size=1)
    given = ImageSettings.model_validate(SMALL | settings)
    with torch.inference_mode():
        more = {"num_inference_steps": 5, "guidance_scale": GUIDANCE, "output_type": "latent"}
        generator = [torch.Generator().manual_seed(7)]
        rows = [sample(PROMPT, negative=NEGATIVE, settings=given)]
        ours = engine.denoised(rows, more | {"generator": generator})
        theirs = drawn(guided_by_hand(kind, guided).from_pipe(engine.pipe), num_inference_steps=5, width=32, height=32)
    assert torch.allclose(ours, theirs, atol=1e-4)
    whole = drawn(guided_by_hand(kind, [True] * 5).from_pipe(engine.pipe), num_inference_steps=5, width=32, height=32)
    assert (ours - whole).abs().max() > 1e-3


@torch.inference_mode()
def test_images_of_images(sd: Path) -> None:
    """The interval is of the steps that are done: 5 of 10."""
    settings, guided = PARTS[0]
    image = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    more = {"image": image, "strength": 0.5, "num_inference_steps": 10}
    plain = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    theirs = drawn(guided_by_hand(StableDiffusionImg2ImgPipeline, guided).from_pipe(plain), **more)
    pipe = guided_by_hand(StableDiffusionImg2ImgPipeline, [True] * 5).from_pipe(plain)
    with guided_within(pipe, ImageSettings.model_validate(SMALL | settings)):
        ours = drawn(pipe, **more)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (ours - drawn(pipe, **more)).abs().max() > 1e-3, "the hooks outlast their call"


@pytest.mark.parametrize(
    ("settings", "distilled", "problem"),
    [
        ({"guidanceEnd": 0.5}, None, None),
        ({"guidanceStart": 0.5, "guidanceEnd": 0.55, "steps": 3}, None, "none of 3 steps begins between 0.5 and 0.55"),
        ({"guidanceEnd": 0.5}, 8, "reads the guidance as an input"),
        ({}, 8, None),
    ],
)
def test_what_is_refused(settings: dict[str, Any], distilled: int | None, problem: str | None, sdxl: Path) -> None:
    config = UNet2DConditionModel.load_config(sdxl / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config, time_cond_proj_dim=distilled)
    given = ImageSettings.model_validate(settings)
    if problem is None:
        check_interval(unet, given)
        return
    with pytest.raises(Failure, match=problem):
        check_interval(unet, given)
