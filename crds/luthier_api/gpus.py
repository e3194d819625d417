"""GPUs that are known by name: memory and its speed, and that of computing, from NVIDIA's data sheets.

For `luthier plan --gpu-class`, where the administrator has described no class of that name, and for the metric of
utilisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class GpuInfo:
    device: str
    """Words of the name by which CUDA calls it. Where several rows fit, the first one applies."""
    memory: int
    """Bytes, in decimal gigabytes as in its name. CUDA reports 2 % less (L4, A10, T4: error correction) to 7 % more."""
    peak_flops: float
    """Dense tensor operations a second: in bf16, or in fp16 before Ampere."""
    bandwidth: float
    """Bytes that its memory reads or writes in a second."""


KNOWN_GPUS: Mapping[str, GpuInfo] = {
    "b200": GpuInfo("B200", 180 * GB, 2.25e15, 8e12),
    "h200": GpuInfo("H200", 141 * GB, 989e12, 4.8e12),
    "h100-pcie": GpuInfo("H100 PCIe", 80 * GB, 756e12, 2.0e12),
    "h100-nvl": GpuInfo("H100 NVL", 94 * GB, 835e12, 3.9e12),
    "h100-80g": GpuInfo("H100", 80 * GB, 989e12, 3.35e12),
    "a100-80g": GpuInfo("A100", 80 * GB, 312e12, 2.04e12),
    "a100-40g": GpuInfo("A100", 40 * GB, 312e12, 1.555e12),
    "l40s": GpuInfo("L40S", 48 * GB, 362e12, 864e9),
    "a10g": GpuInfo("A10G", 24 * GB, 70e12, 600e9),
    "a10": GpuInfo("A10", 24 * GB, 125e12, 600e9),
    "l4": GpuInfo("L4", 24 * GB, 121e12, 300e9),
    "v100-32g": GpuInfo("V100", 32 * GB, 125e12, 900e9),
    "v100-16g": GpuInfo("V100", 16 * GB, 125e12, 900e9),
    "t4": GpuInfo("T4", 16 * GB, 65e12, 320e9),
}
"""Name of a class, as `--gpu-class` takes it → the GPU."""


def known(device: str) -> GpuInfo | None:
    """Return a GPU by CUDA's name for it; None if the table does not have it."""
    return next((gpu for gpu in KNOWN_GPUS.values() if re.search(rf"\b{gpu.device}\b", device)), None)


def peak_flops(device: str) -> float | None:
    """Return the peak operations a second of a GPU by CUDA's name for it; None if the table does not have it."""
    gpu = known(device)
    return gpu.peak_flops if gpu else None
