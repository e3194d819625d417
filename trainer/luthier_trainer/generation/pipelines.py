"""Pipelines of diffusers for a GenerateJob: `prepare` checks configurations and file headers, and `run` loads them.

The files are compared with the spec and with the adapters before a GPU is used, so that a pod with a GPU does not fail
because of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation import lora
from luthier_trainer.generation.families import FAMILIES
from luthier_trainer.generation.prompts import Reader, strict, unread_tokens
from luthier_trainer.generation.schedulers import make_scheduler, rehearse
from luthier_trainer.models import checks, pipelines
from luthier_trainer.models.loranames import Names
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

MODEL, REFINER = "spec.model", "spec.image.refiner"


def check(
    path: Path,
    spec: GenerateJobSpec,
    adapters: Sequence[tuple[Path, str]],
    rows: Iterable[Mapping[str, Any]],
    field: str,
) -> int:
    """Check that the pipeline in `path` supports `spec` and `adapters`, and return its number of parameters.

    `adapters`: file and field of the spec for each. `rows`: the lines of `rows.jsonl`; a notice names the prompts that
    are longer than the text encoders read. Raises Failure if the pipeline does not suit the job.
    """
    index = pipelines.index_of(path, field)
    models = pipelines.skeletons(path, index, field)
    for name, model in models.items():
        pipelines.check_weights(path / name, model, field)
    family = FAMILIES[index["_class_name"]]
    denoiser = models[family.denoiser]
    family.check_model(denoiser, models["vae"], field)
    family.check_settings(denoiser, models["vae"], spec.image)
    if spec.image.strength is not None:
        check_strength("text_encoder_2" in models, spec.image)
    if (index.get("safety_checker") or [None])[0]:
        instead = "image.safety checks them" if spec.image.safety else "none is checked (image.safety)"
        notice(f"{field}: its safety checker is not used, because it replaces images by black ones; {instead}")
    readers = family.prompts.readers_of(pipelines.read_tokenizers(path, index, field), denoiser)
    report_refused(readers, rows, spec.image)
    family.check_scheduler(spec.image, pipelines.read_scheduler(path, index, field))
    family.report(denoiser, rows, spec.image)
    names = Names({name: models[name] for name in family.adapted if name in models})
    for file, of in adapters:
        lora.read(file, names, of)
    return sum(parameter.numel() for model in models.values() for parameter in model.parameters())


LOAD_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionXLPipeline": {"add_watermarker": False},
    "StableDiffusionXLImg2ImgPipeline": {"add_watermarker": False},
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "StableDiffusion3Pipeline": {"image_encoder": None, "feature_extractor": None},
    "FluxPipeline": {"image_encoder": None, "feature_extractor": None},
}
"""Class of a pipeline → what is left out of it: what would change its images."""


def load(path: Path, dtype: torch.dtype, field: str = MODEL, merging: bool = False) -> Any:
    """Load the pipeline in `path` in `dtype`, without code from the repository, watermark and safety checker.

    `merging`: what adapters can change is loaded in fp32. Only safetensors are read. Raises Failure if a part is
    missing or cannot be loaded.
    """
    import diffusers

    index = pipelines.index_of(path, field)
    kind = index["_class_name"]
    in_fp32 = FAMILIES[kind].adapted if merging else ()
    given = {
        name: pipelines.load_model(path, name, torch.float32 if name in in_fp32 else dtype, field)
        for name in pipelines.classes(index, field)
    }
    # diffusers asks to be told what a repository leaves out, such as T5 of Stable Diffusion 3.
    optional = (*pipelines.PARTS[kind].optional, *pipelines.TOKENIZERS)
    given |= {name: None for name in optional if name in index and index[name][0] is None}
    try:
        return getattr(diffusers, kind).from_pretrained(path, **given, **LOAD_OPTIONS[kind], local_files_only=True)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: the pipeline in {path} cannot be loaded: {error}") from None


def check_refiner(path: Path, base: Path, image: ImageSettings) -> int:
    """Check that the refiner in `path` can finish the images of the pipeline in `base`.

    Returns its number of parameters. Raises Failure if it cannot.
    """
    checks.check_pipeline(base, MODEL, checks.XL)
    checks.check_pipeline(path, REFINER, checks.REFINERS)
    index = pipelines.index_of(path, REFINER)
    models = pipelines.skeletons(path, index, REFINER)
    for name, model in models.items():
        pipelines.check_weights(path / name, model, REFINER)
    pipelines.read_tokenizers(path, index, REFINER)
    scheduler = make_scheduler(image, pipelines.read_scheduler(path, index, REFINER))
    rehearse(image.scheduler, scheduler)
    total, start = scheduler.config.num_train_timesteps, image.refiner.start if image.refiner else 1.0
    before = sum(timestep >= round(total - start * total) for timestep in scheduler.timesteps.tolist())
    if not 0 < before < len(scheduler.timesteps):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{REFINER}.start: at {start:g} of {image.steps} steps one of the two models has no step to do; change"
            " start, or set more image.steps",
        )
    return sum(parameter.numel() for model in models.values() for parameter in model.parameters())


def check_strength(is_xl: bool, settings: ImageSettings) -> None:
    """Check that steps are left of those that an image of a row replaces, and the settings of its pipeline.

    Raises Failure if not.
    """
    assert settings.strength is not None, "only called where images are made of others"
    if int(settings.steps * settings.strength) < 1:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.image.strength: of {settings.steps} steps {settings.strength:g} are less than one; raise strength or"
            " image.steps",
        )
    if settings.guidance_rescale and not is_xl:
        raise Failure(
            ExitCode.INVALID_SPEC,
            "spec.image.guidanceRescale: diffusers (0.42) has it for images of images with Stable Diffusion XL alone;"
            " remove it",
        )


def place(pipe: Any, image: ImageSettings, device: str, offload: str) -> None:
    """Put the pipeline on the device, with what `image` says about memory. `offload`: as the plan says."""
    if image.vae_tiling:
        pipe.vae.enable_tiling()
    if image.attention_slicing:
        pipe.enable_attention_slicing()
    OFFLOADS[offload](pipe, device)


OFFLOADS: Mapping[str, Callable[[Any, str], object]] = {
    "none": lambda pipe, device: pipe.to(device),
    "models": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "layers": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
}
"""What waits elsewhere (`image.offload`, and the plan where it is auto) → the function that does it."""


def report_refused(readers: Sequence[Reader], rows: Iterable[Mapping[str, Any]], image: ImageSettings) -> None:
    """Give one notice for prompts, and one for negative prompts, that are refused because they are too long.

    `rows` can be read several times, and is not held.
    """
    used = strict(readers, image)
    if not used:
        return
    remedy = "Shorten them" + (", or set image.longPrompts: chunk" if image.long_prompts == "refuse" else "")
    for key in ("prompt", "negativePrompt") if image.guidance > 1 else ("prompt",):
        texts = long = most = longest = 0
        for row in rows:
            if row.get(key):
                texts += 1
                count = unread_tokens(used, row[key])
                long += count > 0
                if count > most:
                    most, longest = count, row["row"]
        if long:
            notice(
                f"spec.inputs.columns.{key}: {long} of {texts} are longer than the"
                f" {min(reader.room for reader in used)} tokens that the text encoders read, that of row {longest} by"
                f" {most}; their outputs will be errors. {remedy}"
            )
