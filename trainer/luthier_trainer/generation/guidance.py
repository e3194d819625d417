"""Guidance in some of the steps (`image.guidanceStart`, `image.guidanceEnd`), in pipelines of Stable Diffusion.

With guidance, a pipeline gives its model each latent twice: with the negative prompt, and with the prompt. In a step
without guidance the model gets the second half alone, and the pipeline gets its prediction for both, between which
there is no difference to enlarge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_api.task_settings import ImageSettings
from luthier_trainer.models.pipelines import denoiser_of
from luthier_trainer.runtime.failure import Failure


@contextmanager
def guided_within(pipe: Any, settings: ImageSettings) -> Iterator[None]:
    """Within this context, one call of `pipe` has guidance in the steps that the settings say."""
    if not is_partly_guided(settings):
        yield
        return
    steps, denoiser = Steps(pipe, settings), denoiser_of(pipe)
    hooks = [
        denoiser.register_forward_pre_hook(steps.before, with_kwargs=True),
        denoiser.register_forward_hook(steps.after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_partly_guided(settings: ImageSettings) -> bool:
    """Return whether some steps have guidance, and some have none."""
    return settings.guidance > 1 and (settings.guidance_start > 0 or settings.guidance_end < 1)


def check_interval(denoiser: Any, settings: ImageSettings) -> None:
    """Check that a step lies within the interval, and that the model knows steps without guidance.

    Raises Failure if not.
    """
    if not is_partly_guided(settings):
        return
    if getattr(denoiser.config, "time_cond_proj_dim", None) is not None or hasattr(denoiser.config, "guidance_embeds"):
        raise Failure(
            ExitCode.INVALID_SPEC,
            "spec.image.guidanceStart, guidanceEnd: this model reads the guidance as an input, the same in all steps;"
            " remove them",
        )
    steps = int(settings.steps * (settings.strength or 1))
    if not any(is_within(step, steps, settings) for step in range(steps)):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.image.guidanceStart: none of {steps} steps begins between {settings.guidance_start:g} and"
            f" {settings.guidance_end:g} of them; change guidanceStart or guidanceEnd, or set guidance: 1",
        )


def is_within(step: int, steps: int, settings: ImageSettings) -> bool:
    """Return whether a step, counted from 0, has guidance."""
    return settings.guidance_start <= step / steps < settings.guidance_end


class Steps:
    """The steps of one call of a pipeline, which calls its model once in each."""

    def __init__(self, pipe: Any, settings: ImageSettings) -> None:
        self.pipe, self.settings, self.done = pipe, settings, 0

    @property
    def is_guided(self) -> bool:
        """Whether the step that comes next, or is being done, has guidance."""
        return is_within(self.done, self.pipe.num_timesteps, self.settings)

    def before(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Return the model's arguments for the half with the prompt, in a step without guidance."""
        if self.is_guided:
            return None
        rows = len(args[0] if args else kwargs["hidden_states"])  # a UNet's latents, a transformer's
        return tuple(second_half(value, rows) for value in args), second_half(kwargs, rows)

    def after(self, denoiser: Any, args: Any, output: Any) -> Any:
        """Return the prediction for both halves."""
        guided, self.done = self.is_guided, self.done + 1
        return output if guided else tuple(torch.cat([made, made]) for made in output)


def second_half(value: Any, rows: int) -> Any:
    """Return the second half of each tensor with `rows` rows in `value`."""
    if isinstance(value, dict):
        return {name: second_half(inner, rows) for name, inner in value.items()}
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows
    return value[rows // 2 :] if has_rows else value
