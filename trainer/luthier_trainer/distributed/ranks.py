"""What the processes of a run tell each other besides gradients: stop flags, decisions of rank 0, counts.

A gloo group of its own, on CPU: asking it once a step never waits for the GPU's queue.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.classify import classify
from luthier_trainer.runtime.failure import Failure

T = TypeVar("T")
Outcome = tuple[T | None, tuple[ExitCode, str] | None]
"""What was found, or the code and the message of a failure."""


class Ranks:
    """All processes of the run. Each method is called by all of them, in the same order."""

    def __init__(self, timeout_seconds: float = 1800) -> None:
        """`timeout_seconds`: how long one waits for the others. It must be above the time that a save may take on one
        of them.
        """
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

    def total(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.SUM) if self.distributed else value

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose` says on rank 0, which alone calls it. Its failure is everybody's, so that all ends carry the
        same code.
        """
        outcome: list[Any] = [_outcome(choose) if self.first else None]
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        return _value(outcome[0])

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` says on each rank, in their order: all do it at once. The failure of one is everybody's."""
        outcomes: list[Any] = [_outcome(work)]
        if self.distributed:
            mine, outcomes = outcomes[0], [None] * self.count
            dist.all_gather_object(outcomes, mine, group=self._group)
        for failed in (outcome for outcome in outcomes if outcome[1] is not None):
            _value(failed)
        return [_value(outcome) for outcome in outcomes]

    def wait(self) -> None:
        """Return once all have come here."""
        if self.distributed:
            dist.barrier(group=self._group)

    def _reduce(self, value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        return float(tensor.item())


def _outcome(work: Callable[[], T]) -> Outcome[T]:
    """A Failure, or an error of the system, such as a full disk, as a value. What else goes wrong here is for this
    process to end with.
    """
    try:
        return work(), None
    except (Failure, OSError) as error:
        return None, classify(error)


def _value(outcome: Outcome[T]) -> T:
    """What was found. Raises Failure if the work has failed."""
    found, failure = outcome
    if failure is not None:
        raise Failure(*failure)
    return found  # type: ignore[return-value]  # what `work` returned, which may be None
