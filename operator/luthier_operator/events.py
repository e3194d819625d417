"""Posts Kubernetes Events about jobs. A repeated event increases the count of the first one.

Best effort: events are posted by a task of their own from a bounded queue, so that no reconcile waits for an event or
fails with one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from luthier_operator.client import ApiError, Client
from luthier_operator.model import Event, Object

log = logging.getLogger(__name__)

QUEUE_SIZE = 1000  # further events are dropped
POSTED_KEPT = 2000  # events whose count may still be increased
SAME_WITHIN = 600.0  # seconds in which an equal event counts as a repetition
MESSAGE_LIMIT = 1024  # the API server refuses longer ones
COMPONENT = "luthier"


@dataclass
class _Posted:
    name: str
    count: int
    at: float


class Recorder:
    """Queues events, and posts them one after another."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: asyncio.Queue[tuple[Object, Event]] = asyncio.Queue(QUEUE_SIZE)
        self._posted: OrderedDict[tuple[str, Event], _Posted] = OrderedDict()

    def record(self, job: Object, event: Event) -> None:
        """Queue an event about `job`, which is the object as the API server sent it."""
        try:
            self._waiting.put_nowait((job, event))
        except asyncio.QueueFull:
            log.warning("event dropped: %s %s: %s", job["metadata"]["name"], event.reason, event.message)

    async def serve(self) -> None:
        """Post until cancelled."""
        while True:
            job, event = await self._waiting.get()
            try:
                await self._post(job, event)
            except ApiError as error:
                log.warning("event not posted: %s %s: %s", job["metadata"]["name"], event.reason, error)
            finally:
                self._waiting.task_done()

    async def flush(self, seconds: float) -> None:
        """Wait until the queued events are posted, at most `seconds`."""
        try:
            await asyncio.wait_for(self._waiting.join(), seconds)
        except TimeoutError:
            log.warning("%d events were not posted", self._waiting.qsize())

    async def _post(self, job: Object, event: Event) -> None:
        meta, clock = job["metadata"], asyncio.get_running_loop().time()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = (meta["uid"], event)
        posted = self._posted.get(line)
        if posted is not None and clock - posted.at < SAME_WITHIN:
            posted.count += 1
            try:
                await self._client.patch(
                    "Event", meta["namespace"], posted.name, {"count": posted.count, "lastTimestamp": now}
                )
                return
            except ApiError as error:
                if error.status != 404:  # the API server deletes events after an hour
                    raise
        name = f"{meta['name']}.{uuid4().hex[:16]}"
        about = {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
        }
        await self._client.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": meta["namespace"]},
                "involvedObject": about,
                "type": event.type,
                "reason": event.reason,
                "message": event.message[:MESSAGE_LIMIT],
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
                "source": {"component": COMPONENT},
                "reportingComponent": COMPONENT,
                "reportingInstance": socket.gethostname(),
            }
        )
        self._posted[line] = _Posted(name, 1, clock)
        while len(self._posted) > POSTED_KEPT:
            self._posted.popitem(last=False)
