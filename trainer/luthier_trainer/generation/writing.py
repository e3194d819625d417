"""Writes outputs beside the model: while one batch is computed, the batch before it is encoded and stored.

At most one batch is computed and not yet stored, so that a shard that is killed computes at most one batch again. PNG,
hashing and fsync release the interpreter's lock, so that the files of a batch are written at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, TypeVar

from luthier_trainer.generation.samples import Output

Given = TypeVar("Given")
Made = TypeVar("Made")

# The threads mostly wait for the volume, or for the other core that compresses. More than the cores would only take
# time from the model on a CPU.
FILES = ThreadPoolExecutor(max(2, min(8, len(os.sched_getaffinity(0)))), thread_name_prefix="files")


def at_the_same_time(function: Callable[[Given], Made], items: Iterable[Given]) -> list[Made]:
    """Return the results of `function` for all items, in order. Raises what the first call that fails raises.

    All calls have ended on return, so that nothing is written after an error was reported.
    """
    futures = [FILES.submit(function, item) for item in items]
    for future in futures:
        future.exception()
    return [future.result() for future in futures]


class Store(Protocol):
    """What outputs are stored in."""

    def append(self, outputs: Sequence[Output]) -> None:
        """Store outputs. They are durable on return."""


class Writer:
    """Stores batches of outputs in order, each while the next one is computed.

    Used as a context: all that was put is stored when it ends, also if the model has failed meanwhile.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.pending: Future[None] | None = None

    def put(self, outputs: Sequence[Output]) -> None:
        """Wait until the batch before is stored, and begin to store this one. Raises what storing the former raised."""
        self.wait()
        self.pending = self.thread.submit(self.store.append, outputs)

    def wait(self) -> None:
        """Wait until all batches are stored. Raises what storing one raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Waits for the pending batch. An error of storing it is not raised above one of the model.
        self.thread.shutdown(wait=True)
        if error is None:
            self.wait()
