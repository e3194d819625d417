"""The names of the modules of diffusers' pipelines, and of their tensors, in LoRA files.

Training programs write the names of diffusers, of PEFT, or of Stability's own code (LDM: `input_blocks.4.1...`), with
dots or, like kohya's sd-scripts and LyCORIS, with underscores in place of dots. A name with underscores cannot be split
without knowing the model. The table is therefore built in the other direction: it holds, for each module of the given
model, all names that a file may use for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Prefix of a name, with underscores, and the component of the pipeline that it denotes. Longer prefixes first.
PREFIXES = (
    ("lora_unet_", "unet"),
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
        self.modules: dict[tuple[str, str], str] = {}
        for part, model in parts.items():
            names = NAMES_OF[part](model)
            self.modules |= {(part, name.replace(".", "_")): module for name, module in names}

    @property
    def denoiser(self) -> str:
        """The component that denoises, which names without a prefix belong to."""
        return "transformer" if "transformer" in self.parts else "unet"

    def find(self, name: str) -> tuple[str, str] | None:
        """Return (component, module) for a name in a file; None if this pipeline has no such module."""
        name = name.replace(".", "_")
        for prefix, part in PREFIXES:
            if name.startswith(prefix):
                module = self.modules.get((part, name.removeprefix(prefix)))
                if module is not None:
                    return part, module
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
    """Yield (name in a file, module). Files with the names of the models' authors, in which several modules are one,
    have none of them.
    """
    return ((name, name) for name in _weighted(transformer))


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
