"""Writes the weights of a whole model part by part: a block of layers is copied to this process, and then the next one.

transformers 5.23 takes all weights at once, and writes files of up to 50 GB. Under ZeRO-3 and FSDP all of them would
lie in the memory of rank 0, and on a GPU the copy on the host would be as large as the model. Here a process never
holds more than one file of them beside its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from luthier_trainer.models.fsdp import gathered_whole
from luthier_trainer.models.heads import gathered
from luthier_trainer.workspace.gpu_memory import FILE_BYTES
from luthier_trainer.workspace.model_files import WEIGHTS_INDEX

BLOCK = re.compile(r"(.*?\.\d+)\.")  # the name of an element of a list of layers, the outermost one
METADATA = {"format": "pt"}  # of a file; transformers loads none without it


def write_weights(
    model: PreTrainedModel,
    folder: Path,
    writes: bool,
    file_bytes: int = FILE_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights of `model` to `folder`, under the names of the files that it was loaded from.

    Under ZeRO-3 and FSDP all processes call this function, because each holds a part of each weight. `writes`: whether
    this process writes the files; one of them does. There is an index if there are several files. `dtype`: of numbers
    with a fraction in the files; None: as in memory.
    """
    weights = saved_weights(model)
    files = list(files_of(weights, file_bytes))
    found: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        held = {name: whole(weights[name], writes, dtype) for name in names}
        if writes:
            found |= dict.fromkeys(write_file(model, held, folder / file), file)
    if writes and len(files) > 1:
        described = {
            "total_parameters": sum(prod(shape_of(weight)) for weight in weights.values()),
            "total_size": sum(bytes_of(weight, dtype) for weight in weights.values()),
        }
        text = json.dumps({"metadata": described, "weight_map": found}, indent=2, sort_keys=True)
        (folder / f"model{WEIGHTS_INDEX}").write_text(text + "\n")


def name_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write into config.json the type in which weights were written, where it is not that in memory."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_file(model: PreTrainedModel, held: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Write weights, which `held` then gives up, as one file. Return their names in it."""
    converted = revert_weight_conversion(model, held)
    held.clear()
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, path, METADATA)
    return [*converted]


def saved_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return name in memory → weight or buffer of all that is saved. Of those that are shared, each is there once."""
    weights = model.state_dict(keep_vars=True)
    skipped = {*(model._keys_to_ignore_on_save or ())}
    # Meta tensors are compared by the weights of the model. Those of ZeRO-3 are empty, and would all seem to be shared.
    outlines = {
        name: torch.empty(shape_of(weight), dtype=weight.dtype, device="meta")
        for name, weight in weights.items()
        if name not in skipped
    }
    return {name: weights[name] for name in remove_tied_weights_from_state_dict(outlines, model)}


def files_of(weights: Mapping[str, torch.Tensor], file_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the weights of each file. Those of a block are in one file.

    The files of some architectures have the weights of a block in another form, which is made from several of them.
    """
    blocks: dict[str, list[str]] = {}
    for name in weights:
        block = BLOCK.match(name)
        blocks.setdefault(block[1] if block else name.rpartition(".")[0], []).append(name)
    names: list[str] = []
    size = 0
    for block_names in blocks.values():
        block_size = sum(bytes_of(weights[name]) for name in block_names)
        if names and size + block_size > file_bytes:
            yield names
            names, size = [], 0
        names = [*names, *block_names]
        size += block_size
    yield names


def whole(weight: torch.Tensor, keeps: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a weight on the host, gathered from all processes under ZeRO-3 and FSDP; an empty one for a process that
    does not keep it.
    """
    with gathered([weight], changed=False):
        found = gathered_whole(weight, dtype)
        return found.cpu() if keeps else torch.empty(0)


def shape_of(weight: Any) -> tuple[int, ...]:
    """Return the shape of a weight; of the whole where ZeRO-3 has divided it."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def bytes_of(weight: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a whole weight, in `dtype` if it has numbers with a fraction."""
    kind = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    return prod(shape_of(weight)) * kind.itemsize
