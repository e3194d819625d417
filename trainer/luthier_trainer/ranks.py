"""What the processes of a run tell each other besides gradients: stop flags, decisions of rank 0, counts.

A gloo group of its own, on CPU: asking it once a step never waits for the GPU's queue. Neighbours: `callbacks`, `checkpoint`, `train`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from luthier_trainer.ending import Failure

T = TypeVar("T")


class Ranks:
    """All processes of the run. Each method is called by all of them, in the same order."""

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.count = dist.get_world_size() if self.distributed else 1
        self._group: Any = None
        if self.distributed and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0 if self.distributed else flag

    def total(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.SUM) if self.distributed else value

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose` says on rank 0, which alone calls it. Its Failure is everybody's, so that all ends carry the same code."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = choose()
            except Failure as failure:
                outcome[1] = (failure.code, failure.message)
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise Failure(*outcome[1])
        return outcome[0]

    def wait(self) -> None:
        """Return once all have come here."""
        if self.distributed:
            dist.barrier(group=self._group)

    def _reduce(self, value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        return float(tensor.item())
