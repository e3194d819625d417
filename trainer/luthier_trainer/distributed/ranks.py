"""Communication between the processes of a run besides gradients: stop flags, decisions of rank 0, counts.

It uses a gloo group of its own, on CPU, so that a call in each step never waits for the GPU's queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.classify import classify
from luthier_trainer.runtime.failure import Failure

T = TypeVar("T")
Outcome = tuple[T | None, tuple[ExitCode, str] | None]
"""The value that the work returned, or the exit code and the message of its failure."""


class Ranks:
    """All processes of the run. Each method is called by all of them, in the same order."""

    def __init__(self, timeout_seconds: float = 1800) -> None:
        """`timeout_seconds`: how long a process waits for the others; more than a save may take on one of them."""
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.count = dist.get_world_size() if self.distributed else 1
        self._group: Any = None
        if self.distributed and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0 if self.distributed else flag

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each rank, in the order of ranks."""
        if not self.distributed:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self._group)
        return [tensor.tolist() for tensor in found]

    def decide(self, choose: Callable[[], T]) -> T:
        """The value of `choose`, which only rank 0 calls. Raises its Failure on all ranks, with the same code."""
        outcome: list[Any] = [_outcome(choose) if self.first else None]
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        return _value(outcome[0])

    def each(self, work: Callable[[], T]) -> list[T]:
        """The values of `work`, which each rank calls, in the order of ranks. Raises the Failure of one on all."""
        outcomes: list[Any] = [_outcome(work)]
        if self.distributed:
            mine, outcomes = outcomes[0], [None] * self.count
            dist.all_gather_object(outcomes, mine, group=self._group)
        for failed in (outcome for outcome in outcomes if outcome[1] is not None):
            _value(failed)
        return [_value(outcome) for outcome in outcomes]

    def wait(self) -> None:
        """Return once all ranks have called this."""
        if self.distributed:
            dist.barrier(group=self._group)

    def _reduce(self, value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        return float(tensor.item())


def _outcome(work: Callable[[], T]) -> Outcome[T]:
    """The value of `work`, or its Failure or OSError, such as a full disk, as data. Others end this process."""
    try:
        return work(), None
    except (Failure, OSError) as error:
        return None, classify(error)


def _value(outcome: Outcome[T]) -> T:
    """The value of an outcome. Raises Failure if it is a failure."""
    found, failure = outcome
    if failure is not None:
        raise Failure(*failure)
    return found  # type: ignore[return-value]  # what `work` returned, which may be None
