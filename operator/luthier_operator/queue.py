"""The work queue: keys of jobs without duplicates, one worker for each key, delays, and back-off after errors.

It has the rules of client-go's work queue, so that no change is lost: a key that is added while it is processed is
processed once more. The clock is a parameter, for tests.
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
from luthier_operator.settling import ACT

BACKOFF_BASE = 0.2  # seconds, after the first error
SETTLE_SECONDS_PER_KEY = 0.002  # of all that wait: events of many jobs at once arrive over a longer time, too
SETTLE_LIMIT = 0.5  # reached with 200 jobs
SETTLE_PER_SECOND = (
    10.0  # of the last decision about the key: a job of thousands of pods takes a tenth of the CPU at most
)
SETTLE_LIMIT_OF_LARGE = 5.0
STOP_SECONDS = 10.0  # for reconciles that are not finished when the operator stops
BACKOFF_LIMIT = 120.0  # an API server or a quota that comes back is noticed within two minutes


class Observer(Protocol):
    """Is notified about the queue, for metrics."""

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
        is_needed: Callable[[Key], bool] = lambda key: True,
    ) -> None:
        """`is_needed` is asked when a check is due, and must be cheap."""
        self._is_needed = is_needed
        self._clock, self._backoff, self._observer, self._jitter = clock, backoff, observer, jitter
        self._ready: OrderedDict[Key, float] = OrderedDict()  # key → when it was added
        self._settling: set[Key] = set()
        self._working: set[Key] = set()
        self._again: dict[Key, bool] = {}  # added while being processed → before all others
        self._later: list[tuple[float, Key, bool]] = []  # the last one: whether it is a check
        self._deadline: dict[Key, float] = {}  # the earliest of each key; other entries of the heap are ignored
        self._checks: dict[Key, float] = {}  # likewise
        self._failures: dict[Key, int] = {}
        self._settle: dict[Key, float] = {}  # of large jobs
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: Key, first: bool = False) -> None:
        """Process `key` as soon as possible; with `first`, before all others that wait."""
        if key in self._working:
            self._again[key] = first or self._again.get(key, False)
            return
        if key not in self._ready:
            self._ready[key] = self._clock()
            if self._observer:
                self._observer.added(len(self._ready))
            self._changed.set()
        if first:
            self._ready.move_to_end(key, last=False)

    def soon(self, key: Key, settle: float = ACT, check: bool = False) -> None:
        """Process `key` after `settle` seconds, or more while many wait, in which further events of the same cause may
        arrive. `check`: as for `add_after`.
        """
        waiting = len(self._ready) + len(self._settling)
        self._settling.add(key)
        settle = max(settle, min(SETTLE_LIMIT, ACT + SETTLE_SECONDS_PER_KEY * waiting))
        self.add_after(key, max(settle, self._settle.get(key, 0.0)), check)

    def took(self, key: Key, seconds: float) -> None:
        """Note how long the decision about `key` took. Events of a job settle in proportion to it."""
        settle = min(SETTLE_LIMIT_OF_LARGE, SETTLE_PER_SECOND * seconds)
        if settle > ACT:
            self._settle[key] = settle
        else:
            self._settle.pop(key, None)

    def add_after(self, key: Key, seconds: float, check: bool = False) -> None:
        """Process `key` after `seconds`, or earlier if it is added again. Of several times the earliest counts.

        `check`: only if it is needed by then. It neither replaces a time that is none, nor is replaced by one.
        """
        if seconds <= 0:
            self.add(key)
            return
        deadline, deadlines = self._clock() + seconds, self._deadlines(check)
        if deadline < deadlines.get(key, float("inf")):
            deadlines[key] = deadline
            heapq.heappush(self._later, (deadline, key, check))
            self._changed.set()

    def _deadlines(self, check: bool) -> dict[Key, float]:
        return self._checks if check else self._deadline

    def retry(self, key: Key) -> float:
        """Process `key` again after an error, with a delay that grows. Returns the delay in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(BACKOFF_LIMIT, self._backoff * 2.0 ** min(failures, 30)) * self._jitter()
        if self._observer:
            self._observer.retried()
        self.add_after(key, delay)
        return delay

    def forget(self, key: Key) -> None:
        """Reset the delay after errors of `key`."""
        self._failures.pop(key, None)

    def take(self) -> Key | None:
        """The key that has waited longest, or None if none is due. `done` must be called afterwards.

        It replaces what was planned for the key: whoever processes it sees all that has happened, and plans anew.
        """
        self._release_due()
        if not self._ready:
            return None
        key, since = self._ready.popitem(last=False)
        self._settling.discard(key)
        self._deadline.pop(key, None)
        self._checks.pop(key, None)
        self._working.add(key)
        if self._observer:
            self._observer.taken(self._clock() - since, len(self._ready))
        return key

    def done(self, key: Key) -> None:
        """`key`, which was taken, is processed."""
        self._working.discard(key)
        first = self._again.pop(key, None)
        if first is not None:
            self.add(key, first)

    def next_deadline(self) -> float | None:
        """Time of the next delayed key, by the clock of the queue."""
        while self._later:
            deadline, key, check = self._later[0]
            if self._deadlines(check).get(key) == deadline:
                return deadline
            heapq.heappop(self._later)
        return None

    async def get(self) -> Key:
        """Wait for a key that is due. Only one task may wait at a time."""
        while (key := self.take()) is None:
            self._changed.clear()
            deadline = self.next_deadline()
            with contextlib.suppress(TimeoutError):
                # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that comes together with the event.
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self._clock())):
                    await self._changed.wait()
        return key

    async def serve(self, work: Callable[[Key], Awaitable[None]], workers: int) -> None:
        """Call `work` with each key, at most `workers` at once, until cancelled. Running calls may then finish.

        `work` must not raise.
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
                # The slot first: further events of a key that is still in the queue are coalesced with it.
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
            _, key, check = heapq.heappop(self._later)
            del self._deadlines(check)[key]
            if not check or key in self._working or self._is_needed(key):
                self.add(key)
            elif key not in self._deadline and key not in self._ready:
                self._settling.discard(key)
