"""Watches FineTuneJobs and GenerateJobs with kopf and passes the events on. Nothing is decided here, and no object is
ever written.

Of kopf only the watches are used: no change handlers, timers, finalizers, peering or stored state, each of which writes
to the objects of users. Handlers of `on.event` write nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import kopf

from luthier_operator.client import Resource
from luthier_operator.model import Object

CHUNK = 500
STOP_SECONDS = 10

Deliver = Callable[[str | None, Object], None]
"""Called with the type of an event (None: the object existed already) and the object."""
Login = Callable[..., kopf.ConnectionInfo | None]


def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The service account in a cluster, else the kubeconfig, as `client.login`."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


class NoDiffBase(kopf.DiffBaseStorage):
    """kopf keeps no copy of the last state, which no handler needs. That halves its time for an event."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


class NoProgress(kopf.ProgressStorage):
    """kopf keeps no progress of handlers: `on.event` has no retries."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # our own few Events come from `events`
    settings.scanning.disabled = True  # watching CRDs and namespaces would need rights over the whole cluster
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.progress_storage = NoProgress()
    settings.watching.chunk_size = CHUNK
    settings.networking.error_backoffs = (0.5, 1, 2, 4)  # then `app` starts the watch anew
    settings.queueing.idle_timeout = 1
    # kopf would kill the process ten minutes after its tasks were cancelled. The operator goes on: only a watch has
    # ended.
    settings.process.ultimate_exiting_timeout = None
    return settings


async def watch_jobs(
    resources: Sequence[Resource],
    namespaces: Sequence[str],
    deliver: Deliver,
    is_known: Callable[[Object], bool],
    started: Callable[[], None],
    login: Login = login,
) -> None:
    """Watch `resources`, whose kinds must exist, until cancelled. `started` is called once kopf runs.

    A change whose object `is_known` is not delivered: most changes of a job are the operator's own writes, and kopf
    takes half a millisecond of CPU to call a handler.

    Returns only when kopf has caught a signal, which may happen just before `started` is called. Raises what ends a
    watch permanently.
    """
    registry = kopf.OperatorRegistry()

    async def handle(event: Any, **_: Any) -> None:
        deliver(event["type"], event["object"])

    def is_news(event: Any, **_: Any) -> bool:
        return event["type"] != "MODIFIED" or not is_known(event["object"])

    for resource in resources:
        kopf.on.event(
            resource.group,
            resource.api_version.rpartition("/")[2],
            resource.plural,
            registry=registry,
            id=resource.plural,
            when=is_news,
        )(handle)
    kopf.on.login(registry=registry, id="login", errors=kopf.ErrorsMode.TEMPORARY, backoff=5)(login)

    # Not kopf.operator(): when it ends, it cancels every task of the process that was started after it.
    spawning = asyncio.ensure_future(
        kopf.spawn_tasks(
            registry=registry,
            settings=kopf_settings(),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=list(namespaces),
        )
    )
    try:
        tasks = await asyncio.shield(spawning)
        started()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        tasks = await spawning
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_SECONDS)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # retrieved, so that asyncio does not log it
