"""Weights are counted as they are meant, and a GPU's arithmetic is that of its data sheet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from luthier_api.gpus import peak_flops
from luthier_trainer.training.utilisation import count_weights

DEVICES = [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
    ("Tesla T4", 65e12),
    ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 4090", None),
]


@pytest.mark.parametrize(("device", "operations"), DEVICES)
def test_the_peak_of_a_device(device: str, operations: float | None) -> None:
    assert peak_flops(device) == operations


def layers(kind: str) -> list[torch.nn.Parameter]:
    frozen: Any = torch.nn.Linear(64, 64, bias=False)
    if kind == "packed":
        frozen = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    frozen.weight.requires_grad = False
    if kind == "split":
        frozen.weight.ds_numel, frozen.weight.data = frozen.weight.numel(), torch.empty(0)
    return [frozen.weight, torch.nn.Parameter(torch.zeros(8, 64))]


@pytest.mark.parametrize("kind", ["whole", "packed", "split"])
def test_weights_are_counted_as_they_are_meant(kind: str) -> None:
    assert count_weights(layers(kind)) == (512, 4096 + 512)
