"""Reads the metrics of running pods into the store, so that `kubectl get` shows the progress of jobs.

A pod that cannot be read is read again in the next round; that is no error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from luthier_api.metrics import read_samples
from luthier_api.run import METRICS_PORT
from luthier_operator import naming
from luthier_operator.children import index
from luthier_operator.model import Key, Object
from luthier_operator.store import Owner, Store
from luthier_operator.workloads import WORKLOADS

log = logging.getLogger(__name__)

AT_ONCE = 32
TIMEOUT = aiohttp.ClientTimeout(total=3)
TEXT_LIMIT = 1 << 20  # bytes. The trainer serves 10 kB; a pod of a user must not fill the operator's memory


def pod_url(pod: Object) -> str:
    """Address of the metrics of a running pod."""
    address = pod["status"]["podIP"]
    if ":" in address:  # IPv6
        address = f"[{address}]"
    return f"http://{address}:{METRICS_PORT}/metrics"


class Scraper:
    def __init__(
        self, store: Store, enqueue: Callable[[Key], None], every: float, url: Callable[[Object], str] = pod_url
    ) -> None:
        """`url` maps a running pod to the address of its metrics."""
        self._store, self._enqueue, self._every, self._url = store, enqueue, every, url

    async def serve(self) -> None:
        """Read until cancelled."""
        async with aiohttp.ClientSession(timeout=TIMEOUT, trust_env=False) as session:
            while True:
                await asyncio.sleep(self._every)
                await self.read_all(session)

    async def read_all(self, session: aiohttp.ClientSession) -> None:
        """Read the metrics of all pods that serve progress, and reconcile their jobs."""
        slots = asyncio.Semaphore(AT_ONCE)
        found: dict[Owner, dict[int, dict[str, float]]] = {}

        async def one(owner: Owner, pod: Object) -> None:
            async with slots:
                samples = await self._read(session, pod)
            if samples:
                found.setdefault(owner, {})[index(pod)] = samples

        await asyncio.gather(*(one(owner, pod) for owner, pod in self._store.pods() if serves_progress(owner.key, pod)))
        for owner, samples in found.items():
            self._store.put_samples(owner, samples)
            self._enqueue(owner.key)

    async def _read(self, session: aiohttp.ClientSession, pod: Object) -> dict[str, float]:
        """The samples of a pod. Empty if it cannot be read."""
        name = pod["metadata"]["name"]
        try:
            # Not allowed, because the pod of a user could redirect the operator to any address inside the cluster.
            async with session.get(self._url(pod), allow_redirects=False) as response:
                response.raise_for_status()
                text = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    text += chunk
                    if len(text) > TEXT_LIMIT:
                        log.debug("metrics of %s: more than %d bytes", name, TEXT_LIMIT)
                        return {}
                return read_samples(text.decode())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            log.debug("metrics of %s: %r", name, error)
            return {}


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
