"""A folder that holds Stable Diffusion XL: checked by `prepare` from its configurations and headers, loaded by `run`.

The check builds the pipeline's models on the meta device, without memory, and holds against them what the files have,
what the spec asks for and what the adapters change. So nothing that these decide is left for a pod with a GPU to find
out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_trainer.generation import lora
from luthier_trainer.generation.loranames import Names
from luthier_trainer.generation.schedulers import make_scheduler, rehearse
from luthier_trainer.models import checks, sources, weight_files
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import PIPELINE_CONFIG

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
LIBRARIES = ("diffusers", "transformers")  # no code of a repository's own
POSITIONS = "embeddings.position_ids"  # a buffer that older files of CLIP have as a tensor
SHOWN = 3  # names in a message


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
    index = _index(path, field)
    models = skeletons(path, index, field)
    for name, model in models.items():
        check_weights(path / name, model, field)
    check_size(models["vae"], spec)
    report_unread(_read_tokenizers(path, index, field), rows)
    rehearse(
        spec.image.scheduler,
        make_scheduler(spec.image.scheduler, _read_scheduler(path, index, field), spec.image.steps),
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
    given: dict[str, Any] = {}
    for name, kind in _classes(_index(path, field), field).items():
        folder = path / name
        try:
            given[name], found = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant(folder, field),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise Failure(ExitCode.INVALID_SPEC, f"{field}: {folder} cannot be loaded: {error}") from None
        if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {folder} lacks weights of its model: {_shown([str(k) for k in lacking])}",
            )
    try:
        return StableDiffusionXLPipeline.from_pretrained(path, **given, local_files_only=True, add_watermarker=False)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: the pipeline in {path} cannot be loaded: {error}") from None


def weight_files_of(folder: Path, field: str) -> list[Path]:
    """The files that `from_pretrained` reads the weights of a model from: the plain ones, or else those of fp16. Raises
    Failure.
    """
    there = weight_files.loaded(folder, field)
    return [p for p in there if not sources.VARIANT.search(p.name)] or [p for p in there if ".fp16" in p.name]


def variant(folder: Path, field: str) -> str | None:
    """diffusers' name for the weights in `folder` that are read."""
    return "fp16" if any(sources.VARIANT.search(p.name) for p in weight_files_of(folder, field)) else None


def skeletons(path: Path, index: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The pipeline's models on the meta device, by diffusers' names of components. Raises Failure when one cannot be
    built.
    """
    found = {}
    for name, kind in _classes(index, field).items():
        try:
            with torch.device("meta"):
                if hasattr(kind, "load_config"):
                    found[name] = kind.from_config(kind.load_config(path / name, local_files_only=True))
                else:
                    found[name] = kind(kind.config_class.from_pretrained(path / name, local_files_only=True))
        except Exception as error:  # each class checks its configuration with exceptions of its own
            text = " ".join(str(error).split())[:300]
            raise Failure(
                ExitCode.INVALID_SPEC, f"{field}: no {kind.__name__} can be built from {path / name}: {text}"
            ) from error
    return found


def check_weights(folder: Path, model: Any, field: str) -> None:
    """Whether the files of a model hold every weight, in its shape: what they lack would be drawn at random. Raises
    Failure.
    """
    held = {
        name: torch.empty(shape, device="meta")
        for name, shape in weight_files.shapes(weight_files_of(folder, field)).items()
    }
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(held)  # attention of old autoencoders had other names
    shapes = {_bare(name): tuple(tensor.shape) for name, tensor in held.items()}
    wanted = {_bare(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if lacking := [name for name in wanted if name not in shapes]:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the weights in {folder} lack {len(lacking)} of the {len(wanted)} tensors of"
            f" {type(model).__name__}: {_shown(lacking)}. Download or copy the folder again, or choose another model",
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {name} in {folder} is {shapes[name]}, and {type(model).__name__} by its config.json wants"
                f" {shape}",
            )
    if beside := [name for name in shapes if name not in wanted and name != POSITIONS]:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the weights in {folder} have {len(beside)} tensors that {type(model).__name__} by its"
            f" config.json has no use for: {_shown(beside)}",
        )


def _bare(name: str) -> str:
    """transformers 5 has taken `text_model` out of the names of CLIPTextModel; files have it."""
    return name.removeprefix("text_model.")


def check_size(vae: Any, spec: GenerateJobSpec) -> None:
    """Whether images of the spec's size are made of whole latents. Raises Failure."""
    unit = 2 ** (len(vae.config.block_out_channels) - 1)
    for name, size in (("width", spec.image.width), ("height", spec.image.height)):
        if size % unit:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.image.{name}: {size} is not a multiple of {unit}, as this model wants; set {size // unit * unit}"
                f" or {(size // unit + 1) * unit}",
            )


def _index(path: Path, field: str) -> dict[str, Any]:
    checks.check_pipeline(path, field)
    return dict(json.loads((path / PIPELINE_CONFIG).read_text()))


def _classes(index: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The classes of the pipeline's models. Raises Failure when it lacks one that it cannot do without."""
    if lacking := next((name for name in ("unet", "vae", "scheduler") if not (index.get(name) or [None])[0]), None):
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: model_index.json names no {lacking}; choose a whole pipeline")
    return {name: _class(index[name], field) for name in MODELS if (index.get(name) or [None])[0]}


def _class(entry: Sequence[str], field: str) -> Any:
    """The class of a component, by its name in the pipeline's configuration. Raises Failure if there is none."""
    library, name = entry
    kind = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if kind is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: model_index.json names {library}.{name}, which is not there. Code of a repository is never run",
        )
    return kind


def _read_tokenizers(path: Path, index: Mapping[str, Any], field: str) -> list[Any]:
    """The tokenizers of a pipeline. Raises Failure if one cannot be read."""
    found = []
    for name in ("tokenizer", "tokenizer_2"):
        if (index.get(name) or [None])[0]:
            try:
                found.append(_class(index[name], field).from_pretrained(path / name, local_files_only=True))
            except Exception as error:  # each tokenizer class fails in its own way on missing files
                text = " ".join(str(error).split())[:300]
                raise Failure(
                    ExitCode.INVALID_SPEC, f"{field}: {path / name} has no usable tokenizer: {text}"
                ) from error
    return found


def report_unread(tokenizers: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A notice for the prompts, and one for the negative prompts, that are longer than the text encoders read."""
    for key in ("prompt", "negativePrompt"):
        counts = [(unread_tokens(tokenizers, row[key]), row["row"]) for row in rows if row.get(key)]
        cut = [(count, row) for count, row in counts if count]
        if cut:
            most, row = max(cut, key=lambda entry: entry[0])
            notice(
                f"spec.inputs.columns.{key}: {len(cut)} of {len(counts)} are longer than the"
                f" {min(t.model_max_length for t in tokenizers)} tokens that the text encoders read; their ends are not"
                f" read, of row {row} {most} tokens. Shorten them; each line of the result says how much is not read"
            )


def unread_tokens(tokenizers: Sequence[Any], text: str) -> int:
    """Tokens at the end of a text that a text encoder does not see, the one that sees the least."""
    return max(
        max(0, len(t(text, truncation=False, verbose=False)["input_ids"]) - t.model_max_length) for t in tokenizers
    )


def _read_scheduler(path: Path, index: Mapping[str, Any], field: str) -> Any:
    """The scheduler that the repository names. Raises Failure if it cannot be read."""
    try:
        return _class(index["scheduler"], field).from_pretrained(path / "scheduler", local_files_only=True)
    except (KeyError, OSError, ValueError) as error:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {path / 'scheduler'} has no usable scheduler: {' '.join(str(error).split())[:300]}",
        ) from error


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
