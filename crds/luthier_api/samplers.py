"""The samplers of text-to-image, one row each: what the CRD, its CEL rules and the files of images are drawn from.

How each is made of a class of diffusers stands in the trainer (`generation/schedulers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

SchedulerName = Literal[
    "default",
    "ddim",
    "ddpm",
    "deis",
    "dpm++2m",
    "dpm++2m-sde",
    "dpm++sde",
    "euler",
    "euler-ancestral",
    "heun",
    "kdpm2",
    "kdpm2-ancestral",
    "lcm",
    "lms",
    "pndm",
    "tcd",
    "unipc",
]
Sigmas = Literal["karras", "exponential", "beta"]
"""How the noise levels of the steps are spread, besides evenly in the time of the training."""
TimestepSpacing = Literal["leading", "linspace", "trailing"]
"""Which time steps of the training the steps are, as diffusers calls them."""


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler, besides `default`, which is the one of the model's repository."""

    title: str
    """As the web UIs for Stable Diffusion call it, and as files of images name it."""
    sigmas: bool = False
    """Whether its noise levels can be spread in other ways (`image.sigmas`)."""
    spacing: bool = True
    """Whether its time steps can be chosen in other ways (`image.timestepSpacing`)."""


SAMPLERS: Mapping[SchedulerName, SamplerInfo] = {
    "ddim": SamplerInfo("DDIM"),
    "ddpm": SamplerInfo("DDPM"),
    "deis": SamplerInfo("DEIS", sigmas=True),
    "dpm++2m": SamplerInfo("DPM++ 2M", sigmas=True),
    "dpm++2m-sde": SamplerInfo("DPM++ 2M SDE", sigmas=True),
    "dpm++sde": SamplerInfo("DPM++ SDE", sigmas=True),
    "euler": SamplerInfo("Euler", sigmas=True),
    "euler-ancestral": SamplerInfo("Euler a"),
    "heun": SamplerInfo("Heun", sigmas=True),
    "kdpm2": SamplerInfo("DPM2", sigmas=True),
    "kdpm2-ancestral": SamplerInfo("DPM2 a", sigmas=True),
    # The time steps of these two come from their distillation.
    "lcm": SamplerInfo("LCM", spacing=False),
    "lms": SamplerInfo("LMS", sigmas=True),
    "pndm": SamplerInfo("PLMS"),
    "tcd": SamplerInfo("TCD", spacing=False),
    "unipc": SamplerInfo("UniPC", sigmas=True),
}


def samplers(suits: Callable[[SamplerInfo], bool]) -> tuple[SchedulerName, ...]:
    """Names of the samplers that `suits`."""
    return tuple(name for name, sampler in SAMPLERS.items() if suits(sampler))
