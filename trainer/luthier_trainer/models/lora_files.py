"""Writes a LoRA adapter for images in two forms: with the names of diffusers, and with those of kohya's sd-scripts.

Both files hold the same tensors. Web UIs and ComfyUI read the second one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier_trainer.models.adapter_file import KOHYA_WEIGHTS, LORA_WEIGHTS
from luthier_trainer.models.adapters import WEIGHTS as PEFT_WEIGHTS
from luthier_trainer.models.checks import XL
from luthier_trainer.models.loranames import ldm_blocks, ldm_name
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

FILES = 2
SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}  # PEFT's names of the matrices → kohya's
PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
PREFIX_OF_THE_ONLY_ENCODER = "lora_te_"
PREFIX_OF_THE_UNET = "lora_unet_"
CLIP = "text_model."  # in names of files; transformers 5 removed this part from those of CLIPTextModel

Layers = dict[str, Any]
"""Module of a part + .lora_A.weight or .lora_B.weight → tensor."""


def convert(folder: Path, config: Mapping[str, Any], unet: Any, pipeline: str, by_part: bool) -> None:
    """Replace the adapter that PEFT has saved in `folder` by the two files.

    `config`: PEFT's. `unet`: the model that it belongs to. `pipeline`: the class. `by_part`: whether the names begin
    with the component; otherwise all of them are modules of the UNet.
    """
    from safetensors.torch import load_file

    parts: dict[str, Layers] = {}
    for name, tensor in load_file(folder / PEFT_WEIGHTS).items():
        module = name.removeprefix("base_model.model.")
        part, _, inner = module.partition(".") if by_part else ("unet", "", module)
        bare = inner.removeprefix(CLIP)
        parts.setdefault(part, {})[bare if part == "unet" else CLIP + bare] = tensor
    write_diffusers(folder, config, parts, pipeline)
    write_kohya(folder, config, parts, unet, pipeline)
    (folder / PEFT_WEIGHTS).unlink()
    (folder / ADAPTER_CONFIG).unlink()


def write_diffusers(folder: Path, config: Mapping[str, Any], parts: Mapping[str, Layers], pipeline: str) -> None:
    """Write the file that `load_lora_weights` of a pipeline reads."""
    import diffusers

    given: dict[str, Any] = {}
    for part, layers in parts.items():
        given[f"{part}_lora_layers"] = layers
        # diffusers 0.42.1 leaves the dropout of a loaded adapter switched on, so the file says 0. The base's path is
        # removed, because it names a folder in a pod. Targets are those of the part.
        given[f"{part}_lora_adapter_metadata"] = dict(config) | {
            "lora_dropout": 0.0,
            "base_model_name_or_path": None,
            "target_modules": sorted({module_of(name).removeprefix(CLIP) for name in layers}),
            "exclude_modules": None,
        }
    getattr(diffusers, pipeline).save_lora_weights(folder, weight_name=LORA_WEIGHTS, **given)


def write_kohya(folder: Path, config: Mapping[str, Any], parts: Mapping[str, Layers], unet: Any, pipeline: str) -> None:
    """Write the file with kohya's names, in which each module has its alpha as a tensor."""
    import torch
    from safetensors.torch import save_file

    is_xl = pipeline in XL
    blocks = ldm_blocks(unet)
    found = {}
    for part, layers in parts.items():
        for name, tensor in layers.items():
            module, side = module_of(name), name.split(".")[-2]
            if part == "unet":
                # For XL, sd-scripts has a UNet with the names of Stability's own code.
                inner = str(ldm_name(module, blocks)) if is_xl else module
                prefix = PREFIX_OF_THE_UNET
            else:
                inner, prefix = module, PREFIXES[part] if is_xl else PREFIX_OF_THE_ONLY_ENCODER
            key = prefix + inner.replace(".", "_")
            found[f"{key}.{SIDES[side]}.weight"] = tensor
            found[f"{key}.alpha"] = torch.tensor(float(config["lora_alpha"]))
    described = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
    }
    save_file(found, folder / KOHYA_WEIGHTS, metadata=described)


def module_of(name: str) -> str:
    """Return the module that a tensor belongs to: its name without `.lora_A.weight`."""
    return name.rsplit(".", 2)[0]
