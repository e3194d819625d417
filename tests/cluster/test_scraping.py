"""Pods of a tenant that answer with a megabyte, or never, on a real API server and over real connections.

No kubelet runs the pods: their status names addresses of this machine, where the tests serve what such a pod would.
"""

from __future__ import annotations

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.operating import Object, World, connected, job, namespaces, operator
from luthier_api.run import METRICS_PORT
from luthier_operator import naming
from luthier_operator.client import RESOURCES

pytestmark = pytest.mark.cluster
OTHERS, TENANT, SYSTEM = "test-scraping", "test-scraping-tenant", "test-scraping-system"
PODS = 40
SECONDS = 10
"""In which readings of a pod are counted."""
LIVENESS_SECONDS = 5
"""The chart's timeout of the liveness probe."""
STEADY, LARGE, SILENT, BARE = (f"127.0.7.{number}" for number in (1, 2, 3, 4))
PROGRESS = "luthier_generate_rows 3\nluthier_generate_max_rows 900\nluthier_heartbeat_age_seconds 1\n"
MEGABYTE = (PROGRESS * (1_000_000 // len(PROGRESS))).encode()


@pytest.fixture(autouse=True)
def spaces(cluster: None) -> Iterator[None]:
    with namespaces(OTHERS, TENANT, SYSTEM):
        yield


@dataclass
class Server:
    """Serves the metrics of pods at one address."""

    answer: bytes | None
    """None: it never answers."""
    readings: int = 0

    @contextlib.asynccontextmanager
    async def at(self, address: str) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self._serve, address, METRICS_PORT)
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.readings += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if self.answer is None:
                await reader.read()  # until the other side gives up
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.answer) + self.answer)
                await writer.drain()
        writer.close()

    async def count(self) -> int:
        """Readings in the time for which all are counted."""
        before = self.readings
        await asyncio.sleep(SECONDS)
        return self.readings - before


async def start(world: World, name: str, pods: int, address: str) -> None:
    """A job whose pods run at this address."""
    await world.create(job("GenerateJob", name, shards=pods))
    await world.prepare(name)
    await asyncio.gather(*(world.runs(pod, address) for pod in await world.pods_of(name, "run", pods)))
    await world.until_condition("GenerateJob", name, "Running", "Running")


async def start_bare(world: World, like: Object, number: int) -> None:
    """A pod with the labels of a job's pod, that no Job owns."""
    labels = {n: v for n, v in like["metadata"]["labels"].items() if n.startswith(("luthier.dev/", "app."))}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"bare-{number}", "labels": labels}}
    await world.create(pod | {"spec": {"containers": [{"name": naming.CONTAINER, "image": "x"}], **nowhere(like)}})
    await world.runs(pod, BARE)


def nowhere(like: Object) -> Object:
    return {"nodeSelector": like["spec"]["nodeSelector"]}


async def lease(world: World) -> tuple[str, int]:
    spec = (await world.client.get(RESOURCES["Lease"].path(SYSTEM, "luthier")))["spec"]
    return spec["holderIdentity"], spec.get("leaseTransitions", 0)


async def probe(url: str, failures: list[str]) -> None:
    """As the kubelet does, until cancelled."""
    while True:
        try:
            await asyncio.to_thread(fetch, f"{url}/healthz")
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            failures.append(repr(error))
        await asyncio.sleep(0.5)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=LIVENESS_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def reads(url: str) -> dict[str, float]:
    """The result of a reading of a pod → how many there were."""
    families = {family.name: family for family in text_string_to_metric_families(fetch(f"{url}/metrics"))}
    samples = families["luthier_progress_reads"].samples
    return {s.labels["result"]: s.value for s in samples if s.name == "luthier_progress_reads_total"}


async def test_pods_of_a_tenant_neither_block_the_operator_nor_slow_the_progress_of_others() -> None:
    failures: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected())
        steady = await stack.enter_async_context(Server(PROGRESS.encode()).at(STEADY))
        large = await stack.enter_async_context(Server(MEGABYTE).at(LARGE))
        silent = await stack.enter_async_context(Server(None).at(SILENT))
        bare = await stack.enter_async_context(Server(PROGRESS.encode()).at(BARE))
        others, tenant = World(client, OTHERS), World(client, TENANT)
        process = operator(OTHERS, TENANT, LUTHIER_PROGRESS_EVERY="1", LUTHIER_LEASE=f"{SYSTEM}/luthier")
        with process:
            await start(others, "steady", 1, STEADY)
            holder, alone = await lease(others), await steady.count()
            probing = asyncio.create_task(probe(process.url, failures))
            await start(tenant, "large", PODS, LARGE)
            await start(tenant, "silent", PODS, SILENT)
            like = (await tenant.pods("large", "run"))[0]
            await asyncio.gather(*(start_bare(tenant, like, number) for number in range(3)))
            beside = await steady.count()
            results = reads(process.url)
            probing.cancel()
            assert process.alive()
            assert await lease(others) == holder
            found = await others.get("GenerateJob", "steady")
    assert found is not None
    assert found["status"]["progress"]["rows"] == 3
    assert alone >= SECONDS / 2
    assert beside >= alone / 2, f"{alone} readings alone, {beside} beside the tenant"
    assert large.readings >= PODS
    assert silent.readings > 0
    assert results["too_large"] >= PODS
    assert results["timeout"] > 0
    assert bare.readings == 0
    assert failures == []
