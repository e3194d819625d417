"""Progress: read from the pods, written seldom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import pytest
from aiohttp import web
from fake_cluster import FakeCluster, Object, Outcome, Pod, all_well, said
from harness import condition, fine_tune, generate, running, settings, until

from luthier_operator import naming
from luthier_operator.progress import Scraper, pod_url
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
        operator._scraper._every = 0.02  # pods are read far more often than the status may be written
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


async def test_a_pod_sends_us_nowhere_else() -> None:
    """The operator stands inside the cluster: a user's pod must not choose what it asks there."""
    asked: list[str] = []

    async def inside(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(text="luthier_train_step 5\nluthier_train_max_steps 10\n")

    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPFound(f"http://{request.host}/inside")

    app = web.Application()
    app.add_routes([web.get("/inside", inside), web.get("/metrics", redirect)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    scraper = Scraper(
        Store(),
        lambda key: None,
        15,
        lambda pod: f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/metrics",
    )  # type: ignore[union-attr]
    async with aiohttp.ClientSession() as session:
        assert await scraper._read(session, {"metadata": {"name": "pod"}}) == {}
    await runner.cleanup()
    assert asked == []


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
