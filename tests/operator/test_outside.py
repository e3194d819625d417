"""What others see of the operator: requests, metrics, probes."""

from __future__ import annotations

import asyncio
import socket
import time
import warnings
from dataclasses import dataclass, replace

import aiohttp
import pytest
from fake_api import Fault
from fake_cluster import FakeCluster, Outcome
from harness import HUB, fine_tune, finished, running, settings, start, until
from kubernetes.aio.client.configuration import Configuration
from prometheus_client.parser import text_string_to_metric_families
from test_lifecycle import CRASH, at

from luthier_api.status import Attempt, JobStatus
from luthier_operator import health, metrics
from luthier_operator.client import ApiError, Client
from luthier_operator.metrics import OPERATOR_METRICS, Metrics


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for f in text_string_to_metric_families(text.decode())
        for s in f.samples
    }


async def test_metrics_tell_the_life_of_a_job() -> None:
    crashing = at("run", replace(CRASH, seconds=0.5))  # long enough to be seen running
    async with FakeCluster(crashing) as cluster, running(cluster) as operator:
        cluster.create(fine_tune(hub=HUB))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        await until("at rest", lambda: b'workqueue_depth{name="luthier"} 0.0' in operator.metrics_text())
        await until(
            "noted", lambda: b'luthier_job_duration_seconds_count{kind="FineTuneJob"' in operator.metrics_text()
        )
        found = samples(operator.metrics_text())
        kind = ("kind", "FineTuneJob")
        assert found["luthier_jobs", (kind, ("namespace", "default"), ("state", "Complete"))] == 1
        assert sum(value for (name, _), value in found.items() if name == "luthier_job_restarts_total") == 1
        assert found["luthier_hub_upload_bytes_total", (kind,)] == 1000
        assert found["luthier_job_duration_seconds_count", (kind, ("result", "complete"))] == 1
        assert found["luthier_job_queue_seconds_count", (kind,)] == 1
        assert found["controller_runtime_reconcile_total", (("controller", "luthier"), ("result", "success"))] > 1
        assert found["workqueue_adds_total", (("name", "luthier"),)] > 1
        written = (("code", "200"), ("host", cluster.url.removeprefix("http://")), ("method", "PATCH"))
        assert found["rest_client_requests_total", written] > 1


def test_every_metric_of_the_table_is_served_with_its_help() -> None:
    made = Metrics("1.2.3", "https://host:6443", 4)
    families = {f.name for f in text_string_to_metric_families(made.text([]).decode())}
    assert families == {m.name.removesuffix("_total") if m.type == "counter" else m.name for m in OPERATOR_METRICS}
    assert all(m.help for m in OPERATOR_METRICS)
    assert len({m.name for m in OPERATOR_METRICS}) == len(OPERATOR_METRICS)
    assert set(OPERATOR_METRICS) == {m for m in vars(metrics).values() if isinstance(m, metrics.OperatorMetric)}


def told(restarts: int = 0, first_ran: str | None = None, *failures: tuple[int, int, str]) -> JobStatus:
    """`failures`: attempt, rank or shard, reason."""
    attempts = [
        Attempt(phase="run", attempt=n, rank=rank, reason=reason, pod=f"p{i}")
        for i, (n, rank, reason) in enumerate(failures)
    ]
    return JobStatus(restarts=restarts, run_start_time=first_ran, attempts=attempts)


RAN, CRASHES = "2026-03-01T12:00:00Z", [(0, 0, "Hang"), (1, 0, "PeerLost")]
SHARDS = [(0, 3, "Hang"), (0, 1, "PeerLost"), (1, 3, "StorageError")]


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    before: JobStatus
    after: JobStatus
    queued: int
    restarts: dict[str, int]


COUNTS = [
    Case(
        name="it runs at last",
        kind="FineTuneJob",
        before=told(),
        after=told(0, RAN),
        queued=1,
        restarts={},
    ),
    Case(
        name="it runs on",
        kind="FineTuneJob",
        before=told(0, RAN),
        after=told(0, RAN),
        queued=0,
        restarts={},
    ),
    Case(
        name="it runs again",
        kind="GenerateJob",
        before=told(1, RAN, *SHARDS),
        after=told(1, RAN, *SHARDS),
        queued=0,
        restarts={},
    ),
    Case(
        name="a group was restarted",
        kind="FineTuneJob",
        before=told(0, RAN),
        after=told(1, RAN, *CRASHES[:1]),
        queued=0,
        restarts={"Hang": 1},
    ),
    Case(
        name="twice, while nobody looked",
        kind="FineTuneJob",
        before=told(0, RAN),
        after=told(2, RAN, *CRASHES),
        queued=0,
        restarts={"Hang": 1, "PeerLost": 1},
    ),
    Case(
        name="and nobody has seen why",
        kind="FineTuneJob",
        before=told(0, RAN),
        after=told(1, RAN),
        queued=0,
        restarts={"Unknown": 1},
    ),
    Case(
        name="a shard was started again",
        kind="GenerateJob",
        before=told(0, RAN),
        after=told(1, RAN, *SHARDS[:1]),
        queued=0,
        restarts={"Hang": 1},
    ),
    Case(
        name="two more shards",
        kind="GenerateJob",
        before=told(1, RAN, *SHARDS[:1]),
        after=told(3, RAN, *SHARDS),
        queued=0,
        restarts={"PeerLost": 1, "StorageError": 1},
    ),
]


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case.name)
def test_what_a_status_means_for_the_figures(case: Case) -> None:
    metrics = Metrics("test")
    metrics.status_changed(case.kind, "2026-03-01T11:00:00Z", case.before, case.after)
    found = samples(metrics.text([]))
    assert found.get(("luthier_job_queue_seconds_count", (("kind", case.kind),)), 0) == case.queued
    assert {
        dict(labels)["reason"]: n for (name, labels), n in found.items() if name == "luthier_job_restarts_total"
    } == case.restarts


async def test_failures_are_counted_by_reason() -> None:
    async with FakeCluster(at("prepare", Outcome(65))) as cluster, running(cluster) as operator:
        cluster.create(fine_tune())
        await until(
            "counted",
            lambda: (
                b'luthier_job_failures_total{kind="FineTuneJob",reason="InvalidDataset"} 1.0' in operator.metrics_text()
            ),
        )


async def test_probes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with FakeCluster() as cluster:
        cluster.missing.add("finetunejobs")
        started = start(cluster)
        server = await health.serve(
            port, started.operator.metrics_text, started.operator.alive, started.operator.serving
        )
        async with aiohttp.ClientSession() as session:

            async def ask(path: str) -> tuple[int, str]:
                async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                    return answer.status, await answer.text()

            await asyncio.sleep(0.05)
            assert await ask("/healthz") == (200, "ok")
            assert await ask("/readyz") == (
                503,
                "the first lists are not complete, and no other replica is known to be the leader",
            )
            cluster.missing.clear()
            await started.operator.ready.wait()
            assert await ask("/readyz") == (200, "ok")
            assert "workqueue_depth" in (await ask("/metrics"))[1]
            started.operator.stop()
            await started.task
            assert (await ask("/healthz"))[0] == 503
        await server.cleanup()
        await started.client.close()


def client(cluster: FakeCluster, seen: list[tuple[str, str]] | None = None) -> Client:
    return Client(
        Configuration(host=cluster.url), lambda method, code: seen.append((method, code)) if seen is not None else None
    )


async def test_a_429_holds_every_worker_back() -> None:
    async with FakeCluster() as cluster:
        seen: list[tuple[str, str]] = []
        mine = client(cluster, seen)
        cluster.fault = lambda number, call: Fault(answer=429) if number == 1 else None
        began = time.monotonic()
        first = asyncio.create_task(mine.create(_config("a")))
        await until("refused", lambda: ("POST", "429") in seen)
        await mine.create(_config("b"))
        assert time.monotonic() - began >= 0.05
        await first
        assert [code for _, code in seen] == ["429", "201", "201"] or [code for _, code in seen] == [
            "429",
            "200",
            "200",
        ]
        await mine.close()


async def test_a_server_that_always_says_429_is_an_error_in_the_end() -> None:
    async with FakeCluster() as cluster:
        mine = client(cluster)
        cluster.fault = lambda number, call: Fault(answer=429)
        with pytest.raises(ApiError, match=r"^429"):
            await mine.create(_config("a"))
        assert cluster.writes == 5
        await mine.close()


async def test_requests_say_who_asks() -> None:
    async with FakeCluster() as cluster:
        mine = client(cluster)
        assert mine._session.headers["User-Agent"].startswith("luthier/0.")
        await mine.close()


async def test_lists_come_in_chunks(monkeypatch: object) -> None:
    from luthier_operator import client as module

    async with FakeCluster() as cluster:
        for number in range(5):
            cluster.create(fine_tune(f"job-{number}"))
        mine = client(cluster)
        monkeypatch.setattr(module, "CHUNK", 2)  # type: ignore[attr-defined]
        chunks = [items async for items, _ in mine.list(module.RESOURCES["FineTuneJob"], None)]
        assert [len(c) for c in chunks] == [2, 2, 1]
        assert chunks[0][0]["kind"] == "FineTuneJob"
        await mine.close()


async def test_nothing_of_kopf_is_left_in_the_objects() -> None:
    async with FakeCluster() as cluster, running(cluster, settings()):
        cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        for _, _, found in cluster.history:
            assert not found["metadata"].get("annotations", {}).keys() & {"kopf.zalando.org/last-handled-configuration"}
            assert "kopf" not in str(found["metadata"].get("finalizers", ""))


def test_no_warning_of_python_comes_from_us() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Metrics("1", "https://host", 1).text([])


def _config(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "default"}, "data": {}}
