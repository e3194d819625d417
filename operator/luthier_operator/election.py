"""Which of several operators works: the one that holds the Lease. The others stand by, and ask the API server for
nothing else.

The rules are client-go's. The official client's own election cannot make a Lease (37.0.0: its call refuses its own
argument), has no end for a request that hangs, and never gives a Lease back. No clock is compared with another
machine's: a Lease has run out when nobody has written it for as long as it says, seen from here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from luthier_operator.client import RESOURCES, ApiError, Client
from luthier_operator.model import Object

log = logging.getLogger(__name__)

# Seconds, as Kubernetes' own controllers have them. Whoever cannot renew is gone before another one begins: the last
# attempt begins RENEW_WITHIN + RETRY after the last renewal at the latest, and takes RETRY at most.
DURATION, RENEW_WITHIN, RETRY = 15.0, 10.0, 2.0
CONFLICT = 409


class LeaseLost(Exception):
    """Another operator may be at work from now on."""


class Election:
    """One candidate for a Lease."""

    def __init__(
        self,
        client: Client,
        lease: str,
        identity: str,
        duration: float = DURATION,
        renew_within: float = RENEW_WITHIN,
        retry: float = RETRY,
    ) -> None:
        """`client` is nobody else's: a renewal waits for no other request. `lease`: NAMESPACE/NAME. Two processes with
        one `identity` would both lead; one that starts again under its own goes on at once.
        """
        assert renew_within + 2 * retry < duration, "it would lead on beside the next one"
        self.lease, self.leads, self.follows = lease, False, False
        self._client, self._identity = client, identity
        self._duration, self._renew_within, self._retry = duration, renew_within, retry
        self._namespace, _, self._name = lease.partition("/")
        self._mine: Object | None = None
        self._renewed = 0.0
        self._version, self._seen_at, self._holder = "", 0.0, ""

    async def win(self) -> None:
        """Return once this one leads."""
        while not await self._attempt():
            await asyncio.sleep(self._retry)
        self.leads, self.follows = True, False

    async def hold(self) -> None:
        """Lead for as long as the Lease can be renewed. Raises LeaseLost."""
        while self.leads:
            await asyncio.sleep(self._retry)
            if not await self._attempt():
                self.leads = not self.follows and time.monotonic() - self._renewed <= self._renew_within
        raise LeaseLost(f"{self.lease}: {f'{self._holder} has taken it' if self.follows else 'not renewed in time'}")

    async def leave(self) -> None:
        """Give back what is held, so that the next one need not wait until it runs out."""
        try:
            async with asyncio.timeout(self._retry):
                # Looked at once more: a renewal may have been under way when this one was stopped.
                found = await self._look() if self.leads else None
                if found and found["spec"].get("holderIdentity") == self._identity:
                    await self._write(found, {"holderIdentity": None, "leaseDurationSeconds": 1})
        except (ApiError, TimeoutError) as error:
            log.warning("the Lease %s is not given back: %s", self.lease, error)
        finally:
            self.leads = False
            await self._client.close()

    async def _attempt(self) -> bool:
        """Take or renew the Lease where that may be. Whether it is ours now."""
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._retry):
                ours = await self._take(self._mine or await self._look())
        except (ApiError, TimeoutError) as error:
            self._mine = None  # if it was written, the next look shows it
            faster = isinstance(error, ApiError) and error.status == CONFLICT
            log.log(
                logging.DEBUG if faster else logging.WARNING, "the Lease %s: %s", self.lease, str(error) or "no answer"
            )
            return False
        if ours:
            self._renewed = begin  # the others may count from then: the answer came later
        return ours

    async def _look(self) -> Object | None:
        """The Lease as it is now; None where there is none."""
        try:
            found = await self._client.get(RESOURCES["Lease"].path(self._namespace, self._name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        if found["metadata"]["resourceVersion"] != self._version:
            self._version, self._seen_at = found["metadata"]["resourceVersion"], time.monotonic()
        return found

    async def _take(self, found: Object | None) -> bool:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours = {"holderIdentity": self._identity, "leaseDurationSeconds": round(self._duration), "renewTime": now}
        if found is None:
            meta = {"namespace": self._namespace, "name": self._name}
            lease = {
                "apiVersion": RESOURCES["Lease"].api_version,
                "kind": "Lease",
                "metadata": meta,
                "spec": ours | {"acquireTime": now},
            }
            self._mine = await self._client.create(lease)
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
            ours |= {"acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", 0) + 1}
        self._mine = await self._write(found, ours)
        return True

    async def _write(self, found: Object, spec: Object) -> Object:
        """Raises ApiError 409 where somebody has written it since `found`."""
        patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "spec": spec}
        return await self._client.patch("Lease", self._namespace, self._name, patch)
