"""What the models of a pipeline need of a GPU to make a batch of images, computed on the meta device.

Shapes alone are computed, by the same classes and settings as in the run. What kernels take for themselves is not in
it, but for a share (`gpu_memory.FRAGMENTS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier_api.status import Memory
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation import safety
from luthier_trainer.generation.flow_prompts import FLUX_TOKENS, SD3_TOKENS, flux_tokens
from luthier_trainer.models import pipelines
from luthier_trainer.models.memory import Setting, prepared
from luthier_trainer.workspace.gpu_memory import CONTEXT_BYTES, FRAGMENTS, PROCESS_BYTES, WORKSPACE_BYTES

CHECKER = "safety"
"""Name of the model that checks images, among those of pipelines."""
TOKENS = 77
"""Of a prompt that CLIP reads, or of a part of one that is longer."""
T5_TOKENS = max(SD3_TOKENS, FLUX_TOKENS)
TILED = 3
"""Images that are there when tiles become one: the tiles, which overlap, and the image itself."""
TIME_IDS = 6
"""Numbers that a UNet is told of an image, besides the prompt. A refiner is told 5, beside a wider prompt: the sum
counts.
"""


@dataclass(frozen=True)
class Work:
    """A batch of images, as it matters to memory."""

    images: int
    width: int
    height: int
    guided: bool
    dtype: torch.dtype
    encodes: bool
    """Whether images are made of others."""


@dataclass(frozen=True)
class Part:
    """A model of a pipeline: bytes."""

    weights: int
    layer: int
    """Of the largest layer."""
    held: int
    """Besides weights, when it is the most."""


def parts_of(path: Path, image: ImageSettings, work: Work, field: str) -> dict[str, Part]:
    """Return the models of the pipeline in `path`, by diffusers' names."""
    models = pipelines.skeletons(path, pipelines.index_of(path, field), field)
    unit = pipelines.pixels_of_a_latent(models["vae"])
    upcasts = work.dtype == torch.float16 and models["vae"].config.force_upcast
    for name, model in models.items():
        # Not diffusers' own `to`, which warns of what `from_pretrained` keeps in fp32: nothing here.
        torch.nn.Module.to(model, torch.float32 if name == "vae" and upcasts else work.dtype).eval()
    denoiser = next(name for name in ("unet", "transformer") if name in models)
    if image.attention_slicing and hasattr(models[denoiser], "set_attention_slice"):
        models[denoiser].set_attention_slice("auto")
    height, width = work.height // unit, work.width // unit
    held = {name: most_held(model, read) for name, model in models.items() if name not in (denoiser, "vae")}
    denoise = DENOISE[type(models[denoiser]).__name__]
    held[denoiser] = most_held(models[denoiser], lambda model: denoise(model, work, height, width))
    held["vae"] = most_decoded(models["vae"], image, work, height, width)
    if work.encodes:
        held["vae"] = max(held["vae"], most_held(models["vae"], lambda vae: encode(vae, work)))
    return {
        name: Part(
            weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            layer=max(sum(own.nbytes for own in module.parameters(recurse=False)) for module in model.modules()),
            held=held[name],
        )
        for name, model in models.items()
    }


def checker_of(path: Path, image: ImageSettings) -> Part:
    """Return the model in `path` that checks images (`image.safety`): in fp32, an image at a time."""
    model, given = safety.rehearsed(path, image.width, image.height)
    return Part(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        layer=0,
        held=most_held(model, lambda model: model(**given)),
    )


def most_decoded(vae: Any, image: ImageSettings, work: Work, height: int, width: int) -> int:
    """Return the most bytes that decoding holds at once, of a whole latent or of its tiles."""
    tile = vae.tile_latent_min_size
    if not image.vae_tiling or tile >= max(height, width):
        return most_held(vae, lambda vae: decode(vae, height, width))
    of_tile = most_held(vae, lambda vae: decode(vae, min(tile, height), min(tile, width)))
    return of_tile + TILED * work.height * work.width * int(vae.config.out_channels) * int(vae.dtype.itemsize)


def most_held(model: Any, compute: Callable[[Any], object]) -> int:
    """Return the most bytes that `compute` holds at once, besides the weights of the model."""
    ledger, replaced = prepared(model, (), Setting("cuda", None))
    with torch.no_grad(), ledger, replaced:
        compute(model)
    return max((held for held, _ in ledger.moments), default=0)


def denoise_by_unet(unet: Any, work: Work, height: int, width: int) -> object:
    """Compute a step on the meta device: with guidance, each image counts twice."""
    config = unet.config
    rows = work.images * (2 if work.guided and config.time_cond_proj_dim is None else 1)
    empty = _empty(work.dtype)
    given: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        time = config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": empty(rows, config.projection_class_embeddings_input_dim - TIME_IDS * time),
            "time_ids": empty(rows, TIME_IDS),
        }
    if config.time_cond_proj_dim is not None:
        given["timestep_cond"] = empty(rows, config.time_cond_proj_dim)
    return unet(
        empty(rows, config.in_channels, height, width),
        torch.zeros((), device="meta"),
        encoder_hidden_states=empty(rows, TOKENS, config.cross_attention_dim),
        return_dict=False,
        **given,
    )


def denoise_by_sd3(transformer: Any, work: Work, height: int, width: int) -> object:
    """Compute a step of Stable Diffusion 3 on the meta device: with guidance, each image counts twice."""
    config = transformer.config
    rows = work.images * (2 if work.guided else 1)
    empty = _empty(work.dtype)
    return transformer(
        hidden_states=empty(rows, config.in_channels, height, width),
        timestep=torch.zeros(rows, device="meta"),
        encoder_hidden_states=empty(rows, TOKENS + SD3_TOKENS, config.joint_attention_dim),
        pooled_projections=empty(rows, config.pooled_projection_dim),
        return_dict=False,
    )


def denoise_by_flux(transformer: Any, work: Work, height: int, width: int) -> object:
    """Compute a step of FLUX on the meta device: guidance is an input."""
    config = transformer.config
    rows, patches, tokens = work.images, (height // 2) * (width // 2), flux_tokens(transformer)
    empty = _empty(work.dtype)
    return transformer(
        hidden_states=empty(rows, patches, config.in_channels),
        timestep=empty(rows),
        guidance=torch.zeros(rows, device="meta") if config.guidance_embeds else None,
        pooled_projections=empty(rows, config.pooled_projection_dim),
        encoder_hidden_states=empty(rows, tokens, config.joint_attention_dim),
        txt_ids=empty(tokens, 3),
        img_ids=empty(patches, 3),
        return_dict=False,
    )


DENOISE: Mapping[str, Callable[[Any, Work, int, int], object]] = {
    "UNet2DConditionModel": denoise_by_unet,
    "SD3Transformer2DModel": denoise_by_sd3,
    "FluxTransformer2DModel": denoise_by_flux,
}
"""Class of the model that denoises → the function that computes a step: (model, work, height, width of a latent)."""


def decode(vae: Any, height: int, width: int) -> object:
    """Decode one latent on the meta device: images are decoded alone."""
    return vae.decode(_empty(vae.dtype)(1, vae.config.latent_channels, height, width), return_dict=False)


def encode(vae: Any, work: Work) -> object:
    """Encode one image on the meta device: so diffusers does it where each has a noise of its own."""
    return vae.encode(_empty(vae.dtype)(1, vae.config.in_channels, work.height, work.width), return_dict=False)


def read(encoder: Any) -> object:
    """Encode one text on the meta device: texts are encoded alone."""
    tokens = T5_TOKENS if encoder.config.model_type == "t5" else TOKENS
    return encoder(torch.zeros((1, tokens), dtype=torch.long, device="meta"), output_hidden_states=True)


def _empty(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")


def of_all(models: Mapping[str, Part]) -> dict[str, int]:
    """Return what is there if all models are on the GPU."""
    return {
        "weights": sum(part.weights for part in models.values()),
        "activations": max(part.held for part in models.values()),
    }


def of_one(models: Mapping[str, Part]) -> dict[str, int]:
    """Return what is there if models that are not in use wait elsewhere.

    The VAE stays until the next batch has been denoised, because diffusers sends it away with all others.
    """
    vae = models["vae"].weights
    fullest = max(models, key=lambda name: models[name].weights + models[name].held)
    beside = 0 if fullest == "vae" else vae
    return {"weights": models[fullest].weights + beside, "activations": models[fullest].held}


def of_a_layer(models: Mapping[str, Part]) -> dict[str, int]:
    """Return what is there if each layer comes when it computes."""
    fullest = max(models.values(), key=lambda part: part.layer + part.held)
    return {"weights": fullest.layer, "activations": fullest.held}


TERMS: Mapping[str, Callable[[Mapping[str, Part]], dict[str, int]]] = {
    "none": of_all,
    "models": of_one,
    "layers": of_a_layer,
}
"""What waits elsewhere (`image.offload`) → what is on the GPU. In the order in which they are preferred."""


def memory_of(models: Mapping[str, Part], offload: str) -> Memory:
    """Return what the models need of a GPU, and of the memory of a node."""
    waiting = {name: part for name, part in models.items() if name != CHECKER}
    terms = TERMS[offload](waiting)
    if checker := models.get(CHECKER):  # it stays on the GPU, whatever waits elsewhere
        terms["weights"] += checker.weights
        terms["activations"] = max(terms["activations"], checker.held)
    terms["fragments"] = math.ceil(FRAGMENTS * terms["activations"])
    terms |= {"workspace": WORKSPACE_BYTES, "context": CONTEXT_BYTES}
    host = PROCESS_BYTES["gpu"] + sum(part.weights for part in models.values())
    return Memory(gpu=terms, gpu_bytes=sum(terms.values()), host_bytes=host)
