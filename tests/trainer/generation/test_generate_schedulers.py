"""The table of samplers: every name that users may write, the class of diffusers behind it, and images that come of
it.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from diffusers.utils import is_torchsde_available
from trainer.generating import image_engine, sample

from luthier_api.exitcodes import ExitCode
from luthier_api.samplers import SAMPLERS, SchedulerName, Sigmas, TimestepSpacing
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.generation.schedulers import CLASSES, make_scheduler, rehearse
from luthier_trainer.runtime.failure import Failure

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAMES = get_args(SchedulerName)
# What Stable Diffusion XL's own repository says of its sampler.
OWN: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


def samples_of(name: SchedulerName, *rows: tuple[str, int, str | None]) -> list[Sample]:
    """`rows`: prompt, seed and negative prompt of each."""
    settings = ImageSettings(width=32, height=32, steps=4, scheduler=name)
    return [
        sample(prompt, seed=seed, row=row, negative=negative, settings=settings)
        for row, (prompt, seed, negative) in enumerate(rows)
    ]


TWO: tuple[tuple[str, int, str | None], ...] = (("a lute on a bench", 7, None), ("two lutes", 2**32 - 1, None))


@pytest.fixture(scope="module")
def engine(sdxl: Path) -> ImageEngine:
    """An engine whose sampler the tests change: loading the model takes longer than drawing."""
    return image_engine(sdxl, {"width": 32, "height": 32, "steps": 4})


def made(name: str, own: Any, steps: int = 10, **image: Any) -> Any:
    """The scheduler for a block `image` of a spec."""
    return make_scheduler(ImageSettings.model_validate({"scheduler": name, "steps": steps, **image}), own)


def test_every_name_has_an_entry() -> None:
    assert {"default", *SAMPLERS} == {"default", *CLASSES} == set(NAMES)


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_are_those_that_the_class_has(name: SchedulerName) -> None:
    known = inspect.signature(getattr(diffusers, CLASSES[name].class_name).__init__).parameters
    assert SAMPLERS[name].sigmas == ("use_karras_sigmas" in known)
    assert not SAMPLERS[name].spacing or "timestep_spacing" in known


@pytest.mark.parametrize("sigmas", [None, *get_args(Sigmas)])
@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.sigmas])
def test_noise_levels_are_spread_as_diffusers_does_it(name: SchedulerName, sigmas: str | None) -> None:
    """Whatever the model's own file says."""
    own = diffusers.EulerDiscreteScheduler.from_config(OWN | {"use_karras_sigmas": True})
    kind = getattr(diffusers, CLASSES[name].class_name)
    given = CLASSES[name].config | ({f"use_{sigmas}_sigmas": True} if sigmas else {})
    expect = kind.from_config(OWN, **given)
    expect.set_timesteps(10)
    found = made(name, own, **({"sigmas": sigmas} if sigmas else {}))
    assert torch.equal(found.sigmas, expect.sigmas)
    rehearse(name, found)


@pytest.mark.parametrize("spacing", get_args(TimestepSpacing))
def test_time_steps_are_those_that_are_asked_for(spacing: str) -> None:
    """Of 1000 in four steps, by the definitions of the paper on common flaws of noise schedules (table 2)."""
    expect = {"leading": [751, 501, 251, 1], "trailing": [999, 749, 499, 249], "linspace": [999, 666, 333, 0]}
    own = diffusers.DDIMScheduler.from_config(OWN)
    assert made("ddim", own, steps=4, timestepSpacing=spacing).timesteps.tolist() == expect[spacing]


@dataclass(frozen=True)
class Case:
    name: SchedulerName
    class_name: str
    config: dict[str, Any]


EXPECTED = [
    Case(
        name="ddim",
        class_name="DDIMScheduler",
        config={"clip_sample": False},
    ),
    Case(
        name="ddpm",
        class_name="DDPMScheduler",
        config={"clip_sample": False},
    ),
    Case(
        name="dpm++2m",
        class_name="DPMSolverMultistepScheduler",
        config={"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    Case(
        name="dpm++2m-sde",
        class_name="DPMSolverMultistepScheduler",
        config={"algorithm_type": "sde-dpmsolver++"},
    ),
    Case(
        name="euler",
        class_name="EulerDiscreteScheduler",
        config={"use_karras_sigmas": False},
    ),
    Case(
        name="euler-ancestral",
        class_name="EulerAncestralDiscreteScheduler",
        config={},
    ),
    Case(
        name="lcm",
        class_name="LCMScheduler",
        config={"clip_sample": False},
    ),
    Case(
        name="pndm",
        class_name="PNDMScheduler",
        config={"skip_prk_steps": True},
    ),
    Case(
        name="unipc",
        class_name="UniPCMultistepScheduler",
        config={"solver_type": "bh2", "predict_x0": True},
    ),
]


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case.name)
def test_a_name_is_a_class_with_the_models_own_betas(case: Case) -> None:
    own = diffusers.DPMSolverMultistepScheduler.from_config(
        OWN | {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    )
    scheduler = made(case.name, own)
    assert type(scheduler).__name__ == case.class_name
    found = dict(scheduler.config)
    assert {k: found[k] for k in OWN} == OWN
    assert {k: found[k] for k in case.config} == case.config


def test_default_is_the_models_own() -> None:
    own = diffusers.DDIMScheduler.from_config(OWN)
    assert made("default", own) is own


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dpm++sde" or is_torchsde_available()])
def test_every_name_draws_the_same_images_twice(engine: ImageEngine, name: SchedulerName) -> None:
    engine.repository_scheduler = diffusers.EulerDiscreteScheduler.from_config(OWN)
    samples = samples_of(name, *TWO)
    first, again = engine.make(samples), engine.make(samples)
    assert [o.error for o in first] == [None, None]
    assert files(first) == files(again)
    # The second row alone: no neighbour, no place in the batch, no shared generator decides.
    assert files(engine.make(samples[1:])) == files(first)[1:]
    assert len(set(files(first))) == 2


def files(outputs: list[Output]) -> list[bytes]:
    return [output.file() for output in outputs if output.file]


# LUTHIER_EXACT=all: with every sampler, about a minute.
EXACT = (
    [n for n in NAMES if n != "dpm++sde" or is_torchsde_available()]
    if os.environ.get("LUTHIER_EXACT") == "all"
    else ["euler-ancestral", "dpm++2m-sde"]
)


@pytest.mark.parametrize("name", EXACT)
def test_images_are_the_same_to_the_bit_however_rows_are_ordered_and_split(
    engine: ImageEngine, name: SchedulerName
) -> None:
    engine.repository_scheduler = diffusers.EulerDiscreteScheduler.from_config(OWN)
    samples = samples_of(name, *((f"lute {row}", 11 * row, "rain" if row % 3 == 1 else None) for row in range(5)))

    def drawn(order: list[Sample], shards: int) -> dict[int, bytes | None]:
        return {
            output.sample.row: output.file and output.file()
            for shard in range(shards)
            for outputs in engine.work([s for s in order if s.row % shards == shard])
            for output in outputs
        }

    whole = drawn(samples, 1)
    assert len(set(whole.values())) == 5
    permuted = [samples[i] for i in (3, 0, 4, 1, 2)]
    for order, shards in ((permuted, 1), (samples, 2), (permuted, 3)):
        assert drawn(order, shards) == whole


@pytest.mark.skipif(is_torchsde_available(), reason="torchsde is installed: dpm++sde draws, as the test above shows")
def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(Failure) as failure:
        made("dpm++sde", diffusers.EulerDiscreteScheduler.from_config(OWN), steps=4)
    assert failure.value.code is ExitCode.MISCONFIGURED
    assert failure.value.message.startswith("spec.image.scheduler: dpm++sde needs a package that this image lacks")
    assert "torchsde" in failure.value.message


def test_the_model_sees_one_shape(engine: ImageEngine) -> None:
    """Kernels are chosen by shape, and other kernels round in other ways: a short batch is filled up, latents are
    decoded one by one.
    """
    seen: set[tuple[int, ...]] = set()
    hooks = [
        engine.pipe.unet.register_forward_pre_hook(lambda _, given: seen.add(given[0].shape)),
        engine.pipe.vae.decoder.register_forward_pre_hook(lambda _, given: seen.add(given[0].shape)),
    ]
    two = samples_of("euler", *TWO)
    for samples in (two, two[:1]):
        engine.make(samples)
    for hook in hooks:
        hook.remove()
    assert seen == {(4, 4, 16, 16), (1, 4, 16, 16)}  # two rows with guidance, and one latent


def test_steps_that_a_sampler_cannot_do() -> None:
    with pytest.raises(Failure) as failure:
        made("lcm", diffusers.EulerDiscreteScheduler.from_config(OWN), steps=100)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith("spec.image.steps: lcm cannot do 100 steps: ")


ZERO_SNR = OWN | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KEEPING = [
    "ddim",
    "ddpm",
    "dpm++2m",
    "dpm++2m-sde",
    "euler",
    "euler-ancestral",
    "lcm",
    "tcd",
    "unipc",
]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dpm++sde" or is_torchsde_available()])
def test_a_sampler_keeps_what_the_model_was_trained_with_or_is_refused(name: SchedulerName) -> None:
    """A zero terminal SNR: the last of the products of alphas, which every class computes anew from its
    configuration.
    """
    own = diffusers.EulerDiscreteScheduler.from_config(ZERO_SNR)
    if name in ("default", *KEEPING):
        scheduler = made(name, own)
        rehearse(name, scheduler)
        assert float(scheduler.alphas_cumprod[-1]) < 1e-6
        assert {k: scheduler.config[k] for k in ZERO_SNR} == ZERO_SNR
        return
    with pytest.raises(Failure) as failure:
        made(name, own)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert (
        failure.value.message
        == f"spec.image.scheduler: the model was trained with rescale_betas_zero_snr: True, which {name} leaves out;"
        f" its images would be others. Choose {' or '.join(KEEPING)}"
    )


def test_a_models_own_sampler_that_leaves_out_what_its_file_says() -> None:
    own = diffusers.HeunDiscreteScheduler.from_config(ZERO_SNR)
    with pytest.raises(Failure, match="trained with rescale_betas_zero_snr: True, which default leaves out"):
        made("default", own)


def test_a_prediction_that_a_sampler_does_not_know() -> None:
    own = diffusers.EulerDiscreteScheduler.from_config(OWN | {"prediction_type": "sample"})
    with pytest.raises(
        Failure,
        match=(
            r"spec\.image\.scheduler: kdpm2 cannot sample from this model: prediction_type not implemented yet: sample"
        ),
    ):
        rehearse("kdpm2", made("kdpm2", own))


@pytest.mark.parametrize(
    ("name", "option"),
    [("ddim", {"sigmas": "karras"}), ("default", {"sigmas": "beta"}), ("lcm", {"timestepSpacing": "trailing"})],
)
def test_an_option_that_a_row_combines_with_another_sampler_is_refused(name: str, option: dict[str, str]) -> None:
    """Of a whole job, the API refuses it."""
    (field,) = option
    with pytest.raises(Failure, match=rf"spec\.image\.{field}: {option[field]} does not apply to the scheduler {name}"):
        made(name, diffusers.EulerDiscreteScheduler.from_config(OWN), **option)
