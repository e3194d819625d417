"""Namespaces that are being deleted: nothing is created there, and what would keep them for ever is deleted.

Kubernetes deletes the pods of a namespace before everything else. A Job with `backoffLimitPerIndex` holds the last
failed pod of each index, by a finalizer, until it has created the next one, which such a namespace refuses. Only the
deletion of the Job lets the pod go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from luthier_operator import naming
from luthier_operator.client import Client
from luthier_operator.model import Key
from luthier_operator.store import Store

log = logging.getLogger(__name__)

TERMINATING_SECONDS = 30.0  # until a namespace that is being deleted is tried again
ASK_SECONDS = 10.0
"""In a healthy namespace a pod that was deleted stays for as long as its Job delays the next one. The API server is
asked at most so often for all jobs of a namespace, and less often about a pod that stays for longer.
"""
ASK_SELDOM_SECONDS = 300.0


class Namespaces:
    """What the API server's answers say about namespaces. Nothing else does: a mistake would delete the work of jobs
    that are well.
    """

    def __init__(self, store: Store, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._client, self._clock = store, client, clock
        self._refuses: dict[str, float] = {}  # namespace → until when nothing is created there
        self._asked: dict[str, float] = {}  # namespace → when the API server was last asked whether it is deleted

    def refused(self, namespace: str) -> float:
        """The API server refuses to create anything there. Returns the seconds in which nothing is tried."""
        self._refuses[namespace] = self._clock() + TERMINATING_SECONDS
        return TERMINATING_SECONDS

    def accepted(self, namespace: str) -> None:
        """Something was created there: if it was being deleted before, there is a new one of this name."""
        self._refuses.pop(namespace, None)

    def seconds_to_wait(self, namespace: str) -> float:
        """Seconds in which nothing is tried in a namespace that is being deleted. After them one job tries again, and
        the others wait for what it finds: they are due at the same moment.
        """
        if namespace not in self._refuses:
            return 0.0
        left = self._refuses[namespace] - self._clock()
        if left <= 0:
            self.refused(namespace)
        return left

    async def let_go(self, key: Key) -> bool:
        """Delete the children of a job that hold pods which were deleted, if its namespace is being deleted.

        The children are known before the API server is asked. So they are those of the namespace that it answers for,
        and not of a later one of this name. Returns whether there was one to delete. Raises ApiError.
        """
        keepers = self._store.keepers(key)
        if not keepers or self._was_asked_lately(key.namespace):
            return False
        self._asked[key.namespace] = self._clock()  # also for the workers that come before the answer
        if not await self._client.is_terminating(key.namespace, naming.stem(key.kind, key.name)):
            return False
        self.refused(key.namespace)
        for child in keepers:
            log.info(
                "namespace %s is being deleted: %s %s is deleted, because it holds pods that have ended",
                key.namespace,
                child["kind"],
                child["metadata"]["name"],
            )
            left = await self._client.delete(child, "Background")  # nothing of its name can follow here
            if left:
                self._store.put(left)
            else:
                self._store.remove(child)
        return True

    def ask_again(self, key: Key) -> float | None:
        """Seconds until `let_go` should be called again without an event. None if no pod is held."""
        age = self._store.seconds_held(key)
        return None if age is None else min(max(age, ASK_SECONDS), ASK_SELDOM_SECONDS)

    def _was_asked_lately(self, namespace: str) -> bool:
        """Not of a namespace that was being deleted: each job asks for itself before it deletes anything."""
        asked = self._asked.get(namespace)
        return asked is not None and namespace not in self._refuses and self._clock() < asked + ASK_SECONDS
