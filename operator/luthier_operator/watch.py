"""The kopf shell: logs in and hands on what the watches say. Nothing is decided here, and nothing is ever written to an
object.

kopf is used for its watches alone: no change handlers, timers, finalizers, peering or stored state (each costs writes
to the user's objects; handlers of `on.event` cost none). Neighbours: `app` starts one `Watch` a group of kinds, `store`
takes the events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import kopf

from luthier_api.kinds import KINDS
from luthier_operator import naming
from luthier_operator.client import Resource
from luthier_operator.model import Object

CHUNK = 500
STOP_SECONDS = 10
SELECTOR = naming.JOB_LABEL
"""Selects what is ours among Jobs, JobSets and pods: whatever has this label."""

Deliver = Callable[[str | None, Object], None]
"""Told the type of an event (None: it was there already) and the object."""
Login = Callable[..., kopf.ConnectionInfo | None]


def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """In the cluster the service account, else the kubeconfig: the same as our own client's."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def selector(kind: str) -> str:
    return "" if kind in KINDS else SELECTOR


class NoDiffBase(kopf.DiffBaseStorage):
    """kopf keeps no copy of what it saw: we compare states, not differences. It also saves half of kopf's time for an
    event.
    """

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


class NoProgress(kopf.ProgressStorage):
    """kopf has no progress to keep: `on.event` has no retries."""

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


def kopf_settings(resources: Sequence[Resource]) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # our own few Events come from `events`
    settings.scanning.disabled = True  # watching CRDs and namespaces would need rights over the whole cluster
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.progress_storage = NoProgress()
    settings.watching.chunk_size = CHUNK
    for resource in resources:
        if text := selector(resource.kind):
            settings.watching.label_selectors[resource.group, resource.plural] = text
    settings.networking.error_backoffs = (0.5, 1, 2, 4)  # then `app` starts the watch anew
    settings.queueing.idle_timeout = 1
    # When its tasks are cancelled kopf kills the process ten minutes later, to be sure. Ours goes on: only a watch has
    # ended.
    settings.process.ultimate_exiting_timeout = None
    return settings


async def watch(
    resources: Sequence[Resource],
    namespaces: Sequence[str],
    deliver: Deliver,
    started: Callable[[], None],
    login: Login = login,
) -> None:
    """Watch `resources`, which exist, until cancelled. `started` is called once kopf runs. Raises what ends a watch for
    good.

    Returns only when kopf has caught a signal: it takes those for itself at its start, and `started` can be a moment
    late.
    """
    registry = kopf.OperatorRegistry()

    async def handle(event: Any, **_: Any) -> None:
        deliver(event["type"], event["object"])

    for resource in resources:
        kopf.on.event(
            resource.group,
            resource.api_version.rpartition("/")[2],
            resource.plural,
            registry=registry,
            id=resource.plural,
        )(handle)
    kopf.on.login(registry=registry, id="login", errors=kopf.ErrorsMode.TEMPORARY, backoff=5)(login)

    # Not kopf.operator(): at its end that cancels every task of the process that is younger than itself.
    spawning = asyncio.ensure_future(
        kopf.spawn_tasks(
            registry=registry,
            settings=kopf_settings(resources),
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
                task.exception()  # said, so that asyncio does not say it again
