"""Stable Diffusion XL for a GenerateJob: `prepare` checks its configurations and file headers, and `run` loads it.

The files are compared with the spec and with the adapters before a GPU is used, so that a pod with a GPU does not fail
because of them.
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
    """Check that the pipeline in `path` supports `spec` and `adapters`, and return its number of parameters.

    `adapters`: file and field of the spec for each. `rows`: the lines of `rows.jsonl`; a notice names the prompts that
    are longer than the text encoders read. Raises Failure if the pipeline does not suit the job.
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
    """Load the pipeline in `path` in `dtype`, without code from the repository and without watermark.

    Only safetensors are read. Raises Failure if a part is missing or cannot be loaded.
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
    """Check that width and height in the spec are multiples of the size of a latent. Raises Failure if not."""
    unit = pipelines.pixels_of_a_latent(vae)
    for name, size in (("width", spec.image.width), ("height", spec.image.height)):
        if size % unit:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.image.{name}: {size} is not a multiple of {unit}, as this model wants; set {size // unit * unit}"
                f" or {(size // unit + 1) * unit}",
            )


def report_unread(tokenizers: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Give one notice for prompts, and one for negative prompts, that are longer than the text encoders read."""
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
