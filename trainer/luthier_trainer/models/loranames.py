"""The names of the modules of diffusers' pipelines, and of their tensors, in LoRA files.

Training programs write the names of diffusers, of PEFT, or of Stability's own code (LDM: `input_blocks.4.1...`), with
dots or, like kohya's sd-scripts and LyCORIS, with underscores in place of dots. A name with underscores cannot be split
without knowing the model. The table is therefore built in the other direction: it holds, for each module of the given
model, all names that a file may use for it.
Some modules of the authors' own code are several in diffusers: FLUX computes query, key and value as one product. So a
name in a file stands for a `Place`: outputs of one or of several modules, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Prefix of a name, with underscores, and the component of the pipeline that it denotes. Longer prefixes first.
PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_unet_", "transformer"),  # kohya
    ("lora_transformer_", "transformer"),  # OneTrainer
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),  # kohya
    ("lycoris_", "unet"),  # LyCORIS without kohya
    ("text_encoder_2_", "text_encoder_2"),
    ("text_encoder_", "text_encoder"),
    ("unet_", "unet"),  # diffusers
    ("transformer_", "transformer"),  # diffusers
    ("base_model_model_", "unet"),  # PEFT
    ("base_model_model_", "transformer"),
    ("diffusion_model_", "unet"),
    ("diffusion_model_", "transformer"),  # ComfyUI
    ("", "unet"),
    ("", "transformer"),
)

# Role of a tensor in its module → pattern of the end of its name. `down` and `up` are LoRA's A and B.
ROLES = {
    "down": r"\.lora_down\.weight|\.lora_A(\.\w+)?\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(\.\w+)?\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "up_bias": r"\.lora_B(\.\w+)?\.bias|\.lora_up\.bias",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",  # LyCORIS: (outputs, 1, ...) or (1, inputs, ...)
    "magnitude": r"\.lora_magnitude_vector(\.\w+)?(\.weight)?",  # PEFT: (outputs), or (1, outputs, 1, 1)
    **{
        name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },  # LoHa
    **{
        name: rf"\.{name}"
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    },  # LoKr
    "diff": r"\.diff|\.w_norm",
    "diff_bias": r"\.diff_b|\.b_norm",
}
ENDINGS = re.compile("(?:" + "|".join(f"(?P<{role}>{pattern})" for role, pattern in ROLES.items()) + ")$")

LDM = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# diffusers before 0.22 used the names of the UNet's attention for the attention of CLIP, too.
OLD_CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


# Modules of FLUX in the code of its authors → the modules of diffusers that compute its outputs, in their order.
FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX_ALONE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# Its outputs are a shift and a scale, and in diffusers a scale and a shift.
FLUX_SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}


@dataclass(frozen=True)
class Rows:
    """Outputs of a module, from `first` until `end`; all of them where neither is given."""

    module: str
    first: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Place:
    """What a name in a file stands for: outputs of modules of the pipeline's model `part`, one after the other."""

    part: str
    rows: tuple[Rows, ...]

    def __str__(self) -> str:
        return ".".join([self.part, " + ".join(self.modules)])

    @property
    def modules(self) -> list[str]:
        """The names of its modules, each once."""
        return list(dict.fromkeys(rows.module for rows in self.rows))

    def joined(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs as one tensor. `tensors`: module → its weight or bias."""
        parts = [tensors[rows.module][rows.first : rows.end] for rows in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, tensors: Mapping[str, torch.Tensor], change: torch.Tensor) -> None:
        """Add the change of all outputs to `tensors`, in place."""
        done = 0
        for rows in self.rows:
            part = tensors[rows.module][rows.first : rows.end]
            part += change[done : done + len(part)]
            done += len(part)


def split(key: str) -> tuple[str, str] | None:
    """Return (name of the module in the file, role of the tensor); None if the key has no known ending."""
    match = ENDINGS.search(key)
    return (key[: match.start()], str(match.lastgroup)) if match else None


class Names:
    """The modules of a pipeline, by every name that files use for them.

    `parts`: the models of the pipeline, by their component names in diffusers.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.places: dict[tuple[str, str], Place] = {}
        for part, model in parts.items():
            for name, module in NAMES_OF[part](model):
                self.places[part, name.replace(".", "_")] = Place(part, (Rows(module),))
            for name, rows in self.authors_names(model):
                self.places[part, name.replace(".", "_")] = Place(part, rows)

    @property
    def denoiser(self) -> str:
        """The component that denoises, which names without a prefix belong to."""
        return "transformer" if "transformer" in self.parts else "unet"

    @staticmethod
    def authors_names(model: Any) -> Iterator[tuple[str, tuple[Rows, ...]]]:
        """Yield (name in the code of the model's authors, outputs), where modules of that code are joined."""
        names = AUTHORS_NAMES.get(type(model).__name__)
        return names(model) if names else iter(())

    @property
    def has_authors_names(self) -> bool:
        """Whether the names of the code of the model's authors are known."""
        return self.denoiser == "unet" or type(self.parts[self.denoiser]).__name__ in AUTHORS_NAMES

    def find(self, name: str) -> Place | None:
        """Return the place of a name in a file; None if this pipeline has no such module."""
        name = name.replace(".", "_")
        for prefix, part in PREFIXES:
            if name.startswith(prefix):
                place = self.places.get((part, name.removeprefix(prefix)))
                if place is not None:
                    return place
        return None


def _weighted(model: Any) -> Iterator[str]:
    """Names of the modules that have a weight."""
    return (name for name, module in model.named_modules() if getattr(module, "weight", None) is not None)


def _names_of_unet(unet: Any) -> Iterator[tuple[str, str]]:
    blocks = ldm_blocks(unet)
    for module in _weighted(unet):
        for name in filter(None, (module, ldm_name(module, blocks))):
            shorter = name.removesuffix(".0") if name.endswith(".to_out.0") else name
            for variant in {name, shorter}:
                yield variant, module
                yield re.sub(r"\.(attn[12])\.", r".\1.processor.", variant), module


def _names_of_transformer(transformer: Any) -> Iterator[tuple[str, str]]:
    """Yield (name in a file, module), by diffusers' names."""
    return ((name, name) for name in _weighted(transformer))


def _names_of_flux(transformer: Any) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    """Yield (name in the code of FLUX's authors, outputs)."""
    there = set(_weighted(transformer))
    for number in range(len(transformer.transformer_blocks)):
        for name, modules in FLUX_DOUBLE.items():
            within = f"transformer_blocks.{number}"
            yield f"double_blocks.{number}.{name}", tuple(Rows(f"{within}.{module}") for module in modules)
    for number in range(len(transformer.single_transformer_blocks)):
        for name, modules in FLUX_SINGLE.items():
            within = f"single_transformer_blocks.{number}"
            yield f"single_blocks.{number}.{name}", tuple(Rows(f"{within}.{module}") for module in modules)
    for name, module in FLUX_ALONE.items():
        if module in there:  # FLUX.1 schnell is told no guidance
            yield name, (Rows(module),)
    for name, module in FLUX_SWAPPED.items():
        half = len(transformer.get_submodule(module).weight) // 2
        yield name, (Rows(module, half, None), Rows(module, None, half))


def _names_of_clip(encoder: Any) -> Iterator[tuple[str, str]]:
    """Yield (name in a file, module) with and without `text_model`.

    transformers 5 has removed `text_model` from the names in CLIPTextModel, but not in CLIPTextModelWithProjection.
    """
    for module in _weighted(encoder):
        bare = module.removeprefix("text_model.")
        stem, _, last = bare.rpartition(".")
        for name in (bare, f"{stem}.{OLD_CLIP.get(last, last)}" if stem else bare):
            yield name, module
            yield f"text_model.{name}", module


NAMES_OF: Mapping[str, Callable[[Any], Iterator[tuple[str, str]]]] = {
    "unet": _names_of_unet,
    "transformer": _names_of_transformer,
    "text_encoder": _names_of_clip,
    "text_encoder_2": _names_of_clip,
}
"""Component of a pipeline → the function that yields (name in a file, module)."""
AUTHORS_NAMES: Mapping[str, Callable[[Any], Iterator[tuple[str, tuple[Rows, ...]]]]] = {
    "FluxTransformer2DModel": _names_of_flux,
}
"""Class of a model → the function that yields (name in the code of its authors, outputs)."""


def ldm_name(module: str, blocks: Mapping[str, str]) -> str | None:
    """Return the name in LDM of a module of the UNet; None if it has none. `blocks`: of `ldm_blocks`."""
    if module in LDM:
        return LDM[module]
    block = next((b for b in blocks if module == b or module.startswith(f"{b}.")), None)
    if block is None:
        return None
    inner = module.removeprefix(block).removeprefix(".")
    if ".resnets." in block:
        inner = LDM_RESNET[inner]
    return f"{blocks[block]}.{inner}".removesuffix(".")


def ldm_blocks(unet: Any) -> dict[str, str]:
    """Return the name of each block in diffusers → its name in LDM.

    LDM numbers all layers of the downward path, and of the upward path, consecutively; diffusers numbers them in each
    block.
    """
    found: dict[str, str] = {}
    number = 1  # 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            found[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for j in range(len(unet.mid_block.resnets)):
        found[f"mid_block.resnets.{j}"] = f"middle_block.{2 * j}"
        found[f"mid_block.attentions.{j}"] = f"middle_block.{2 * j + 1}"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            found[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:  # follows the last layer, under the same number
            row = 2 if getattr(block, "attentions", None) else 1
            found[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{row}.conv"
    return found
