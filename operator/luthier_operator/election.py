"""Leader election: of several replicas only the holder of the Lease works. The others read nothing but the Lease.

The rules are those of client-go. The election of the official Python client cannot create a Lease (37.0.0 refuses its
own argument), has no timeout for requests, and never releases a Lease. Clocks of machines are not compared: a Lease has
expired if this process has not seen it change for the duration that it names.

The requests are made by a thread of its own, with an event loop and a connection of its own: in a burst of jobs the
operator's event loop is late by seconds, and the Lease would be lost although nothing is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from luthier_operator.client import RESOURCES, ApiError, Client
from luthier_operator.model import Object

log = logging.getLogger(__name__)

# Seconds, as in Kubernetes' own controllers: how long a Lease lasts, how soon after the last renewal the leader must
# have renewed it again, and the pause between two renewals.
DURATION, RENEW_WITHIN, RETRY = 15.0, 10.0, 2.0
# One attempt may take so long. In a burst of 1,000 jobs, answers took 3 s. A second attempt still fits into the window,
# for the case that the connection of the first one is dead.
ATTEMPT = 5.0
PAUSE_AFTER_FAILURE = 0.5
CONFLICT = 409


class LeaseLost(Exception):
    """This replica is no longer the leader; another one may be working."""


def exit_at_once(reason: str) -> None:
    """End the process without any clean-up: another replica may begin a few seconds later."""
    log.error("the Lease is lost, and this process ends: %s", reason)
    os._exit(1)


class Election:
    """One candidate for a Lease."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Client]],
        lease: str,
        identity: str,
        lost: Callable[[str], None] = exit_at_once,
        duration: float = DURATION,
        renew_within: float = RENEW_WITHIN,
        attempt: float = ATTEMPT,
        retry: float = RETRY,
    ) -> None:
        """`connect` is awaited in the thread of the election, and makes its client. `lease`: NAMESPACE/NAME. `lost` is
        called by that thread with the reason.

        Two processes with the same `identity` would both be leaders. A process that restarts with its own continues.
        """
        assert retry + attempt < renew_within < duration, "a leader must stop before the next one starts"
        self.lease, self.leads, self.follows = lease, False, False
        self._connect, self._identity, self._lost = connect, identity, lost
        self._duration, self._renew_within = duration, renew_within
        self._longest_attempt, self._retry = attempt, retry
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lease", daemon=True)
        self._client: Client | None = None
        self._namespace, _, self._name = lease.partition("/")
        self._mine: Object | None = None
        self._renewed = 0.0
        self._version, self._seen_at, self._holder = "", 0.0, ""

    def holds(self) -> bool:
        """Whether this replica is the leader at this moment, by the clock: no other one has begun. For any thread."""
        return self.leads and self._left() > 0

    async def win(self) -> None:
        """Return once this replica is the leader."""
        self._thread.start()
        await self._in_thread(self._win())

    async def hold(self) -> None:
        """Renew the Lease. Raises LeaseLost when that is not possible."""
        await self._in_thread(self._hold())

    async def leave(self) -> None:
        """Release the Lease, so that the next leader need not wait until it expires. The last call."""
        await self._in_thread(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the thread

    def _in_thread(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _win(self) -> None:
        self._client = await self._connect()
        while not await self._attempt(self._longest_attempt):
            await asyncio.sleep(self._retry)
        self.leads, self.follows = True, False

    async def _hold(self) -> None:
        """Renew the Lease. Raises LeaseLost."""
        while True:
            # From the begin of the last attempt, so that a slow answer does not take from the time of the next one.
            await asyncio.sleep(max(0.0, self._renewed + self._retry - time.monotonic()))
            # A process that slept wakes here with an open connection: a request would leave before its timeout ends.
            while self._left() <= 0 or not await self._attempt(min(self._longest_attempt, self._left())):
                if self.follows or self._left() <= 0:
                    self.leads = False
                    reason = f"{self._holder} has taken it" if self.follows else "not renewed in time"
                    self._lost(f"{self.lease}: {reason}")
                    raise LeaseLost(f"{self.lease}: {reason}")
                await asyncio.sleep(min(PAUSE_AFTER_FAILURE, self._left()))

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(self._retry):
                # Read again, because a renewal may have been sent when this process was stopped.
                found = await self._read() if self.leads else None
                if found and found["spec"].get("holderIdentity") == self._identity:
                    await self._write(found, {"holderIdentity": None, "leaseDurationSeconds": 1})
        except (ApiError, TimeoutError) as error:
            log.warning("the Lease %s was not released: %s", self.lease, error)
        finally:
            self.leads = False
            if self._client:
                await self._client.close()

    def _left(self) -> float:
        """Seconds in which the Lease must be renewed. Not positive: this replica is no leader any more."""
        return self._renewed + self._renew_within - time.monotonic()

    async def _attempt(self, limit: float) -> bool:
        """Acquire or renew the Lease within `limit` seconds, if possible. Returns whether this replica holds it."""
        begin = time.monotonic()
        try:
            async with asyncio.timeout(limit):
                held = await self._take(self._mine or await self._read())
        except (ApiError, TimeoutError) as error:
            self._mine = None  # the write may have succeeded: read it again next time
            faster = isinstance(error, ApiError) and error.status == CONFLICT
            log.log(
                logging.DEBUG if faster else logging.WARNING, "the Lease %s: %s", self.lease, str(error) or "no answer"
            )
            return False
        if held:
            self._renewed = begin  # not the time of the answer: the others may have seen the renewal earlier
        return held

    @property
    def _api(self) -> Client:
        assert self._client, "`win` comes first"
        return self._client

    async def _read(self) -> Object | None:
        """Read the Lease. None if it does not exist. Raises ApiError."""
        try:
            found = await self._api.get(RESOURCES["Lease"].path(self._namespace, self._name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        if found["metadata"]["resourceVersion"] != self._version:
            self._version, self._seen_at = found["metadata"]["resourceVersion"], time.monotonic()
        return found

    async def _take(self, found: Object | None) -> bool:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec_of_holder = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": round(self._duration),
            "renewTime": now,
        }
        if found is None:
            meta = {"namespace": self._namespace, "name": self._name}
            lease = {
                "apiVersion": RESOURCES["Lease"].api_version,
                "kind": "Lease",
                "metadata": meta,
                "spec": spec_of_holder | {"acquireTime": now},
            }
            self._mine = await self._api.create(lease)
            return True
        spec = found["spec"]
        holder = spec.get("holderIdentity") or ""
        runs_out = self._seen_at + spec.get("leaseDurationSeconds", self._duration)
        if holder not in ("", self._identity) and time.monotonic() < runs_out:
            if holder != self._holder:
                log.info("%s holds the Lease %s", holder, self.lease)
            self._holder, self.follows = holder, True
            return False
        if holder != self._identity:
            spec_of_holder |= {"acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", 0) + 1}
        self._mine = await self._write(found, spec_of_holder)
        return True

    async def _write(self, found: Object, spec: Object) -> Object:
        """Write the Lease. Raises ApiError 409 if it was changed since `found` was read."""
        patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "spec": spec}
        return await self._api.patch("Lease", self._namespace, self._name, patch)
