"""Reconciles one job: observe → `decide` → apply children → write the status, if it has changed → post events.

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

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from luthier_api.conditions import ConditionType, Reason
from luthier_api.decides import urgent_part
from luthier_api.kinds import parse_job
from luthier_api.status import Condition, JobStatus, State
from luthier_operator.client import RESOURCES, ApiError, Client
from luthier_operator.decide import decide, refused
from luthier_operator.events import Recorder
from luthier_operator.metrics import Metrics
from luthier_operator.model import ChildRef, Decision, Event, Job, Key, Object
from luthier_operator.queue import Queue
from luthier_operator.render.claim import shortfall
from luthier_operator.settings import Settings
from luthier_operator.store import Store

log = logging.getLogger(__name__)

# A Job or JobSet of the same name may follow, and must not exist together with the pods of this one.
PROPAGATION = {"Job": "Foreground", "JobSet": "Foreground"}
NOTHING_FOLLOWS = {"conditions", "state", "progress", "observedGeneration"}
"""Fields of a status whose change alone leaves nothing to decide: a job that has only begun to wait for something else
is reconciled again when that comes.
"""


class InvalidSpec(ValueError):
    """The object does not match the types, because its CRD is older or newer than this operator."""


@dataclass(frozen=True)
class _Write:
    """Digests of a status as it was sent and as the API server stored it, and when."""

    uid: str
    desired: bytes
    stored: bytes
    at: float


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

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile `key` once. Returns the seconds after which to do it again, if any.

        Raises ApiError, and what `decide` raises.
        """
        begin, found = time.thread_time(), self._store.job(key)
        if found is None or found["metadata"].get("deletionTimestamp"):
            self._queue.took(key, 0)
            self._writes.pop(key, None)  # its children have owner references, and are deleted with it
            return None
        try:
            job = read_job(found)
        except InvalidSpec as error:
            await self._write_status(key, found, invalid_status(found, str(error)))
            return None
        observed, now = self._store.observed(job), datetime.now(UTC)
        decision = decide(observed, self._settings, now)
        self._queue.took(key, time.thread_time() - begin)
        if decision.ask:
            observed = replace(observed, warnings=await self._warnings(key, decision.ask))
            decision = decide(observed, self._settings, now)
        if decision.status.finished and decision.status == job.status:
            self._store.forget_reports(job)
        if decision.delete_job:
            await self._client.delete(found, "Background")
            return None
        refusal = await self._apply(found, decision)
        if refusal:
            decision = refused(observed, decision, refusal.message, now)
        await self._delete(key, decision)
        wait = await self._report(key, found, job, decision)
        again = min((s for s in (wait, decision.requeue_after) if s is not None), default=None)
        if refusal:
            if again is not None:  # a deadline may be nearer than the next attempt
                self._queue.add_after(key, again)
            raise refusal
        return again

    async def _apply(self, found: Object, decision: Decision) -> ApiError | None:
        """Create the missing children in their order, until the API server refuses one. Returns that refusal.

        Raises ApiError if the API server does not answer.
        """
        for manifest in decision.apply:
            try:
                if manifest["kind"] == "PersistentVolumeClaim":
                    made = await self._client.claim(manifest)
                    if small := shortfall(manifest, made):
                        self._events.record(found, Event("Warning", Reason.SMALL_WORKSPACE, small))
                else:
                    made = await self._client.apply(manifest)
            except ApiError as error:
                if not error.status:
                    raise
                return ApiError(
                    error.status, error.reason, f"{manifest['kind']} {manifest['metadata']['name']}: {error.message}"
                )
            self._enqueue(self._store.put(made))
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
            child = self._store.child(key, ref)
            if child is None or child["metadata"].get("deletionTimestamp"):
                continue
            left = await self._client.delete(child, PROPAGATION.get(ref.kind, "Background"))
            self._enqueue(self._store.put(left) if left else self._store.remove(child))

    async def _report(self, key: Key, found: Object, job: Job, decision: Decision) -> float | None:
        """Write the status, then post its events. Returns the seconds to wait if only the progress has changed and was
        written a short time ago.
        """
        desired, before = decision.status.dump(), found.get("status", {})
        last = self._last_write(key, found)
        if last and desired != before and urgent_part(desired, JobStatus) == urgent_part(before, JobStatus):
            wait = last.at + self._settings.progress_every - self._clock()
            if wait > 0:
                return wait
        if await self._write_status(key, found, desired):
            meta = found["metadata"]
            self._metrics.status_changed(key.kind, meta.get("creationTimestamp"), job.status, decision.status)
        # After the write: if it fails, the same decision and its events are made again.
        for event in decision.events:
            self._events.record(found, event)
        return None

    def _last_write(self, key: Key, found: Object) -> _Write | None:
        last = self._writes.get(key)
        return last if last and last.uid == found["metadata"]["uid"] else None

    async def _write_status(self, key: Key, found: Object, desired: Object) -> bool:
        """Write the status if it has changed. Returns whether it was written.

        Raises ApiError; after a conflict the store has the current object.
        """
        before = found.get("status", {})
        patch = merge_patch(before, desired)
        if not patch:
            return False
        # An older CRD drops fields that it does not know. They must not be written again and again.
        last = self._last_write(key, found)
        if last and (last.desired, last.stored) == (digest(desired), digest(before)):
            return False
        try:
            kept = await self._client.patch_status(found, patch)
        except ApiError as error:
            if error.status in (404, 409):
                await self._read_again(found)
            if error.status == 404:  # the job was deleted meanwhile
                return False
            raise
        self._writes[key] = _Write(
            found["metadata"]["uid"], digest(desired), digest(kept.get("status", {})), self._clock()
        )
        touched = self._store.put(kept)
        if patch.keys() <= NOTHING_FOLLOWS:
            touched.discard(key)
        self._enqueue(touched)
        return True

    async def _read_again(self, found: Object) -> None:
        """Read the object into the store. Raises ApiError."""
        meta = found["metadata"]
        try:
            self._enqueue(
                self._store.put(await self._client.get(RESOURCES[found["kind"]].path(meta["namespace"], meta["name"])))
            )
        except ApiError as error:
            if error.status != 404:
                raise
            self._enqueue(self._store.remove(found))

    def _enqueue(self, keys: set[Key]) -> None:
        for key in keys:
            self._queue.soon(key)


def read_job(found: Object) -> Job:
    """The job, without the parts of its status that this version of the operator does not understand.

    Raises InvalidSpec, with one line for each problem.
    """
    try:
        return parse_job(found)
    except ValidationError as error:
        problems = error.errors()
    wrong = [p for p in problems if p["loc"][:1] != ("status",)]
    if wrong:
        raise InvalidSpec("\n".join(problem_line(problem) for problem in wrong))
    unreadable = {p["loc"][1] for p in problems}
    return parse_job(found | {"status": {k: v for k, v in found["status"].items() if k not in unreadable}})


def problem_line(problem: ErrorDetails) -> str:
    """`spec.task: field required`."""
    path = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"]
    return f"{path}: {message[:1].lower()}{message[1:]}"


def invalid_status(found: Object, message: str) -> Object:
    """The status of a job that this operator cannot read: the old one, with the reason in the condition Accepted."""
    before, generation = found.get("status", {}), found["metadata"].get("generation")
    known = next((c for c in before.get("conditions", []) if c.get("type") == ConditionType.ACCEPTED), None)
    since = (
        known["lastTransitionTime"]
        if known and known.get("status") == "False"
        else datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    )
    text = f"{message}\nThe CRDs and the operator have different versions: install both from the same chart."
    condition = Condition(
        type=ConditionType.ACCEPTED,
        status="False",
        reason=Reason.INVALID_SPEC,
        message=text,
        last_transition_time=since,
        observed_generation=generation,
    ).dump()
    others = [c for c in before.get("conditions", []) if c.get("type") != ConditionType.ACCEPTED]
    status: Object = (
        before
        | {"state": State.INVALID, "conditions": [condition, *others]}
        | ({"observedGeneration": generation} if generation else {})
    )
    return status


def digest(status: Object) -> bytes:
    """Equal for equal statuses. Two copies of each status would be a third of the operator's memory."""
    return hashlib.blake2b(msgspec.json.encode(status, order="sorted"), digest_size=16).digest()


def merge_patch(before: Object, after: Object) -> Object:
    """The JSON merge patch (RFC 7396) from `before` to `after`. Empty if they are equal; a removed key becomes null."""
    patch: Object = {key: None for key in before if key not in after}
    for key, value in after.items():
        if key not in before:
            patch[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            if inner := merge_patch(before[key], value):
                patch[key] = inner
        elif value != before[key]:
            patch[key] = value
    return patch
