"""The peer of the operator's benchmark: the official client, which creates the same children and does nothing else.

A process of its own, as the operator is: `python -m perf.bare` says that it is ready, reads manifests from its standard
input until that ends, creates them in this order, and writes what that took as JSON.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kubernetes.aio.client.api_client import ApiClient

from luthier_operator.client import IN_FLIGHT, RESOURCES, login
from luthier_operator.model import Object

READY = "ready"
TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Created:
    """What it took to create some objects."""

    seconds: float
    cpu_seconds: float


async def create_in_process(
    manifests: list[Object], environment: dict[str, str], meanwhile: Sequence[Awaitable[None]] = ()
) -> Created:
    """Create `manifests` by a process with `environment`, while `meanwhile` is awaited here. Raises SystemExit."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "perf.bare",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=TESTS,
        env=environment,
    )
    assert process.stdout
    await process.stdout.readline()
    (answer, _), *_ = await asyncio.gather(process.communicate(json.dumps(manifests).encode()), *meanwhile)
    if process.returncode:
        raise SystemExit(f"perf.bare has failed: {process.returncode}")
    return Created(**json.loads(answer))


async def create_all(manifests: list[Object]) -> Created:
    """Create by POST, with as many requests in flight as the operator has. Raises what the client raises."""
    configuration = await login()
    configuration.client_session_kwargs = {"trust_env": False}  # else it reads ~/.netrc for each request
    client, slots = ApiClient(configuration), asyncio.Semaphore(IN_FLIGHT)

    async def create(manifest: Object) -> None:
        async with slots:
            request = await client.param_serialize(
                "POST",
                RESOURCES[manifest["kind"]].path(manifest["metadata"]["namespace"]),
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                body=manifest,
                auth_settings=["BearerToken"],
            )
            response = await client.call_api(*request)
            answer = json.loads(await response.read())
            if response.status != 201:
                raise SystemExit(f"{manifest['metadata']['name']}: {answer}")

    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    await asyncio.gather(*map(create, manifests))
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - begin
    await client.close()
    return Created(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    print(READY, flush=True)
    print(json.dumps(asdict(asyncio.run(create_all(json.load(sys.stdin))))))
