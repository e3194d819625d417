"""What a step really holds on a CPU: what autograd keeps, by its hooks, and the peak of torch's allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(eq=False)
class Packed:
    """A tensor that autograd keeps. DoRA drops parts of a graph within a forward pass, and what they kept with them."""

    tensor: torch.Tensor


def of_step(loss: Callable[[], torch.Tensor], model: Any) -> tuple[int, int]:
    """Return the bytes that autograd keeps, beside weights of `model`, and the allocator's peak.

    `loss`: makes the batch, and computes the loss of it.
    """
    packed: weakref.WeakSet[Packed] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Packed:
        packed.add(held := Packed(tensor))
        return held

    kept: dict[int, int] = {}

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            value = loss()
        storages = [held.tensor.untyped_storage() for held in packed]
        kept.update((storage.data_ptr(), storage.nbytes()) for storage in storages)
        del storages
        value.backward()

    peak = peak_of(step)
    for weight in [*model.parameters(), *model.buffers()]:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(kept.values()), peak


def peak_of(work: Callable[[], Any]) -> int:
    """Return the most bytes that torch's allocator has given out at once during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
