"""Progress: read from the pods, written seldom."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from fake_cluster import FakeCluster, Object, Outcome, Pod, all_well, said
from harness import condition, fine_tune, generate, running, settings, until

from luthier_api.kinds import parse_job
from luthier_operator import naming
from luthier_operator.metrics import PROGRESS_READS, Metrics
from luthier_operator.progress import (
    AT_ONCE_OF_JOB,
    AT_ONCE_OF_NAMESPACE,
    JOBS_PER_SECOND,
    PodReadings,
    Scraper,
    Unreadable,
    fair_share,
    pod_url,
)
from luthier_operator.store import Store


class PodMetrics:
    """One server for the metrics of all pods: /<index>."""

    def __init__(self, text: Callable[[int], str]) -> None:
        self.text = text
        self.reads = 0

    async def __aenter__(self) -> PodMetrics:
        async def answer(request: web.Request) -> web.Response:
            self.reads += 1
            return web.Response(text=self.text(int(request.match_info["index"])))

        app = web.Application()
        app.router.add_get("/{index}", answer)
        self.runner = web.AppRunner(app, access_log=None)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()

    def url(self, pod: Object) -> str:
        return f"{self.address}/{pod['metadata']['annotations'][naming.INDEX_ANNOTATION]}"


class Pods:
    """A server for pods that answer alike."""

    def __init__(self, answer: Callable[[web.Request], Any]) -> None:
        self._answer = answer
        self.asked: set[str] = set()
        self.most_at_once = self._now = 0

    async def __aenter__(self) -> Pods:
        async def answer(request: web.Request) -> web.Response:
            self.asked.add(request.path)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            try:
                found = self._answer(request)
                response: web.Response = await found if asyncio.iscoroutine(found) else found
                return response
            finally:
                self._now -= 1

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        self.runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.05)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()


def with_job(name: str, namespace: str, pods: int, store: Store | None = None) -> Store:
    """`store` with a GenerateJob and its running pods."""
    store = store or Store()
    given = generate(name, shards=pods)
    given["metadata"] |= {"namespace": namespace, "uid": f"uid-{namespace}-{name}", "resourceVersion": "1"}
    store.put(given)
    for shard in range(pods):
        meta = {
            "name": f"{name}-{shard}",
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}-{shard}",
            "resourceVersion": "1",
            "labels": naming.labels(parse_job(given), "run"),
            "annotations": {naming.INDEX_ANNOTATION: str(shard)},
            "ownerReferences": [{"kind": "Job", "name": f"gj-{name}-run", "uid": "uid-of-job", "controller": True}],
        }
        store.put({"kind": "Pod", "metadata": meta, "status": {"phase": "Running", "podIP": "127.0.0.1"}})
    return store


@contextlib.asynccontextmanager
async def scraping(store: Store, answers: Pods, others: Pods | None = None) -> AsyncIterator[Metrics]:
    """A scraper that reads the pods of the namespace `default` from `answers`, all others from `others`."""
    metrics = Metrics("test")

    def url(pod: Object) -> str:
        of = answers if pod["metadata"]["namespace"] == "default" or others is None else others
        return f"{of.address}/{pod['metadata']['annotations'][naming.INDEX_ANNOTATION]}"

    reading = asyncio.create_task(Scraper(store, lambda key: None, metrics, 0.02, url).serve())
    try:
        yield metrics
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def reads(metrics: Metrics, result: str) -> float:
    return metrics.registry.get_sample_value(PROGRESS_READS.name, {"result": result}) or 0.0


def held(pod: Pod) -> Outcome:
    return Outcome(hold=True) if pod.phase == "run" else all_well(pod)


async def test_step_and_loss_of_rank_0_come_into_the_status() -> None:
    def text(index: int) -> str:
        assert index == 0
        return (
            "luthier_train_step 12\nluthier_train_max_steps 30\nluthier_train_loss"
            " 2.34567\nluthier_checkpoint_last_step 10\n"
        )

    async with (
        FakeCluster(held) as cluster,
        PodMetrics(text) as pods,
        running(cluster, settings(progress_every=0.05), url=pods.url),
    ):
        cluster.create(fine_tune())
        found = await until("progress", lambda: cluster.get("FineTuneJob", "tune").get("status", {}).get("progress"))
        assert {k: found[k] for k in ("step", "maxSteps", "percent", "loss")} == {
            "step": 12,
            "maxSteps": 30,
            "percent": 40,
            "loss": 2.346,
        }
        assert cluster.get("FineTuneJob", "tune")["status"]["checkpoint"]["step"] == 10


async def test_a_broken_checkpoint_is_told_of() -> None:
    broken = 0

    def text(index: int) -> str:
        return (
            "luthier_train_step 12\nluthier_train_max_steps 30\nluthier_checkpoint_last_step"
            f" {10 - broken}\nluthier_checkpoints_broken {broken}\n"
        )

    async with (
        FakeCluster(held) as cluster,
        PodMetrics(text) as pods,
        running(cluster, settings(progress_every=0.05), url=pods.url),
    ):
        cluster.create(fine_tune())
        await until("a checkpoint", lambda: cluster.get("FineTuneJob", "tune").get("status", {}).get("checkpoint"))
        assert "brokenCheckpoints" not in cluster.get("FineTuneJob", "tune")["status"]
        broken = 1
        event = await until(
            "an event", lambda: next((e for e in cluster.all("Event") if e["reason"] == "CheckpointBroken"), None)
        )
        assert (event["type"], event["message"].split("; ")[-1]) == ("Warning", "the run resumes from step 9")
        found = cluster.get("FineTuneJob", "tune")["status"]
        assert (found["checkpoint"]["step"], found["brokenCheckpoints"]) == (9, 1)


async def test_rows_of_shards_that_have_ended_keep_counting() -> None:
    rows = {0: 8, 1: 3}

    def text(index: int) -> str:
        return f"luthier_generate_rows {rows[index]}\nluthier_generate_max_rows 10\n"

    async with (
        FakeCluster(held) as cluster,
        PodMetrics(text) as pods,
        running(cluster, settings(progress_every=0.05), url=pods.url),
    ):
        cluster.create(generate())

        def progress() -> Object:
            return cluster.get("GenerateJob", "gen").get("status", {}).get("progress", {})

        await until("both", lambda: progress().get("rows") == 11)
        cluster.release(cluster.pods("gen", "run")[0], Outcome(message=said("run")))
        await asyncio.sleep(0.1)
        rows[1] = 5
        await until("the one that goes on", lambda: progress().get("rows") == 13)
        assert progress()["maxRows"] == 100


async def test_rows_of_shards_that_ended_while_the_operator_was_away_count() -> None:
    async with (
        FakeCluster(held) as cluster,
        PodMetrics(lambda index: "luthier_generate_rows 3\nluthier_generate_max_rows 10\n") as pods,
    ):
        async with running(cluster):
            cluster.create(generate())
            await until("both run", lambda: len(cluster.pods("gen", "run")) == 2)
        cluster.release(
            cluster.pods("gen", "run")[0], Outcome(message=said("run", metrics={"rows": 10, "seconds": 5.0}))
        )
        async with running(cluster, settings(progress_every=0.05), url=pods.url):
            first = await until("progress", lambda: cluster.get("GenerateJob", "gen").get("status", {}).get("progress"))
            assert (first["rows"], first["maxRows"], first["percent"]) == (10, 100, 10), "of all that were prepared"
            await until("of both", lambda: cluster.get("GenerateJob", "gen")["status"]["progress"]["rows"] == 13)


async def test_mere_progress_is_written_seldom_and_a_condition_at_once() -> None:
    step = 0

    def text(_: int) -> str:
        nonlocal step
        step += 1
        return f"luthier_train_step {step}\nluthier_train_max_steps 100000\n"

    slow = 1.0
    async with (
        FakeCluster(held) as cluster,
        PodMetrics(text) as pods,
        running(cluster, settings(progress_every=slow), url=pods.url) as operator,
    ):
        operator._scraper.every = 0.02  # pods are read far more often than the status may be written
        job = cluster.create(fine_tune())
        await until("progress", lambda: cluster.get("FineTuneJob", "tune").get("status", {}).get("progress"))
        first, began = len(cluster.calls), asyncio.get_running_loop().time()
        await asyncio.sleep(2.5)
        writes = [c for c in cluster.calls[first:] if c.kind == "FineTuneJob"]
        assert pods.reads > 20
        assert 1 <= len(writes) <= (asyncio.get_running_loop().time() - began) / slow + 1
        cluster.change(job, lambda o: o["spec"].update(suspend=True))
        asked = asyncio.get_running_loop().time()
        await until("suspended", lambda: condition(cluster, "FineTuneJob", "tune", "Suspended"))
        assert asyncio.get_running_loop().time() - asked < 0.9 * slow


LARGE = "".join(f"a{i} 1\n" for i in range(100_000))
PACKED = gzip.compress(b"luthier_train_step 5\n" * 200_000)


@dataclass(frozen=True)
class ReadCase:
    name: str
    answer: Callable[[web.Request], web.Response]
    result: str


READS = [
    ReadCase(
        name="metrics",
        answer=lambda _: web.Response(text="luthier_train_step 5\n"),
        result="ok",
    ),
    ReadCase(
        name="a megabyte",
        answer=lambda _: web.Response(text=LARGE),
        result="too_large",
    ),
    ReadCase(
        name="a few bytes that would become megabytes",
        answer=lambda _: web.Response(body=PACKED, headers={"Content-Encoding": "gzip"}),
        result="invalid",
    ),
    ReadCase(
        name="a redirection to somewhere inside the cluster",
        answer=lambda request: web.Response(status=302, headers={"Location": f"http://{request.host}/inside"}),
        result="refused",
    ),
    ReadCase(
        name="an error",
        answer=lambda _: web.Response(status=500),
        result="refused",
    ),
    ReadCase(
        name="what is no text",
        answer=lambda _: web.Response(body=b"\xff\xfe"),
        result="invalid",
    ),
]


@pytest.mark.parametrize("case", READS, ids=lambda case: case.name)
async def test_a_pod_may_answer_anything(case: ReadCase) -> None:
    """The operator is inside the cluster: a user's pod must neither fill its memory nor choose what it asks there."""
    store = with_job("tune", "default", 1)
    async with Pods(case.answer) as pods, scraping(store, pods) as metrics:
        await until("read", lambda: reads(metrics, case.result))
    assert pods.asked >= {"/0"}
    assert "/inside" not in pods.asked


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class SilentCase:
    name: str
    jobs: int
    pods_of_each: int
    at_once: int


SILENT = [
    SilentCase(
        name="one job with many shards",
        jobs=1,
        pods_of_each=320,
        at_once=AT_ONCE_OF_JOB,
    ),
    SilentCase(
        name="many jobs of one namespace",
        jobs=6,
        pods_of_each=4,
        at_once=AT_ONCE_OF_NAMESPACE,
    ),
]


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.name)
async def test_pods_that_do_not_answer_delay_nobody_else(case: SilentCase) -> None:
    store = with_job("tune", "default", 1)
    for number in range(case.jobs):
        with_job(f"silent-{number}", "other", case.pods_of_each, store)
    async with (
        Pods(hang) as silent,
        Pods(lambda _: web.Response(text="luthier_train_step 5\n")) as answers,
        scraping(store, answers, silent) as metrics,
    ):
        await until("ten readings of the other job", lambda: reads(metrics, "ok") >= 10)
        assert silent.most_at_once <= case.at_once


async def test_a_run_that_hangs_is_reported_once_and_written_no_more() -> None:
    age = 1.0

    def text(_: int) -> str:
        return f"luthier_train_step 12\nluthier_train_max_steps 30\nluthier_heartbeat_age_seconds {age}\n"

    async with (
        FakeCluster(held) as cluster,
        PodMetrics(text) as pods,
        running(cluster, settings(progress_every=0.05), url=pods.url),
    ):
        cluster.create(fine_tune())
        await until("progress", lambda: cluster.get("FineTuneJob", "tune").get("status", {}).get("progress"))
        age = 301.0
        await until("reported", lambda: cluster.get("FineTuneJob", "tune")["status"]["state"] == "NoStep")
        await until("an event", lambda: [e for e in cluster.all("Event") if e["reason"] == "NoStep"])
        first, enough = cluster.get("FineTuneJob", "tune"), pods.reads + 20

        def grow() -> bool:
            nonlocal age
            age += 1
            return pods.reads >= enough

        await until("read many times", grow)
        assert cluster.get("FineTuneJob", "tune") == first
        age = 0.5
        await until("runs again", lambda: cluster.get("FineTuneJob", "tune")["status"]["state"] == "Running")


@dataclass(frozen=True)
class UnansweredCase:
    name: str
    answers: list[str]
    """Result of each reading, 100 s apart."""
    expect: list[float | None]
    """Seconds of silence."""


UNANSWERED = [
    UnansweredCase(
        name="it is still starting",
        answers=["unreachable", "unreachable", "ok"],
        expect=[None, None, 0.0],
    ),
    UnansweredCase(
        name="its process hangs",
        answers=["ok", "timeout", "timeout", "ok"],
        expect=[0.0, 100.0, 200.0, 0.0],
    ),
    UnansweredCase(
        name="a NetworkPolicy keeps the operator out",
        answers=["timeout", "timeout", "timeout"],
        expect=[0.0, 100.0, 200.0],
    ),
]


@pytest.mark.parametrize("case", UNANSWERED, ids=lambda case: case.name)
def test_for_how_long_a_pod_has_not_answered(case: UnansweredCase) -> None:
    pod, found = PodReadings(), []
    for number, result in enumerate(case.answers):
        now = 1000.0 + 100 * number
        silence = pod.answered(now, {}) if result == "ok" else pod.failed(now, 15, Unreadable(result, "why"))
        found.append(silence.seconds if silence else None)
    assert found == case.expect


async def test_a_pod_that_cannot_be_read_is_read_less_and_less_often() -> None:
    store = with_job("broken", "other", 1, with_job("tune", "default", 1))
    async with (
        Pods(lambda _: web.Response(status=404)) as broken,
        Pods(lambda _: web.Response(text="luthier_train_step 5\n")) as answers,
        scraping(store, answers, broken) as metrics,
    ):
        await until("many readings of the other job", lambda: reads(metrics, "ok") >= 32)
        assert 1 <= reads(metrics, "refused") <= 7


async def test_the_interval_grows_with_the_jobs_and_is_shown() -> None:
    store, jobs = Store(), int(JOBS_PER_SECOND)
    for number in range(jobs):
        with_job(f"tune-{number}", "default", 1, store)
    async with Pods(lambda _: web.Response(text="")) as pods, scraping(store, pods) as metrics:
        await until("shown", lambda: b"luthier_progress_interval_seconds 1.0" in metrics.text(()))


@dataclass(frozen=True)
class ShareCase:
    name: str
    wanted: list[int]
    expect: int


SHARES = [
    ShareCase(name="no jobs", wanted=[], expect=1),
    ShareCase(name="all fit", wanted=[1, 2, 40], expect=40),
    ShareCase(name="the small leave their rest to the large", wanted=[1, 1, 4096], expect=98),
    ShareCase(name="the large share", wanted=[4096, 1, 1, 4096], expect=49),
    ShareCase(name="each has one at least", wanted=[5] * 200, expect=1),
]


@pytest.mark.parametrize("case", SHARES, ids=lambda case: case.name)
def test_readings_are_shared_fairly(case: ShareCase) -> None:
    assert fair_share(case.wanted, budget=100) == case.expect


ADDRESSES = [("10.1.2.3", "http://10.1.2.3:9464/metrics"), ("fd00::7", "http://[fd00::7]:9464/metrics")]


@pytest.mark.parametrize(("address", "expect"), ADDRESSES, ids=["IPv4", "IPv6"])
def test_where_the_metrics_of_a_pod_are(address: str, expect: str) -> None:
    assert pod_url({"status": {"podIP": address}}) == expect


async def test_pods_that_do_not_answer_are_no_error() -> None:
    async with (
        FakeCluster() as cluster,
        running(cluster, settings(progress_every=0.02), url=lambda pod: "http://127.0.0.1:1/") as operator,
    ):
        cluster.create(fine_tune())
        await until("complete", lambda: cluster.get("FineTuneJob", "tune").get("status", {}).get("state") == "Complete")
        assert operator.alive()
