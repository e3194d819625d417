"""Stable Diffusion XL for a GenerateJob: checked by `prepare` from its configurations and headers, loaded by `run`.

What the files have is compared with what the spec asks for and with what the adapters change, so that nothing of it is
left for a pod with a GPU to find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_trainer.generation import lora
from luthier_trainer.generation.loranames import Names
from luthier_trainer.generation.schedulers import make_scheduler, rehearse
from luthier_trainer.models import pipelines
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice


def check(
    path: Path,
    spec: GenerateJobSpec,
    adapters: Sequence[tuple[Path, str]],
    rows: Sequence[Mapping[str, Any]],
    field: str,
) -> int:
    """Whether the pipeline in `path` can do what `spec` asks for, with `adapters`, their files and fields; its number
    of parameters.

    A notice says which of `rows`, the lines of `rows.jsonl`, have prompts that are not read to their end. Raises
    Failure.
    """
    index = pipelines.index_of(path, field)
    models = pipelines.skeletons(path, index, field)
    for name, model in models.items():
        pipelines.check_weights(path / name, model, field)
    check_size(models["vae"], spec)
    report_unread(pipelines.read_tokenizers(path, index, field), rows)
    rehearse(
        spec.image.scheduler,
        make_scheduler(spec.image.scheduler, pipelines.read_scheduler(path, index, field), spec.image.steps),
    )
    names = Names({name: model for name, model in models.items() if name != "vae"})
    for file, of in adapters:
        lora.read(file, names, of)
    return sum(parameter.numel() for model in models.values() for parameter in model.parameters())


def load(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline, from safetensors only, whole or refused: without code of its own and without watermark. Raises
    Failure.
    """
    from diffusers import StableDiffusionXLPipeline

    field = "spec.model"
    names = pipelines.classes(pipelines.index_of(path, field), field)
    given = {name: pipelines.load_model(path, name, dtype, field) for name in names}
    try:
        return StableDiffusionXLPipeline.from_pretrained(path, **given, local_files_only=True, add_watermarker=False)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: the pipeline in {path} cannot be loaded: {error}") from None


def check_size(vae: Any, spec: GenerateJobSpec) -> None:
    """Whether images of the spec's size are made of whole latents. Raises Failure."""
    unit = pipelines.pixels_of_a_latent(vae)
    for name, size in (("width", spec.image.width), ("height", spec.image.height)):
        if size % unit:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.image.{name}: {size} is not a multiple of {unit}, as this model wants; set {size // unit * unit}"
                f" or {(size // unit + 1) * unit}",
            )


def report_unread(tokenizers: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A notice for the prompts, and one for the negative prompts, that are longer than the text encoders read."""
    for key in ("prompt", "negativePrompt"):
        counts = [(pipelines.unread_tokens(tokenizers, row[key]), row["row"]) for row in rows if row.get(key)]
        cut = [(count, row) for count, row in counts if count]
        if cut:
            most, row = max(cut, key=lambda entry: entry[0])
            notice(
                f"spec.inputs.columns.{key}: {len(cut)} of {len(counts)} are longer than the"
                f" {min(t.model_max_length for t in tokenizers)} tokens that the text encoders read; their ends are not"
                f" read, of row {row} {most} tokens. Shorten them; each line of the result says how much is not read"
            )
