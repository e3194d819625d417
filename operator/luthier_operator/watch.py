"""Keeps one kind up to date in the store: lists it, then watches it from the version of the list. Decides nothing.

Jobs, JobSets and pods come by the dozen a job. kopf takes a millisecond of CPU to hand over one event, and reports
neither the end of a list nor what was deleted before it. Here both are known, because the list is the operator's own.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from luthier_api.kinds import KINDS
from luthier_operator import naming
from luthier_operator.client import ApiError, Client, Resource
from luthier_operator.kueue import WORKLOAD
from luthier_operator.model import Key, Object
from luthier_operator.store import Store

log = logging.getLogger(__name__)

SELECTOR = naming.JOB_LABEL
"""Selects the Jobs, JobSets and pods of Luthier."""
GONE = 410
"""The API server has forgotten the version that a watch was to begin with."""
SHORT_WATCH_SECONDS = 1.0
"""A watch that ends sooner without an event is not repeated at once."""

UNLABELLED = {*KINDS, WORKLOAD}
"""Kinds without our label: jobs, and Workloads, which Kueue makes."""

Touched = Callable[[set[Key], Object | None], None]
"""Called with the keys of the jobs that a change affects, and with the object that has changed, if it is one."""


def selector(kind: str) -> str:
    return "" if kind in UNLABELLED else SELECTOR


class Watch:
    """Lists and watches one kind in one namespace, or in all."""

    def __init__(
        self, client: Client, store: Store, touched: Touched, resource: Resource, namespace: str | None, pause: float
    ) -> None:
        """`pause`: seconds after an error."""
        self._client, self._store, self._touched = client, store, touched
        self._resource, self._namespace, self._pause = resource, namespace, pause
        self._selector = selector(resource.kind)

    async def serve(self, relist: float, listed: Callable[[], None]) -> None:
        """List and watch until cancelled, with a new list every `relist` seconds. `listed` is called after each list.

        Raises ApiError if the API server refuses to list or to watch: the kind may have been removed.
        """
        while True:
            version = await self.list()
            listed()
            try:
                async with asyncio.timeout(relist):
                    while version:
                        version = await self._watch(version)
            except TimeoutError:
                pass

    async def list(self) -> str:
        """Bring the store up to date, also with what was deleted. Returns the version of the list. Raises ApiError."""
        seen, version = set[str](), "0"
        async for items, listed_at in self._client.list(self._resource, self._namespace, self._selector):
            version = listed_at
            touched = set[Key]()
            for item in items:
                seen.add(item["metadata"]["uid"])
                touched |= self._store.put(item)
            self._touched(touched, None)
        self._touched(self._store.prune(self._resource.kind, self._namespace, seen, version), None)
        return version

    async def _watch(self, version: str) -> str:
        """Watch from `version` on, until the watch ends. Returns the version to go on with; empty: list again.

        Raises ApiError if the API server refuses the watch.
        """
        begin, begun_with = asyncio.get_running_loop().time(), version
        try:
            async for event, found in self._client.watch(self._resource, self._namespace, self._selector, version):
                if event == "ERROR":
                    raise ApiError(found.get("code", 0), found.get("reason", ""), found.get("message", ""))
                version = found["metadata"]["resourceVersion"]
                if event != "BOOKMARK":
                    self._deliver(event, found)
        except ApiError as error:
            if error.status == GONE:
                return ""
            if 400 <= error.status < 500 and error.status != 429:
                raise
            log.info("watch of %s: %s", self._resource.plural, error)
            await asyncio.sleep(self._pause * random.uniform(0.5, 1))
            return version
        if version == begun_with and asyncio.get_running_loop().time() - begin < SHORT_WATCH_SECONDS:
            await asyncio.sleep(self._pause * random.uniform(0.5, 1))
        return version

    def _deliver(self, event: str, found: Object) -> None:
        if event == "DELETED":
            self._touched(self._store.remove(found), None)
        else:
            self._touched(self._store.put(found), found)
