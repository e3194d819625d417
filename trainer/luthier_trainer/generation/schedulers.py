"""How each sampler of text-to-image (`luthier_api.samplers`) is made of a class of diffusers.

A sampler is constructed from the configuration of the model's own scheduler, because betas, prediction type and spacing
belong to the weights, with the changes that the name implies. If the container image lacks a package that a sampler
needs, the job fails with a message instead of a stack trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.samplers import SAMPLERS, SchedulerName, Sigmas
from luthier_api.task_settings import ImageSettings
from luthier_trainer.runtime.failure import Failure


@dataclass(frozen=True)
class Sampler:
    """How to construct a scheduler of diffusers for a name."""

    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    """Entries that replace those of the model's own configuration."""
    eta: float = 0.0
    """Share of noise that is added again in each step, for the classes to which the pipeline passes it (DDIM, TCD)."""


# Latents are not limited to [-1, 1], so the clipping that these classes do by default would damage them.
UNCLIPPED = {"clip_sample": False, "thresholding": False}
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
SIGMAS: dict[Sigmas, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
"""Entry of the configuration that spreads the noise levels in a way."""

MODEL = "spec.model"
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
FLOW_SAMPLERS: Sequence[SchedulerName] = ("default", "euler")
"""Samplers for models that learned a flow: Euler's, with the noise levels of the repository or others."""

# Settings that a model's weights depend on and for which some classes of diffusers 0.42.1 have no parameter, with their
# default values.
TRAINED_WITH: dict[str, Any] = {
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": None,
    "trained_betas": None,
    "beta_schedule": "linear",
}

CLASSES: Mapping[SchedulerName, Sampler] = {
    "ddim": Sampler("DDIMScheduler", UNCLIPPED),
    "ddpm": Sampler("DDPMScheduler", UNCLIPPED),
    "deis": Sampler("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2}),
    "dpm++2m": Sampler("DPMSolverMultistepScheduler", DPM),
    "dpm++2m-sde": Sampler("DPMSolverMultistepScheduler", DPM | {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++sde": Sampler("DPMSolverSDEScheduler"),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler-ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler", {"clip_sample": False}),
    "kdpm2": Sampler("KDPM2DiscreteScheduler"),
    "kdpm2-ancestral": Sampler("KDPM2AncestralDiscreteScheduler"),
    "lcm": Sampler("LCMScheduler", UNCLIPPED),
    "lms": Sampler("LMSDiscreteScheduler"),
    # PNDM's Runge-Kutta start needs 12 more calls of the model, and all models of Stable Diffusion disable it.
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "tcd": Sampler("TCDScheduler", UNCLIPPED, eta=0.3),  # gamma of the paper, as in diffusers' own documentation
    "unipc": Sampler("UniPCMultistepScheduler", {"solver_type": "bh2", "solver_order": 2, "predict_x0": True}),
}


def eta(name: SchedulerName) -> float:
    """Return the `eta` that the pipeline gets for a sampler."""
    return CLASSES[name].eta if name in CLASSES else 0.0


def make_scheduler(image: ImageSettings, own: Any) -> Any:
    """Return the scheduler for `image`, made from `own`, the scheduler of the model.

    Raises Failure if the container image lacks a package that the scheduler needs, if the scheduler would ignore a
    setting that the model was trained with, if it does not know an option, or if it cannot do the steps.
    """
    import diffusers

    name, steps = image.scheduler, image.steps
    refuse_unknown_options(image)
    kind = type(own) if name == "default" else getattr(diffusers, CLASSES[name].class_name)
    if lost := ignored(kind, own.config):
        keeping = [
            other
            for other, sampler in CLASSES.items()
            if not ignored(getattr(diffusers, sampler.class_name), own.config)
        ]
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.image.scheduler: the model was trained with {' and '.join(lost)}, which {name} leaves out; its"
            f" images would be others. Choose {' or '.join(keeping)}",
        )
    try:
        scheduler = own if name == "default" else kind.from_config(own.config, **changes(image))
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise Failure(
            ExitCode.MISCONFIGURED,
            f"spec.image.scheduler: {name} needs a package that this image lacks ({reason}); choose another"
            " scheduler, for example dpm++2m-sde, or build the trainer image with it",
        ) from None
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, AssertionError, IndexError) as error:
        raise Failure(ExitCode.INVALID_SPEC, f"spec.image.steps: {name} cannot do {steps} steps: {error}") from None
    return scheduler


def make_flow_scheduler(image: ImageSettings, own: Any) -> Any:
    """Return the scheduler for a model that learned a flow. `own`: the one of the model's repository.

    Its steps are set by the pipeline, because they depend on the size of the image. Raises Failure if the sampler
    cannot follow a flow, or if it would draw noise that no seed decides.
    """
    refuse_unknown_options(image)
    kind = type(own).__name__
    if kind != FLOW_CLASS or own.config.stochastic_sampling:
        found = f"{kind} with stochastic_sampling" if kind == FLOW_CLASS else kind
        raise Failure(
            ExitCode.INVALID_SPEC, f"{MODEL}: its scheduler is {found}; of flows only a plain {FLOW_CLASS} is supported"
        )
    if image.scheduler not in FLOW_SAMPLERS:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.image.scheduler: {image.scheduler} cannot sample from this model, which learned a flow; choose"
            f" {' or '.join(FLOW_SAMPLERS)}",
        )
    if image.timestep_spacing:
        raise Failure(
            ExitCode.INVALID_SPEC,
            "spec.image.timestepSpacing: the steps of a flow follow from the size of the image; remove it",
        )
    if image.scheduler == "default":
        return own
    return type(own).from_config(own.config, **{entry: way == image.sigmas for way, entry in SIGMAS.items()})


def refuse_unknown_options(image: ImageSettings) -> None:
    """Raise Failure if the sampler would ignore an option. Of a job the API refuses it, but a row may override one."""
    info = SAMPLERS.get(image.scheduler)
    for option, value, known in (
        ("sigmas", image.sigmas, info is not None and info.sigmas),
        ("timestepSpacing", image.timestep_spacing, info is not None and info.spacing),
    ):
        if value and not known:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.image.{option}: {value} does not apply to the scheduler {image.scheduler}; remove it, or choose"
                " another scheduler",
            )


def changes(image: ImageSettings) -> dict[str, Any]:
    """Return the entries that replace those of the model's own configuration, for a sampler that is chosen by name."""
    given: dict[str, Any] = dict(CLASSES[image.scheduler].config)
    if SAMPLERS[image.scheduler].sigmas:
        # Of several ways to spread the noise levels a class takes none, so that those of the model's file are reset.
        given |= {entry: way == image.sigmas for way, entry in SIGMAS.items()}
    if image.timestep_spacing:
        given["timestep_spacing"] = image.timestep_spacing
    return given


def ignored(kind: Any, config: Mapping[str, Any]) -> list[str]:
    """Return the settings that a model was trained with and for which the class `kind` has no parameter.

    `config`: the configuration of the model's scheduler. `from_config` ignores such settings silently.
    """
    known = inspect.signature(kind.__init__).parameters
    if "num_train_timesteps" not in known:  # a placeholder of diffusers for a class whose package is missing
        return []
    return [
        f"{name}: {config[name]}"
        for name, plain in TRAINED_WITH.items()
        if name not in known and config.get(name, plain) not in (plain, None)
    ]


def rehearse(name: SchedulerName, scheduler: Any) -> None:
    """Run all steps on one small latent of noise.

    Raises Failure if the class does not support the model's configuration, or produces values that are not finite.
    """
    import torch

    noise = torch.Generator().manual_seed(0)
    more = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = [0]
    latent = torch.randn(1, 4, 2, 2, generator=noise) * scheduler.init_noise_sigma
    try:
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(latent, timestep)
            latent = scheduler.step(
                torch.randn(1, 4, 2, 2, generator=noise), timestep, latent, return_dict=False, **more
            )[0]
    except (NotImplementedError, ValueError, IndexError) as error:
        problem = str(error)
    else:
        problem = "" if torch.isfinite(latent).all() else "its latents are not finite"
    if problem:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.image.scheduler: {name} cannot sample from this model: {problem}. Choose another scheduler",
        )
