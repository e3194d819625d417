"""Reconciles one job: observe → `decide` → write the status, if it has changed → post events → delete and create
children.

After any error the job goes back into the queue. Every step may be repeated from the beginning, also by another process
that knows nothing of this one.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import msgspec

from luthier_api.conditions import ConditionType, Reason
from luthier_api.decides import urgent_part
from luthier_api.kinds import KINDS
from luthier_api.ruleset import WRITES
from luthier_api.status import PHASES, JobStatus
from luthier_api.stored import NotUnderstood, read_stored
from luthier_operator import naming
from luthier_operator.children import NO_SCHEDULER_SECONDS, pods_at_once
from luthier_operator.client import NAMESPACE_TERMINATING, RESOURCES, ApiError, Client
from luthier_operator.decide import decide, held, refused, with_events
from luthier_operator.events import Recorder
from luthier_operator.kept import version
from luthier_operator.metrics import Metrics
from luthier_operator.model import ChildRef, Decision, Event, Key, Object, Observed
from luthier_operator.namespaces import TERMINATING_SECONDS, Namespaces
from luthier_operator.phases.waiting import NO_POD_SECONDS, in_turn
from luthier_operator.queue import Queue
from luthier_operator.rawstatus import internal_error_status, new_event, not_understood_status, status_patch
from luthier_operator.render.claim import shortfall
from luthier_operator.settings import Settings
from luthier_operator.store import Store
from luthier_operator.versions import SAME_CHART

log = logging.getLogger(__name__)

# A Job or JobSet of the same name may follow, and must not exist together with the pods of this one.
PROPAGATION = {"Job": "Foreground", "JobSet": "Foreground"}
NOTHING_FOLLOWS = {"conditions", "state", "progress", "observedGeneration", WRITES}
"""Fields of a status whose change alone leaves nothing to decide: a job that has only begun to wait for something else
is reconciled again when that comes.
"""
CHILD_KINDS: tuple[Literal["Job", "JobSet"], ...] = ("Job", "JobSet")
REFUSALS = (400, 403, 422)
"""Answers to a status that the API server will give again."""
CREATED_SECONDS = NO_POD_SECONDS + 1
"""After children were created there is nothing to decide until a controller has begun with them, which is an event. If
pods are missing after this time, the job is reconciled: that a small job has no pods is reported then, and nothing
earlier.
"""


@dataclass(frozen=True)
class _Write:
    """Digests of a status as it was sent and as the API server stored it, and when."""

    uid: str
    desired: bytes
    stored: bytes
    at: float
    version: int
    """Of the object as the API server stored it."""
    dropped: Object
    """Fields that were sent and not stored, because the CRD is older than this operator. Without them each decision
    would begin again what they remember, such as the time since when the job is at work.
    """


class Reconciler:
    def __init__(
        self,
        store: Store,
        client: Client,
        queue: Queue,
        events: Recorder,
        metrics: Metrics,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._client, self._queue, self._events, self._metrics = store, client, queue, events, metrics
        self._settings, self._clock = settings, clock
        self._writes: dict[Key, _Write] = {}
        self._namespaces = Namespaces(store, client, clock)
        self._active = 0

    async def work(self, key: Key) -> None:
        """Reconcile `key`, and put it back into the queue after an error or when it is due again. Raises nothing."""
        self._active += 1
        self._metrics.active(self._active)
        begin, result = self._clock(), "success"
        try:
            again = await self.reconcile(key)
            self._queue.forget(key)
            if again is not None:
                result = "requeue_after"
                self._queue.add_after(key, again)
        except Exception as error:
            result = "error"
            delay = self._queue.retry(key)
            if isinstance(error, ApiError):
                log.warning("%s %s/%s: retry in %.1f s: %s", key.kind, key.namespace, key.name, delay, error)
            else:
                log.exception("%s %s/%s: retry in %.1f s", key.kind, key.namespace, key.name, delay)
        finally:
            self._active -= 1
            self._metrics.active(self._active)
            self._metrics.reconciled(result, self._clock() - begin)

    def is_needed(self, key: Key) -> bool:
        """Whether time alone may have changed what is to be decided: not while nobody else has written the job, and all
        its pods run or have yet to be given a node, of which events tell.
        """
        last = self._writes.get(key)
        if last is None or not self._store.goes_as_expected(key, last.version):
            return True
        self._check_scheduling(key)
        return False

    def _check_scheduling(self, key: Key) -> None:
        """Plan a look for the case that no scheduler takes the pods, of which no event tells."""
        if self._store.awaits_scheduler(key):
            self._queue.add_after(key, NO_SCHEDULER_SECONDS, check=True)

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile `key` once. Returns the seconds after which to do it again, if any.

        Raises ApiError, and what `decide` raises.
        """
        found = self._store.job(key)
        if found is None or found["metadata"].get("deletionTimestamp"):
            self._queue.took(key, 0)
            self._writes.pop(key, None)  # its children have owner references, and are deleted with it
            return None
        left = self._namespaces.seconds_to_wait(key.namespace)
        if await self._namespaces.let_go(key):
            return TERMINATING_SECONDS
        again = left if left > 0 else await self._decide(key, found)
        return min((s for s in (again, self._namespaces.ask_again(key)) if s is not None), default=None)

    async def _decide(self, key: Key, found: Object) -> float | None:
        """Decide on a job that exists, and carry that out. Returns and raises what `reconcile` does."""
        begin, now = time.perf_counter(), datetime.now(UTC)
        try:
            stored = read_stored(KINDS[key.kind].model, self._with_dropped(key, found))
            observed = replace(self._store.observed(stored.value), unknown_fields=stored.unknown)
            decision = decide(observed, self._settings, now)
            self._queue.took(key, time.perf_counter() - begin)
            if decision.ask:
                observed = replace(observed, warnings=await self._warnings(key, decision.ask))
                decision = decide(observed, self._settings, now)
        except NotUnderstood as error:
            await self._not_understood(key, found, str(error))
            return None
        except ApiError:
            raise
        except Exception as error:
            await self._internal_error(key, found, error)
            raise
        if decision.status.finished and decision.status == stored.value.status:
            self._store.forget_reports(stored.value)
        if decision.delete_job:
            return await self._expire(key, found)
        return await self._carry_out(key, found, observed, decision, now)

    async def _carry_out(
        self, key: Key, found: Object, observed: Observed, decision: Decision, now: datetime
    ) -> float | None:
        """Write the status, then delete and create children. Returns what `reconcile` returns.

        The status comes first: nothing is created or deleted on the ground of an object that has changed meanwhile, or
        while the API server refuses the status. Raises ApiError.
        """
        first = held(observed, decision, now)
        current, wait = await self._report(key, found, observed.job.status, first)
        if current is None:  # the job was deleted
            return None
        await self._delete(key, decision)
        refusal = await self._apply(key, current, decision)
        if refusal and refusal.cause == NAMESPACE_TERMINATING:
            log.info("namespace %s is being deleted: nothing is created there", key.namespace)
            return self._namespaces.refused(key.namespace)
        if decision.apply and not refusal:
            self._namespaces.accepted(key.namespace)
        if refusal or first is not decision:
            written = replace(observed, job=observed.job.model_copy(update={"status": first.status}))
            last = refused(written, decision, refusal.message, now) if refusal else with_events(written, decision, now)
            await self._report(key, current, first.status, last)
        if decision.apply:
            self._queue.add_after(key, in_turn(CREATED_SECONDS, observed.backlog), check=True)
        self._check_scheduling(key)
        again = min((s for s in (wait, decision.requeue_after) if s is not None), default=None)
        if refusal:
            if again is not None:  # a deadline may be nearer than the next attempt
                self._queue.add_after(key, again)
            raise refusal
        return again

    async def _apply(self, key: Key, found: Object, decision: Decision) -> ApiError | None:
        """Create the missing children in their order, until the API server refuses one. Returns that refusal.

        Raises ApiError if the API server does not answer.
        """
        for manifest in filter(None, (decision.repair, *decision.apply)):
            try:
                if manifest is decision.repair:
                    made = await self._client.repair(manifest)
                elif manifest["kind"] == "PersistentVolumeClaim":
                    made = await self._client.claim(manifest)
                    if small := shortfall(manifest, made):
                        self._events.record(found, Event("Warning", Reason.SMALL_WORKSPACE, small))
                else:
                    made = await self._client.create_child(manifest)
            except ApiError as error:
                if not error.status:
                    raise
                name = f"{manifest['kind']} {manifest['metadata']['name']}"
                return ApiError(error.status, error.reason, f"{name}: {error.message}", error.cause)
            touched = self._store.put(made)
            if manifest["kind"] in CHILD_KINDS:
                self._store.expect(key, made, pods_at_once(manifest))
            if not made.get("status"):
                touched.discard(key)  # it is new: see CREATED_SECONDS
            self._enqueue(touched)
        return None

    async def _warnings(self, key: Key, asked: Sequence[ChildRef]) -> dict[ChildRef, str]:
        """Read what the Events of children say against their pods, without those whose Events cannot be read."""
        found = {}
        for ref in asked:
            child = self._store.child(key, ref)
            if child is None:
                continue
            try:
                found[ref] = await self._client.warning(child)
            except ApiError as error:
                log.warning("%s %s: its Events cannot be read: %s", ref.kind, ref.name, error)
        return found

    async def _delete(self, key: Key, decision: Decision) -> None:
        for ref in decision.delete:
            await self._delete_child(key, ref)

    async def _delete_child(self, key: Key, ref: ChildRef) -> None:
        child = self._store.child(key, ref)
        if child is None or child["metadata"].get("deletionTimestamp"):
            return
        left = await self._client.delete(child, PROPAGATION.get(ref.kind, "Background"))
        self._enqueue(self._store.put(left) if left else self._store.remove(child))

    async def _expire(self, key: Key, found: Object) -> float | None:
        """Delete a job whose time to live is over, unless it has changed: what the store knows may be old, and the user
        may have raised the time or wished to keep the results.
        """
        meta = found["metadata"]
        if not await self._read_again(found):
            return None
        current = self._store.job(key)
        if current is None or current["metadata"]["resourceVersion"] != meta["resourceVersion"]:
            return 0.0  # decided anew
        await self._client.delete(found, "Background", exact=True)
        return None

    async def _not_understood(self, key: Key, found: Object, problem: str) -> None:
        """Say so in the status. Children go on, unless the user suspends the job. A job that has ended stays as it is.

        Raises ApiError.
        """
        if found.get("status", {}).get("completionTime"):
            return
        await self._write_raw(key, found, not_understood_status(found, problem), ConditionType.ACCEPTED)
        if found["spec"].get("suspend") is not True:
            return
        for phase in PHASES:
            for kind in CHILD_KINDS:
                await self._delete_child(key, ChildRef(kind, f"{naming.stem(key.kind, key.name)}-{phase}"))

    async def _internal_error(self, key: Key, found: Object, error: Exception) -> None:
        """Say so in the status. Raises nothing: the caller raises `error`."""
        try:
            await self._write_raw(key, found, internal_error_status(found, error), ConditionType.INTERNAL_ERROR)
        except ApiError as refusal:
            log.warning("%s: status not written: %s", found["metadata"]["name"], refusal)

    async def _write_raw(self, key: Key, found: Object, desired: Object, type: ConditionType) -> None:
        """Write a status that was made from `found` as plain data, and post the event of its condition `type`."""
        before = found.get("status", {})
        if await self._write_status(key, found, before, desired) and (event := new_event(before, desired, type)):
            self._events.record(found, event)

    async def _report(
        self, key: Key, found: Object, before: JobStatus, decision: Decision
    ) -> tuple[Object | None, float | None]:
        """Write the status, then post its events. `before`: the status of `found`, as it was understood.

        Returns the object as it is then, None if it is gone; and the seconds to wait if only the progress has changed
        and was written a short time ago. Raises ApiError.
        """
        desired = decision.status.dump()
        understood = desired if decision.status == before else before.dump()
        last = self._last_write(key, found)
        if last and desired != understood and may_wait(understood, desired):
            wait = last.at + self._settings.progress_every - self._clock()
            if wait > 0:
                return found, wait
        kept = await self._write_status(key, found, understood, desired, creates=bool(decision.apply))
        if kept is None:
            return None, None
        if kept is not found:
            created = found["metadata"].get("creationTimestamp")
            self._metrics.status_changed(key.kind, created, before, decision.status)
        # After the write: if it fails, the same decision and its events are made again.
        for event in decision.events:
            self._events.record(found, event)
        return kept, None

    def _last_write(self, key: Key, found: Object) -> _Write | None:
        last = self._writes.get(key)
        return last if last and last.uid == found["metadata"]["uid"] else None

    def _with_dropped(self, key: Key, found: Object) -> Object:
        """`found` with the fields of its status that an older CRD has dropped."""
        last = self._last_write(key, found)
        return found | {"status": last.dropped | found.get("status", {})} if last and last.dropped else found

    async def _write_status(
        self, key: Key, found: Object, understood: Object, desired: Object, creates: bool = False
    ) -> Object | None:
        """Write the status if it has changed. Returns the object as it is then: `found` if nothing was written, None if
        it is gone. `creates`: whether children are created next, after which the job is reconciled anyway.

        Raises ApiError; after a conflict the store has the current object.
        """
        before = found.get("status", {})
        patch, last = status_patch(before, understood, desired), self._last_write(key, found)
        if not patch:
            if last and last.dropped:
                self._writes[key] = replace(last, dropped={})
            return found
        # An older CRD drops fields that it does not know. They must not be written again and again.
        wanted = digest({name: value for name, value in desired.items() if name != WRITES})
        if last and (last.desired, last.stored) == (wanted, digest(before)):
            return found
        patch[WRITES] = (before.get(WRITES) or 0) + 1
        try:
            kept = await self._client.patch_status(found, patch)
        except ApiError as error:
            if error.status in (404, 409):
                await self._read_again(found)
            if error.status == 404:  # the job was deleted meanwhile
                return None
            if error.status in REFUSALS:
                refusal = f"{SAME_CHART}. Until then nothing is created. The API server refuses the status of the job:"
                self._events.record(found, Event("Warning", Reason.STATUS_REFUSED, f"{refusal} {error.message}"))
            raise
        stored = kept.get("status", {})
        dropped = {name: value for name, value in desired.items() if name not in stored and name != WRITES}
        uid, at = found["metadata"]["uid"], self._clock()
        self._writes[key] = _Write(uid, wanted, digest(stored), at, version(kept), dropped)
        touched = self._store.put(kept, answer=True)
        if creates or patch.keys() <= NOTHING_FOLLOWS:
            touched.discard(key)
        self._enqueue(touched)
        return kept

    async def _read_again(self, found: Object) -> bool:
        """Read the object into the store. Returns whether it exists. Raises ApiError."""
        meta = found["metadata"]
        try:
            current = await self._client.get(RESOURCES[found["kind"]].path(meta["namespace"], meta["name"]))
        except ApiError as error:
            if error.status != 404:
                raise
            self._enqueue(self._store.remove(found))
            return False
        self._enqueue(self._store.put(current))
        return True

    def _enqueue(self, keys: set[Key]) -> None:
        for key in keys:
            self._queue.soon(key)


def may_wait(before: Object, after: Object) -> bool:
    """Whether nothing that differs between two statuses has to be written at once."""
    differ = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    one, other = ({name: status[name] for name in differ if name in status} for status in (before, after))
    return urgent_part(one, JobStatus) == urgent_part(other, JobStatus)


def digest(status: Object) -> bytes:
    """Equal for equal statuses. Two copies of each status would be a third of the operator's memory."""
    return hashlib.blake2b(msgspec.json.encode(status, order="sorted"), digest_size=16).digest()
