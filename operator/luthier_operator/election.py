"""Leader election: of several replicas only the holder of the Lease works. The others read nothing but the Lease.

The rules are those of client-go. The election of the official Python client cannot create a Lease (37.0.0 refuses its
own argument), has no timeout for requests, and never releases a Lease. Clocks of machines are not compared: a Lease has
expired if this process has not seen it change for the duration that it names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from luthier_operator.client import RESOURCES, ApiError, Client
from luthier_operator.model import Object

log = logging.getLogger(__name__)

# Seconds, as in Kubernetes' own controllers. A leader that cannot renew stops before another one starts: its last
# attempt
# begins at most RENEW_WITHIN + RETRY after the last renewal, and takes at most RETRY.
DURATION, RENEW_WITHIN, RETRY = 15.0, 10.0, 2.0
CONFLICT = 409


class LeaseLost(Exception):
    """This replica is no longer the leader; another one may be working."""


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
        """`client` must not be shared, so that a renewal never waits for another request. `lease`: NAMESPACE/NAME.

        Two processes with the same `identity` would both be leaders. A process that restarts with its own continues.
        """
        assert renew_within + 2 * retry < duration, "a leader must stop before the next one starts"
        self.lease, self.leads, self.follows = lease, False, False
        self._client, self._identity = client, identity
        self._duration, self._renew_within, self._retry = duration, renew_within, retry
        self._namespace, _, self._name = lease.partition("/")
        self._mine: Object | None = None
        self._renewed = 0.0
        self._version, self._seen_at, self._holder = "", 0.0, ""

    async def win(self) -> None:
        """Return once this replica is the leader."""
        while not await self._attempt():
            await asyncio.sleep(self._retry)
        self.leads, self.follows = True, False

    async def hold(self) -> None:
        """Renew the Lease. Raises LeaseLost when that is not possible."""
        while self.leads:
            await asyncio.sleep(self._retry)
            if not await self._attempt():
                self.leads = not self.follows and time.monotonic() - self._renewed <= self._renew_within
        reason = f"{self._holder} has taken it" if self.follows else "not renewed in time"
        raise LeaseLost(f"{self.lease}: {reason}")

    async def leave(self) -> None:
        """Release the Lease, so that the next leader need not wait until it expires."""
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
            await self._client.close()

    async def _attempt(self) -> bool:
        """Acquire or renew the Lease, if possible. Returns whether this replica holds it."""
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._retry):
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

    async def _read(self) -> Object | None:
        """Read the Lease. None if it does not exist. Raises ApiError."""
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
            spec_of_holder |= {"acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", 0) + 1}
        self._mine = await self._write(found, spec_of_holder)
        return True

    async def _write(self, found: Object, spec: Object) -> Object:
        """Write the Lease. Raises ApiError 409 if it was changed since `found` was read."""
        patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "spec": spec}
        return await self._client.patch("Lease", self._namespace, self._name, patch)
