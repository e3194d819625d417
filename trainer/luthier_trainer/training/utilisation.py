"""Model FLOPs utilisation (MFU): the share of a GPU's peak arithmetic that a training uses.

The definition is that of the PaLM paper (arXiv:2204.02311, appendix B). Per token, each weight costs 2 operations in
the forward pass and 2 in the backward pass, and each trainable weight costs 2 more. The operations of attention itself
are left out, and recomputed activations (gradient checkpointing) count once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

import torch

# Dense 16-bit tensor operations per second, from NVIDIA's data sheets. The first row whose name occurs as a word in the
# name of the device applies.
PEAK: tuple[tuple[str, float], ...] = (
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


def count_weights(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Return the number of trainable weights and of all weights.

    Weights that DeepSpeed has sharded, or that bitsandbytes has packed, count with their original size.
    """
    sizes = [(_size(p), p.requires_grad) for p in parameters]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def _size(weight: torch.nn.Parameter) -> int:
    if hasattr(weight, "ds_numel"):
        return int(weight.ds_numel)
    packed = getattr(weight, "quant_state", None)
    return prod(packed.shape) if packed is not None else weight.numel()


def operations_per_token(learning: int, weights: int) -> int:
    """Return the floating-point operations of training on one token. `learning`: number of trainable weights."""
    return 4 * weights + 2 * learning


def peak(device: str) -> float | None:
    """Return the peak operations per second of one GPU, by its name; None if the table does not have it."""
    return next((operations for name, operations in PEAK if re.search(rf"\b{name}\b", device)), None)
