"""How much of a GPU's arithmetic a training uses: model FLOPs utilisation, as the PaLM paper defines it
(arXiv:2204.02311, appendix B).

A token costs 2 operations a weight forwards, 2 backwards, and 2 more a weight that learns. Attention's own are left
out, and what is computed twice (gradient checkpointing) counts once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

import torch

# Dense 16-bit tensor operations a second, by NVIDIA's data sheets. The first that is a word of a device's name counts.
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
    """Weights that learn, and all of them: as they are meant, however DeepSpeed has split and bitsandbytes packed
    them.
    """
    sizes = [(_size(p), p.requires_grad) for p in parameters]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def _size(weight: torch.nn.Parameter) -> int:
    if hasattr(weight, "ds_numel"):
        return int(weight.ds_numel)
    packed = getattr(weight, "quant_state", None)
    return prod(packed.shape) if packed is not None else weight.numel()


def operations_per_token(learning: int, weights: int) -> int:
    return 4 * weights + 2 * learning


def peak(device: str) -> float | None:
    """Operations a second of one GPU by its name; None for those that the table does not know."""
    return next((operations for name, operations in PEAK if re.search(rf"\b{name}\b", device)), None)
