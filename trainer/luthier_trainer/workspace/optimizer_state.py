"""Bytes that each optimiser keeps for a tensor that learns: a term of the plan of memory and disk. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from luthier_api.methods import ParameterPrecision
from luthier_api.optimizers import OptimizerName

FP32, BF16 = 4, 2
SMALLEST_IN_8_BITS = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits (min_8bit_size)
BLOCK = 256  # weights of one scale in 32 bits


@dataclass(frozen=True)
class Tensor:
    """A tensor that learns."""

    shape: tuple[int, ...]
    embedding: bool = False
    """Whether it is the table of an embedding. transformers keeps the 8-bit optimisers' state of these in 32 bits."""
    hidden: bool = False
    """Whether it is a matrix of a hidden layer: for Muon."""
    adapter: bool = False
    """Whether it is of an adapter, and not of the model itself."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def _full(moments: int) -> Callable[[Tensor], int]:
    return lambda tensor: tensor.weights * moments * FP32


def _eight_bits(moments: int) -> Callable[[Tensor], int]:
    def size(tensor: Tensor) -> int:
        if tensor.embedding or tensor.weights < SMALLEST_IN_8_BITS:
            return tensor.weights * moments * FP32
        return moments * (tensor.weights + math.ceil(tensor.weights / BLOCK) * FP32)

    return size


def _factored(tensor: Tensor) -> int:
    if len(tensor.shape) < 2:
        return tensor.weights * FP32
    *_, rows, columns = tensor.shape
    return FP32 * (tensor.weights // columns + tensor.weights // rows)


def _muon(tensor: Tensor) -> int:
    return tensor.weights * FP32 * (1 if tensor.hidden else 2)


def state_bytes(optimizer: OptimizerName, precision: ParameterPrecision | None, tensor: Tensor) -> int:
    """Bytes of the state of a tensor whose weights rest in `precision` (None: fp32)."""
    if precision == "bf16" and optimizer == "adamw_torch_fused":
        return tensor.weights * 2 * BF16  # `training.stochastic_rounding` keeps the moments in bf16, too
    return STATE_BYTES[optimizer](tensor)


STATE_BYTES: Mapping[OptimizerName, Callable[[Tensor], int]] = {
    "adamw_torch_fused": _full(2),
    "adamw_8bit": _eight_bits(2),
    "paged_adamw_8bit": _eight_bits(2),
    "adafactor": _factored,
    "lion_32bit": _full(1),
    "lion_8bit": _eight_bits(1),
    "muon": _muon,
    "schedule_free_adamw": _full(2),
}
