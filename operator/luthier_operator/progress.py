"""Reads the metrics of running pods into the store, so that `kubectl get` shows the progress of jobs.

Pods belong to users: one may serve megabytes, answer slowly or not at all. Each reading is therefore bounded in bytes
and time, each job and each namespace has a few slots of its own, and a pod that cannot be read is read less and less
often. The more jobs run, the longer is the interval between two readings of each, so that reading takes a bounded part
of the operator's time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import aiohttp

from luthier_api.metrics import HEARTBEAT_AGE, read_samples
from luthier_api.run import METRICS_PORT
from luthier_operator import naming
from luthier_operator.children import index
from luthier_operator.metrics import PROGRESS_INTERVAL, PROGRESS_READS, Metrics
from luthier_operator.model import Key, Object, Silence
from luthier_operator.ownership import Owner
from luthier_operator.store import Store
from luthier_operator.workloads import WORKLOADS

log = logging.getLogger(__name__)

# Readings under way: of all pods, of those of a namespace, of those of a job. A NetworkPolicy that keeps the operator
# from all pods of a namespace, or a job whose shards hang, holds only its own slots.
AT_ONCE, AT_ONCE_OF_NAMESPACE, AT_ONCE_OF_JOB = 32, 12, 4
TIMEOUT = aiohttp.ClientTimeout(total=3, sock_connect=1)
TEXT_LIMIT = 32 * 1024  # bytes. The trainer serves 10 kB
# A reading takes 2 ms of the CPU, and the status that follows from it 5 to 10 ms.
JOBS_PER_SECOND, PODS_PER_SECOND = 20.0, 100.0
LONGEST_PAUSE = 240.0  # seconds until a pod that cannot be read is tried again


class Unreadable(Exception):
    """The metrics of a pod could not be read. `result` is the label of the counter."""

    def __init__(self, result: str, detail: str) -> None:
        super().__init__(detail)
        self.result = result


@dataclass
class PodReadings:
    """How the readings of one pod went. Times are those of the scraper's clock."""

    tried_at: float = 0.0
    answered_at: float | None = None
    """When it last answered, or first let a reading time out. A pod that refuses the connection is still starting."""
    failures: int = 0
    due: float = 0.0

    def answered(self, now: float, samples: Mapping[str, float]) -> Silence:
        self.failures, self.answered_at = 0, now
        return Silence(samples.get(HEARTBEAT_AGE.name, 0.0))

    def failed(self, now: float, interval: float, error: Unreadable) -> Silence | None:
        """Read it again later, and the later the more often this happens."""
        self.due = now + min(LONGEST_PAUSE, interval * 2.0 ** max(0, self.failures - 1))
        self.failures += 1
        if self.answered_at is None and error.result == "timeout":
            self.answered_at = now
        return None if self.answered_at is None else Silence(now - self.answered_at, str(error))


def pod_url(pod: Object) -> str:
    """Address of the metrics of a running pod."""
    address = pod["status"]["podIP"]
    if ":" in address:  # IPv6
        address = f"[{address}]"
    return f"http://{address}:{METRICS_PORT}/metrics"


class Scraper:
    def __init__(
        self,
        store: Store,
        enqueue: Callable[[Key], None],
        metrics: Metrics,
        every: float,
        url: Callable[[Object], str] = pod_url,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every`: seconds between two readings of a job while few jobs run. `url` maps a running pod to the address of
        its metrics.
        """
        self._store, self._enqueue, self._metrics, self._url, self._clock = store, enqueue, metrics, url, clock
        self.every = every
        self._known: dict[str, PodReadings] = {}  # by uid
        self._reading: dict[Owner, asyncio.Task[None]] = {}
        self._all = asyncio.Semaphore(AT_ONCE)
        self._of_namespace: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(AT_ONCE_OF_NAMESPACE)
        )

    async def serve(self) -> None:
        """Read until cancelled."""
        connector = aiohttp.TCPConnector(limit=AT_ONCE, force_close=True)  # a pod is not asked again for a while
        async with aiohttp.ClientSession(
            timeout=TIMEOUT,
            trust_env=False,
            connector=connector,
            auto_decompress=False,  # a few bytes could become gigabytes
            headers={"Accept-Encoding": "identity"},
        ) as session:
            try:
                while True:
                    await self._round(session)
            finally:
                for task in self._reading.values():
                    task.cancel()
                await asyncio.gather(*self._reading.values(), return_exceptions=True)

    async def _round(self, session: aiohttp.ClientSession) -> None:
        """Begin to read each job once, evenly over an interval. A job that is still being read is left out."""
        pods_of_job = self._count_pods()
        interval = max(self.every, len(pods_of_job) / JOBS_PER_SECOND)
        self._metrics.set(PROGRESS_INTERVAL, interval)
        most = fair_share(pods_of_job.values(), int(PODS_PER_SECOND * interval))
        if not pods_of_job:
            await asyncio.sleep(interval)
        for owner in pods_of_job:
            await asyncio.sleep(interval / len(pods_of_job))
            if owner not in self._reading:
                reading = asyncio.create_task(self._read_job(session, owner, self._due(owner)[:most], interval))
                self._reading[owner] = reading
                reading.add_done_callback(functools.partial(self._has_read, owner))

    def _count_pods(self) -> dict[Owner, int]:
        """How many pods of each job serve progress. What is known about other pods is forgotten."""
        serving = [(owner, pod) for owner, pod in self._store.pods() if serves_progress(owner.key, pod)]
        known = {pod["metadata"]["uid"]: self._known.get(pod["metadata"]["uid"]) for _, pod in serving}
        self._known = {uid: about for uid, about in known.items() if about}
        for namespace in self._of_namespace.keys() - {owner.key.namespace for owner, _ in serving}:
            del self._of_namespace[namespace]
        return Counter(owner for owner, _ in serving)

    def _due(self, owner: Owner) -> list[Object]:
        """The pods that may be read now. Those that were not read for the longest time come first."""
        now, due = self._clock(), []
        for pod in self._store.pods_of(owner):
            about = self._known.setdefault(pod["metadata"]["uid"], PodReadings())
            if about.due <= now and serves_progress(owner.key, pod):
                due.append((about.tried_at, pod))
        return [pod for _, pod in sorted(due, key=lambda pair: pair[0])]

    def _has_read(self, owner: Owner, reading: asyncio.Task[None]) -> None:
        del self._reading[owner]
        if not reading.cancelled() and (error := reading.exception()):
            log.error("the metrics of %s could not be read", owner.key, exc_info=error)

    async def _read_job(
        self, session: aiohttp.ClientSession, owner: Owner, pods: list[Object], interval: float
    ) -> None:
        """Read `pods` of one job, and reconcile it."""
        slots = asyncio.Semaphore(AT_ONCE_OF_JOB)
        samples: dict[int, dict[str, float]] = {}
        silences: dict[str, Silence] = {}

        async def one(pod: Object) -> None:
            uid = pod["metadata"]["uid"]
            about, result = self._known.setdefault(uid, PodReadings()), "ok"
            try:
                async with slots, self._of_namespace[owner.key.namespace], self._all:
                    found = await self._read(session, pod)
                samples[index(pod)] = found
                silences[uid] = about.answered(self._clock(), found)
            except Unreadable as error:
                result = error.result
                silence = about.failed(self._clock(), interval, error)
                if silence:
                    silences[uid] = silence
                log.debug("metrics of %s: %s: %s", pod["metadata"]["name"], result, error)
            about.tried_at = self._clock()
            self._metrics.add(PROGRESS_READS, 1, result)

        await asyncio.gather(*(one(pod) for pod in pods))
        if samples or silences:
            if samples:
                self._store.put_samples(owner, samples)
            self._store.put_silences(owner, silences)
            self._enqueue(owner.key)

    async def _read(self, session: aiohttp.ClientSession, pod: Object) -> dict[str, float]:
        """The samples of a pod, empty while it has none. Raises Unreadable."""
        try:
            # Not allowed, because the pod of a user could redirect the operator to any address inside the cluster.
            async with session.get(self._url(pod), allow_redirects=False) as response:
                if response.status != 200:
                    raise Unreadable("refused", f"status {response.status}")
                text = bytearray()
                async for chunk in response.content.iter_chunked(TEXT_LIMIT):
                    text += chunk
                    if len(text) > TEXT_LIMIT:
                        raise Unreadable("too_large", f"more than {TEXT_LIMIT} bytes")
                return read_samples(text.decode())
        except TimeoutError as error:
            raise Unreadable("timeout", "no answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreadable("unreachable", repr(error)) from error
        except ValueError as error:
            raise Unreadable("invalid", repr(error)) from error


def fair_share(wanted: Iterable[int], budget: int) -> int:
    """The largest limit for each so that all together stay within `budget`; at least 1.

    Those that want less leave their rest to the others.
    """
    ascending = sorted(wanted)
    for position, want in enumerate(ascending):
        left = len(ascending) - position
        if want * left > budget:
            return max(1, budget // left)
        budget -= want
    return max(ascending, default=1)


def serves_progress(key: Key, pod: Object) -> bool:
    """Whether progress is read from this pod."""
    meta, status = pod["metadata"], pod.get("status", {})
    return (
        meta["labels"].get(naming.PHASE_LABEL) == "run"
        and status.get("phase") == "Running"
        and bool(status.get("podIP"))
        and not meta.get("deletionTimestamp")
        and WORKLOADS[key.kind].serves_progress(index(pod))
    )
