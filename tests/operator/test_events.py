"""Posting events: many at once, ends of jobs first, and what is dropped is counted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from fake_api import Call, FakeApi
from fake_cluster import FakeCluster
from harness import fine_tune, until
from kubernetes.aio.client.configuration import Configuration

from luthier_operator.client import Client
from luthier_operator.events import AT_ONCE, EventQueue, Recorder
from luthier_operator.metrics import EVENTS_DROPPED, Metrics
from luthier_operator.model import Event


def client(cluster: FakeApi) -> Client:
    return Client(Configuration(host=cluster.url))


@dataclass(frozen=True)
class OrderCase:
    name: str
    put: list[str]
    """`JOB REASON`"""
    expect: list[str]
    dropped: list[str] = field(default_factory=list)
    size: int = 10


ORDERS = [
    OrderCase(
        name="in their order",
        put=["a Started", "b Started", "a Trained"],
        expect=["a Started", "b Started", "a Trained"],
    ),
    OrderCase(
        name="a job with many events keeps nobody waiting",
        put=["a Started", "a Notice", "a Notice", "b Started", "a Notice"],
        expect=["a Started", "b Started", "a Notice", "a Notice", "a Notice"],
    ),
    OrderCase(
        name="the end of a job comes first",
        put=["a Started", "b Started", "c Failed"],
        expect=["c Failed", "a Started", "b Started"],
    ),
    OrderCase(
        name="what a job did comes before its end",
        put=["a Started", "b Trained", "b Completed"],
        expect=["b Trained", "b Completed", "a Started"],
    ),
    OrderCase(
        name="too many",
        put=["a Started", "b Started", "c Started"],
        expect=["a Started", "b Started"],
        dropped=["c Started"],
        size=2,
    ),
    OrderCase(
        name="too many, and then the end of a job",
        put=["a Started", "b Started", "c Completed"],
        expect=["c Completed", "b Started"],
        dropped=["a Started"],
        size=2,
    ),
    OrderCase(
        name="too many ends of jobs",
        put=["a Completed", "b Failed", "c Completed"],
        expect=["a Completed", "b Failed"],
        dropped=["c Completed"],
        size=2,
    ),
]


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: case.name)
async def test_the_order_of_events(case: OrderCase) -> None:
    queue, dropped, taken = EventQueue(case.size), [], []
    for line in case.put:
        job, reason = line.split()
        if lost := queue.put({"uid": job}, Event("Normal", reason, "")):
            dropped.append(f"{lost[0]['uid']} {lost[1].reason}")
    while len(queue):
        about, event = await queue.take()
        taken.append(f"{about['uid']} {event.reason}")
        queue.done(about["uid"])
    assert (taken, dropped) == (case.expect, case.dropped)
    await asyncio.wait_for(queue.join(), 1)


async def test_events_of_different_jobs_are_posted_at_once_within_a_bound() -> None:
    async with FakeCluster() as cluster:
        posting, released = [], asyncio.Event()

        async def hold(call: Call) -> None:
            posting.append(call)
            await released.wait()

        cluster.before_write = hold
        mine = client(cluster)
        recorder = Recorder(mine, Metrics("test"))
        serving = asyncio.create_task(recorder.serve())
        for number in range(3 * AT_ONCE):
            job = cluster.create(fine_tune(f"job-{number}"))
            recorder.record(job, Event("Normal", "Started", "first"))
            recorder.record(job, Event("Normal", "Trained", "second"))
        await until("at once", lambda: len(posting) == AT_ONCE)
        await asyncio.sleep(0.05)
        assert len(posting) == AT_ONCE
        released.set()
        await recorder.flush(10)
        reasons = [(e["involvedObject"]["name"], e["reason"]) for e in cluster.all("Event")]
        assert len(reasons) == 6 * AT_ONCE
        assert all(reasons.index((name, "Started")) < reasons.index((name, "Trained")) for name, _ in reasons)
        serving.cancel()
        await mine.close()


async def test_an_event_that_is_refused_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeCluster() as cluster:
        job, mine, metrics = cluster.create(fine_tune()), client(cluster), Metrics("test")
        cluster.missing.add("events")
        recorder = Recorder(mine, metrics)
        serving = asyncio.create_task(recorder.serve())
        recorder.record(job, Event("Normal", "Started", "2 pods"))
        await recorder.flush(5)
        assert metrics.registry.get_sample_value(EVENTS_DROPPED.name) == 1
        assert "an event about default/tune was not posted: 404 NotFound" in caplog.text
        assert "Started: 2 pods" in caplog.text
        serving.cancel()
        await mine.close()


async def test_the_same_event_is_counted() -> None:
    async with FakeCluster() as cluster:
        job, mine = cluster.create(fine_tune()), client(cluster)
        recorder = Recorder(mine, Metrics("test"))
        serving = asyncio.create_task(recorder.serve())
        for message in ("again", "again", "other", "again"):
            recorder.record(job, Event("Warning", "HubUnavailable", message))
        await recorder.flush(5)
        assert sorted((e["message"], e["count"]) for e in cluster.all("Event")) == [("again", 3), ("other", 1)]
        cluster.delete(next(e for e in cluster.all("Event") if e["message"] == "again"))
        recorder.record(job, Event("Warning", "HubUnavailable", "again"))
        await recorder.flush(5)
        assert sorted((e["message"], e["count"]) for e in cluster.all("Event")) == [("again", 1), ("other", 1)]
        serving.cancel()
        await mine.close()
