"""Which jobs want a look: keys without duplicates, one worker a key, later looks, and back-off after errors.

The rules are those of client-go's work queue, so that nothing is ever dropped: a key that comes in while it is being
worked on is worked on once more. Time is given, not read, so that tests own it. Neighbours: `store` says which key an
object belongs to, `reconcile` works.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Protocol

from luthier_operator.model import Key

BACKOFF_BASE = 0.2  # seconds, after the first error
SETTLE_SECONDS = (
    0.1  # what has one cause (a Job, its pod, our own writes) is known within that: one look instead of four
)
STOP_SECONDS = 10.0  # for the writes that are under way when the operator stops
BACKOFF_LIMIT = 120.0  # an API server or a quota that comes back is noticed within two minutes


class Observer(Protocol):
    """What the metrics want to know."""

    def added(self, depth: int) -> None: ...
    def taken(self, waited: float, depth: int) -> None: ...
    def retried(self) -> None: ...


class Queue:
    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        backoff: float = BACKOFF_BASE,
        observer: Observer | None = None,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0),
    ) -> None:
        self._clock, self._backoff, self._observer, self._jitter = clock, backoff, observer, jitter
        self._ready: OrderedDict[Key, float] = OrderedDict()  # key → when it came in
        self._working: set[Key] = set()
        self._again: dict[Key, float] = {}  # came in while being worked on
        self._later: list[tuple[float, Key]] = []
        self._deadline: dict[Key, float] = {}  # the earliest wish of each key; other entries of the heap are void
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: Key) -> None:
        """Have `key` looked at now."""
        if key in self._working:
            self._again.setdefault(key, self._clock())
        elif key not in self._ready:
            self._ready[key] = self._clock()
            if self._observer:
                self._observer.added(len(self._ready))
            self._changed.set()

    def soon(self, key: Key) -> None:
        """Have `key` looked at when what has just changed has settled."""
        self.add_after(key, SETTLE_SECONDS)

    def add_after(self, key: Key, seconds: float) -> None:
        """Have `key` looked at in `seconds`, or sooner if something else asks for it. Of several wishes the earliest
        counts.
        """
        if seconds <= 0:
            self.add(key)
            return
        deadline = self._clock() + seconds
        if deadline < self._deadline.get(key, float("inf")):
            self._deadline[key] = deadline
            heapq.heappush(self._later, (deadline, key))
            self._changed.set()

    def retry(self, key: Key) -> float:
        """Have `key` looked at again after an error, later each time. Returns the seconds until then."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(BACKOFF_LIMIT, self._backoff * 2.0 ** min(failures, 30)) * self._jitter()
        if self._observer:
            self._observer.retried()
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """The errors of `key` are over."""
        self._failures.pop(key, None)

    def take(self) -> Key | None:
        """The key that has waited longest, or None when none is due. Call `done` afterwards."""
        self._release_due()
        if not self._ready:
            return None
        key, since = self._ready.popitem(last=False)
        self._working.add(key)
        if self._observer:
            self._observer.taken(self._clock() - since, len(self._ready))
        return key

    def done(self, key: Key) -> None:
        """Whoever took `key` has finished with it."""
        self._working.discard(key)
        if self._again.pop(key, None) is not None:
            self.add(key)

    def next_deadline(self) -> float | None:
        """Clock time of the next delayed key."""
        while self._later and self._deadline.get(self._later[0][1]) != self._later[0][0]:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    async def get(self) -> Key:
        """Wait for a key that is due. For one waiter at a time."""
        while (key := self.take()) is None:
            self._changed.clear()
            deadline = self.next_deadline()
            with contextlib.suppress(TimeoutError):
                # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self._clock())):
                    await self._changed.wait()
        return key

    async def serve(self, work: Callable[[Key], Awaitable[None]], workers: int) -> None:
        """Give keys to `work`, at most `workers` at once, until cancelled; then let those at work finish. `work` raises
        nothing.
        """
        slots = asyncio.Semaphore(workers)
        running: set[asyncio.Task[None]] = set()

        async def one(key: Key) -> None:
            try:
                await work(key)
            finally:
                self.done(key)
                slots.release()

        try:
            while True:
                # The slot first: a key that still waits in the queue takes further events in without another turn.
                await slots.acquire()
                task = asyncio.create_task(one(await self.get()))
                running.add(task)
                task.add_done_callback(running.discard)
        finally:
            if running:
                await asyncio.wait(running, timeout=STOP_SECONDS)
            for task in running:
                task.cancel()

    def _release_due(self) -> None:
        now = self._clock()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            _, key = heapq.heappop(self._later)
            del self._deadline[key]
            self.add(key)
