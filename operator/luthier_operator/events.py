"""Posts Kubernetes Events about jobs. A repeated event increases the count of the first one.

Best effort: events are posted by tasks of their own from a bounded queue, so that no reconcile waits for an event or
fails with one. Events of one job are posted in their order, those of different jobs at once; jobs that have ended come
first. What is dropped is counted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

from luthier_api.conditions import Reason
from luthier_operator.client import ApiError, Client
from luthier_operator.metrics import EVENTS_DROPPED, Metrics
from luthier_operator.model import Event, Object

log = logging.getLogger(__name__)

QUEUE_SIZE = 5000  # events; in a burst, further ones are dropped
AT_ONCE = 8  # requests, of the 32 that the client sends at once
POSTED_KEPT = 2000  # events whose count may still be increased
SAME_WITHIN = 600.0  # seconds in which an equal event counts as a repetition
MESSAGE_LIMIT = 1024  # the API server refuses longer ones
COMPONENT = "luthier"
HOST = socket.gethostname()
ENDS = {Reason.COMPLETED, Reason.FAILED}


@dataclass
class _Posted:
    name: str
    count: int
    at: float


@dataclass
class _Waiting:
    """The events of one job that are not posted yet."""

    about: dict[str, str]
    """The reference to the job."""
    events: deque[Event] = field(default_factory=deque)

    @property
    def has_ended(self) -> bool:
        return any(event.reason in ENDS for event in self.events)


class EventQueue:
    """Events by job. A job whose event has been taken is not taken again until `done` is called."""

    def __init__(self, size: int = QUEUE_SIZE) -> None:
        self._size = size
        self._ended: OrderedDict[str, _Waiting] = OrderedDict()  # by uid of the job, as the next one
        self._others: OrderedDict[str, _Waiting] = OrderedDict()
        self._taken: dict[str, _Waiting] = {}
        self._count = 0
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        """Events that are not posted yet, those that are being posted among them."""
        return self._count

    def put(self, about: dict[str, str], event: Event) -> tuple[dict[str, str], Event] | None:
        """Add an event. Returns the one that is dropped for it if the queue is full; ends of jobs are dropped last."""
        dropped = None
        if self._count >= self._size:
            if event.reason not in ENDS or not self._others:
                return about, event
            dropped = self._drop_oldest()
        uid = about["uid"]
        waiting = self._taken.get(uid) or self._ended.get(uid) or self._others.get(uid) or _Waiting(about)
        waiting.events.append(event)
        self._count += 1
        self._empty.clear()
        in_its_place = uid in self._others and event.reason not in ENDS
        if not (in_its_place or uid in self._taken or uid in self._ended):
            self._others.pop(uid, None)
            self._insert(waiting)
        return dropped

    async def take(self) -> tuple[dict[str, str], Event]:
        """The next event, and the job that it is about."""
        while not (queue := self._ended or self._others):
            self._changed.clear()
            await self._changed.wait()
        uid, waiting = queue.popitem(last=False)
        self._taken[uid] = waiting
        return waiting.about, waiting.events.popleft()

    def done(self, uid: str) -> None:
        """The event that was taken of this job is posted, or cannot be."""
        waiting = self._taken.pop(uid)
        self._count -= 1
        if waiting.events:
            self._insert(waiting)
        if not self._count:
            self._empty.set()

    async def join(self) -> None:
        """Wait until all events are posted."""
        await self._empty.wait()

    def _insert(self, waiting: _Waiting) -> None:
        queue = self._ended if waiting.has_ended else self._others
        queue[waiting.about["uid"]] = waiting
        self._changed.set()

    def _drop_oldest(self) -> tuple[dict[str, str], Event]:
        uid, waiting = next(iter(self._others.items()))
        self._count -= 1
        event = waiting.events.popleft()
        if not waiting.events:
            del self._others[uid]
        return waiting.about, event


class Recorder:
    """Queues events, and posts them."""

    def __init__(self, client: Client, metrics: Metrics) -> None:
        self._client, self._metrics = client, metrics
        self._queue = EventQueue()
        self._posted: OrderedDict[tuple[str, Event], _Posted] = OrderedDict()

    def record(self, job: Object, event: Event) -> None:
        """Queue an event about `job`, which is the object as the API server sent it."""
        meta = job["metadata"]
        about = {"apiVersion": job["apiVersion"], "kind": job["kind"]}
        about |= {name: meta[name] for name in ("namespace", "name", "uid")}
        if dropped := self._queue.put(about, event):
            self._report_dropped(*dropped, "there are too many")

    async def serve(self) -> None:
        """Post until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(self._serve())

    async def flush(self, seconds: float) -> None:
        """Wait until the queued events are posted, at most `seconds`."""
        try:
            await asyncio.wait_for(self._queue.join(), seconds)
        except TimeoutError:
            self._metrics.add(EVENTS_DROPPED, len(self._queue))
            log.warning("%d events were not posted", len(self._queue))

    async def _serve(self) -> None:
        while True:
            about, event = await self._queue.take()
            try:
                await self._post(about, event)
            except ApiError as error:
                self._report_dropped(about, event, str(error))
            finally:
                self._queue.done(about["uid"])

    def _report_dropped(self, about: dict[str, str], event: Event, why: str) -> None:
        self._metrics.add(EVENTS_DROPPED, 1)
        where = f"{about['namespace']}/{about['name']}"
        log.warning("an event about %s was not posted: %s: %s: %s", where, why, event.reason, event.message)

    async def _post(self, about: dict[str, str], event: Event) -> None:
        """Raises ApiError."""
        namespace, clock = about["namespace"], asyncio.get_running_loop().time()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = (about["uid"], event)
        posted = self._posted.get(line)
        if posted is not None and clock - posted.at < SAME_WITHIN:
            posted.count += 1
            try:
                await self._client.patch("Event", namespace, posted.name, {"count": posted.count, "lastTimestamp": now})
                return
            except ApiError as error:
                if error.status != 404:  # the API server deletes events after an hour
                    raise
        name = f"{about['name']}.{uuid4().hex[:16]}"
        await self._client.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": namespace},
                "involvedObject": about,
                "type": event.type,
                "reason": event.reason,
                "message": event.message[:MESSAGE_LIMIT],
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
                "source": {"component": COMPONENT},
                "reportingComponent": COMPONENT,
                "reportingInstance": HOST,
            }
        )
        self._posted[line] = _Posted(name, 1, clock)
        while len(self._posted) > POSTED_KEPT:
            self._posted.popitem(last=False)
