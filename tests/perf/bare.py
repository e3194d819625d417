"""The peer of the operator's benchmark: the official client, which applies the same JobSets and does nothing else."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from dataclasses import dataclass

from kubernetes.aio.client.api_client import ApiClient

from luthier_operator.client import IN_FLIGHT, RESOURCES, login
from luthier_operator.model import Object


@dataclass(frozen=True)
class Applied:
    """What it took to apply some objects."""

    seconds: float
    cpu_seconds: float


async def apply_all(manifests: list[Object]) -> Applied:
    """Apply server-side, with as many requests in flight as the operator has. Raises what the client raises."""
    configuration = await login()
    configuration.client_session_kwargs = {"trust_env": False}  # else it reads ~/.netrc for each request
    client, slots = ApiClient(configuration), asyncio.Semaphore(IN_FLIGHT)

    async def apply(manifest: Object) -> None:
        meta = manifest["metadata"]
        async with slots:
            request = await client.param_serialize(
                "PATCH",
                RESOURCES[manifest["kind"]].path(meta["namespace"], meta["name"]),
                query_params=[("fieldManager", "luthier-bench"), ("force", "true")],
                header_params={"Accept": "application/json", "Content-Type": "application/apply-patch+yaml"},
                body=manifest,
                auth_settings=["BearerToken"],
            )
            response = await client.call_api(*request)
            answer = json.loads(await response.read())
            if response.status not in (200, 201):
                raise SystemExit(f"{meta['name']}: {answer}")

    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    await asyncio.gather(*map(apply, manifests))
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - begin
    await client.close()
    return Applied(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
