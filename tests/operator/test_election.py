"""Several operators: one works, by a Lease; when it goes, another one does.

The Lease lasts longer here than any test waits, except where it is to run out.
"""

from __future__ import annotations

import asyncio

import pytest
from fake_api import Fault
from fake_cluster import FakeCluster
from harness import Running, fine_tune, finished, start, until

from luthier_operator.election import LeaseLost
from luthier_operator.metrics import LEADS


async def leader(*candidates: Running) -> Running:
    def leads() -> Running | None:
        return next((c for c in candidates if not c.task.done() and c.operator.ready.is_set()), None)

    found: Running = await until("one leads", leads)
    return found


async def stop(*candidates: Running) -> None:
    for candidate in candidates:
        candidate.operator.stop()
    await asyncio.gather(*(c.task for c in candidates), return_exceptions=True)
    for candidate in candidates:
        await candidate.client.close()


def held_by(cluster: FakeCluster) -> str | None:
    lease = cluster.get("Lease", "luthier", "system")
    return lease and lease["spec"].get("holderIdentity")


async def test_one_works_and_the_other_asks_for_the_lease_alone() -> None:
    async with FakeCluster() as cluster:
        first = start(cluster, identity="a")
        await leader(first)
        second = start(cluster, identity="b")
        cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        await until("stands by", second.operator.serving)
        assert held_by(cluster) == "a"
        assert cluster.asked[second.sender] == {"Lease"}
        assert (first.operator.alive(), second.operator.alive(), second.operator.ready.is_set()) == (True, True, False)
        for candidate, value in ((first, 1), (second, 0)):
            assert f'{LEADS.name}{{name="system/luthier"}} {value}.0'.encode() in candidate.operator.metrics_text()
        await stop(second, first)


async def test_one_that_is_stopped_gives_the_lease_back() -> None:
    async with FakeCluster() as cluster:
        first = start(cluster, identity="a")
        await leader(first)
        second = start(cluster, identity="b")
        await until("stands by", second.operator.serving)
        await stop(first)
        assert held_by(cluster) is None
        await leader(second)
        cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        await stop(second)


@pytest.mark.parametrize(("partition", "said"), [("killed", "0 Unreachable"), ("unanswered", "no answer")])
async def test_one_that_cannot_renew_is_gone_before_another_begins(
    partition: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What it asks for is refused at once, or never answered. The job that it had begun is taken up."""
    async with FakeCluster() as cluster:
        first = start(cluster, identity="a", lasts=5)
        await leader(first)
        second = start(cluster, identity="b", lasts=5)
        cluster.create(fine_tune())
        await until("stands by", second.operator.serving)
        getattr(cluster, partition).add(first.sender)
        await until("at work no more", lambda: not first.operator.alive())
        assert f"the Lease system/luthier: {said}" in caplog.text
        assert held_by(cluster) == "a"
        assert not second.operator.ready.is_set()
        await leader(second)
        assert held_by(cluster) == "b"
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        with pytest.raises(LeaseLost):
            await first.task
        await stop(second, first)


async def test_a_container_that_starts_again_in_its_pod_goes_on_at_once() -> None:
    async with FakeCluster() as cluster:
        first = start(cluster, identity="a")
        await leader(first)
        cluster.killed.add(first.sender)
        await first.kill()
        again = start(cluster, identity="a")
        assert await leader(again) is again
        assert held_by(cluster) == "a"
        await stop(again)


async def test_without_the_right_to_the_lease_it_is_not_ready_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeCluster() as cluster:
        cluster.fault = lambda number, call: Fault(answer=403) if call.kind == "Lease" else None
        candidate = start(cluster, identity="a")
        await until("said", lambda: "the Lease system/luthier: 403" in caplog.text)
        assert (candidate.operator.alive(), candidate.operator.serving()) == (True, False)
        cluster.fault = lambda number, call: None
        await leader(candidate)
        await stop(candidate)


async def test_one_that_stands_by_can_be_stopped() -> None:
    async with FakeCluster() as cluster:
        first, second = start(cluster, identity="a"), start(cluster, identity="b")
        leads = await leader(first, second)
        waits = second if leads is first else first
        await until("stands by", waits.operator.serving)
        waits.operator.stop()
        await asyncio.wait_for(waits.task, 5)
        assert held_by(cluster) == ("a" if leads is first else "b")
        await stop(waits, leads)
