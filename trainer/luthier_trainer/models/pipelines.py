"""The components of a diffusers pipeline in a folder: classes, modules, weights, tokenizers.

The checks build the models on the meta device, without memory, and compare them with the headers of the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models import checks, sources, weight_files
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import PIPELINE_CONFIG

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")  # of Stable Diffusion (XL)
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
LIBRARIES = ("diffusers", "transformers")  # code that a repository brings is never run
POSITIONS = "embeddings.position_ids"  # a buffer that older files of CLIP hold as a tensor
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Parts:
    """The models of a kind of pipeline, by diffusers' names."""

    needed: tuple[str, ...]
    """The first one denoises."""
    optional: tuple[str, ...] = ()


WITH_UNET = Parts(needed=MODELS[:2], optional=MODELS[2:])
PARTS: Mapping[str, Parts] = {
    "StableDiffusionPipeline": WITH_UNET,
    "StableDiffusionXLPipeline": WITH_UNET,
    "StableDiffusionXLImg2ImgPipeline": WITH_UNET,
    "StableDiffusion3Pipeline": Parts(
        needed=("transformer", "vae", "text_encoder", "text_encoder_2"), optional=("text_encoder_3",)
    ),
    "FluxPipeline": Parts(needed=("transformer", "vae", "text_encoder", "text_encoder_2")),
}
"""Class of a pipeline → its models."""


def index_of(path: Path, field: str) -> dict[str, Any]:
    """Return model_index.json: component → [library, class]. Raises Failure for another kind of pipeline."""
    checks.check_pipeline(path, field, (*checks.TEXT_TO_IMAGE, *checks.REFINERS))
    return dict(json.loads((path / PIPELINE_CONFIG).read_text()))


def classes(index: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return the classes of the pipeline's models by component. Raises Failure if a necessary component is absent."""
    parts = PARTS[index["_class_name"]]
    for name in (*parts.needed, "scheduler"):
        if not (index.get(name) or [None])[0]:
            raise Failure(ExitCode.INVALID_SPEC, f"{field}: model_index.json names no {name}; choose a whole pipeline")
    there = [name for name in (*parts.needed, *parts.optional) if (index.get(name) or [None])[0]]
    return {name: _class(index[name], field) for name in there}


def _class(entry: Sequence[str], field: str) -> Any:
    """Return the class of a component from its [library, class]. Raises Failure if there is none."""
    library, name = entry
    kind = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if kind is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: model_index.json names {library}.{name}, which is not there. Code of a repository is never run",
        )
    return kind


def skeletons(path: Path, index: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return the pipeline's models on the meta device, by diffusers' names of the components.

    Raises Failure if a model cannot be built from its configuration.
    """
    found = {}
    for name, kind in classes(index, field).items():
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


def weight_files_of(folder: Path, field: str) -> list[Path]:
    """Return the files that `from_pretrained` reads a model's weights from: the plain ones, otherwise those of fp16.

    Raises Failure if shards are absent.
    """
    there = weight_files.loaded(folder, field)
    return [p for p in there if not sources.VARIANT.search(p.name)] or [p for p in there if ".fp16" in p.name]


def variant(folder: Path, field: str) -> str | None:
    """Return diffusers' name for the set of weights in `folder` that is read: "fp16", or None for the plain ones.

    Raises Failure if shards are absent.
    """
    return "fp16" if any(sources.VARIANT.search(p.name) for p in weight_files_of(folder, field)) else None


def check_weights(folder: Path, model: Any, field: str) -> None:
    """Check that the files of a model hold each of its weights in its shape, and no others.

    `model` is on the meta device. Weights that the files lack would be initialised randomly. Raises Failure if tensors
    are absent, have another shape, or do not belong to the model.
    """
    held = {
        name: torch.empty(shape, device="meta")
        for name, shape in weight_files.shapes(weight_files_of(folder, field)).items()
    }
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(held)  # renames the attention weights of old autoencoders
    shapes = {_bare(name): tuple(tensor.shape) for name, tensor in held.items()}
    # Files hold one of two weights that are the same, such as the embedding of T5, by either name.
    for pair in dict(getattr(model, "_tied_weights_keys", None) or {}).items():
        for absent, there in (pair, pair[::-1]):
            if absent not in shapes and there in shapes:
                shapes[absent] = shapes[there]
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
    """Return the name without `text_model.`: transformers 5 removed this part from CLIPTextModel, but files have it."""
    return name.removeprefix("text_model.")


def read_tokenizers(path: Path, index: Mapping[str, Any], field: str) -> list[Any]:
    """Return the tokenizer of each text encoder, in their order. Raises Failure if one cannot be read."""
    found = []
    for name in TOKENIZERS:
        if (index.get(name) or [None])[0]:
            try:
                found.append(_class(index[name], field).from_pretrained(path / name, local_files_only=True))
            except Exception as error:  # each tokenizer class fails in its own way on missing files
                text = " ".join(str(error).split())[:300]
                raise Failure(
                    ExitCode.INVALID_SPEC, f"{field}: {path / name} has no usable tokenizer: {text}"
                ) from error
    return found


def denoiser_of(pipe: Any) -> Any:
    """Return the model of a pipeline that denoises."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def pixels_of_a_latent(vae: Any) -> int:
    """Return how many pixels, along one side, the VAE encodes as one element of the latent.

    The width and height of an image are multiples of it. Each block but the last halves the size.
    """
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def unread_tokens(tokenizers: Sequence[Any], text: str) -> int:
    """Return how many tokens at the end of a text are truncated, for the tokenizer that truncates the most."""
    return max(
        max(0, len(t(text, truncation=False, verbose=False)["input_ids"]) - t.model_max_length) for t in tokenizers
    )


def read_scheduler(path: Path, index: Mapping[str, Any], field: str) -> Any:
    """Return the scheduler that the pipeline names. Raises Failure if it cannot be read."""
    try:
        return _class(index["scheduler"], field).from_pretrained(path / "scheduler", local_files_only=True)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {path / 'scheduler'} has no usable scheduler: {' '.join(str(error).split())[:300]}",
        ) from error


def _shown(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def load_model(path: Path, name: str, dtype: torch.dtype, field: str) -> Any:
    """Return the model of component `name`, loaded from safetensors only.

    Raises Failure if it cannot be loaded, or if one of its weights is absent or has another shape.
    """
    kind, folder = classes(index_of(path, field), field)[name], path / name
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant(folder, field),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # an error of the volume, not of the files' content
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {folder} cannot be loaded: {error}") from None
    if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} lacks weights of its model: {_shown([str(k) for k in lacking])}",
        )
    return model
