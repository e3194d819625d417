"""GPUs that are known by name: memory and speed from NVIDIA's data sheets.

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


KNOWN_GPUS: Mapping[str, GpuInfo] = {
    "b200": GpuInfo("B200", 180 * GB, 2.25e15),
    "h200": GpuInfo("H200", 141 * GB, 989e12),
    "h100-pcie": GpuInfo("H100 PCIe", 80 * GB, 756e12),
    "h100-nvl": GpuInfo("H100 NVL", 94 * GB, 835e12),
    "h100-80g": GpuInfo("H100", 80 * GB, 989e12),
    "a100-80g": GpuInfo("A100", 80 * GB, 312e12),
    "a100-40g": GpuInfo("A100", 40 * GB, 312e12),
    "l40s": GpuInfo("L40S", 48 * GB, 362e12),
    "a10g": GpuInfo("A10G", 24 * GB, 70e12),
    "a10": GpuInfo("A10", 24 * GB, 125e12),
    "l4": GpuInfo("L4", 24 * GB, 121e12),
    "v100-32g": GpuInfo("V100", 32 * GB, 125e12),
    "v100-16g": GpuInfo("V100", 16 * GB, 125e12),
    "t4": GpuInfo("T4", 16 * GB, 65e12),
}
"""Name of a class, as `--gpu-class` takes it → the GPU."""


def peak_flops(device: str) -> float | None:
    """Return the peak operations a second of a GPU by CUDA's name for it; None if the table does not have it."""
    return next((gpu.peak_flops for gpu in KNOWN_GPUS.values() if re.search(rf"\b{gpu.device}\b", device)), None)
