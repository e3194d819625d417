"""Lets the layers of a language model wait in the memory of the node until the GPU computes with them.

Each layer is copied to the GPU, computes there and is dropped, by the hooks of accelerate. The kernels and their inputs
are the same as without it, and so are the outputs. Embeddings, the head and what is small stay on the GPU.
"""

from __future__ import annotations

import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.fsdp import blocks
from luthier_trainer.runtime.failure import Failure


def offload_layers(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return the model, whose repeated layers stay in the memory of the node, and all else is on the device.

    Raises Failure if the architecture does not say which layers repeat.
    """
    layers = list(blocks(model))
    if not layers:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.text.offload: {model.config.model_type} does not say which of its layers repeat; remove it",
        )
    inside = {id(module) for layer in layers for module in layer.modules()}
    for layer in layers:
        cpu_offload(layer, execution_device=device)
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model
