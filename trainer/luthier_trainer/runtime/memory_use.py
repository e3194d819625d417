"""How much memory this process uses, as torch or the kernel counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a GPU, or of a process that trains on a CPU."""

    tensors: int
    """In tensors. On a CPU, all that the process holds of RAM, files that it has mapped included."""
    reserved: int
    """That torch has reserved of the GPU. On a CPU the same as `tensors`."""


def now(device: torch.device) -> MemoryUse:
    """Return what this process uses now."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))
    return resident("VmRSS")


def peak(device: torch.device) -> MemoryUse:
    """Return the most that this process has used."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    return resident("VmHWM")


def resident(field: str) -> MemoryUse:
    """Return a count of the kernel: VmRSS, or VmHWM for the most so far. Systems other than Linux have none: 0."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    size = next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
    return MemoryUse(size, size)
