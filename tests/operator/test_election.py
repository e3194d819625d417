"""Several operators: one works, by a Lease; when it goes, another one does.

The Lease lasts longer here than any test waits, except where it is to run out.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from fake_api import Call, Fault
from fake_cluster import FakeCluster
from harness import PATIENCE, Renew, Running, fine_tune, finished, start, until
from kubernetes.aio.client.configuration import Configuration

from luthier_operator.client import RESOURCES, ApiError, Client
from luthier_operator.election import LeaseLost
from luthier_operator.metrics import LEADS
from luthier_operator.model import Object

QUICK = Renew(within=1, attempt=0.5)


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


def sent_by(cluster: FakeCluster, candidate: Running) -> list[str]:
    """Writes of a candidate, those to the Lease left out."""
    return [str(call) for call in cluster.calls if call.sender == candidate.sender and call.kind != "Lease"]


class Held:
    """Holds the answers to the first child's creation until `released`, and with `lease` those to renewals for ever."""

    def __init__(self, cluster: FakeCluster, sender: str | None = None) -> None:
        self.calls: list[Call] = []
        self.released = asyncio.Event()
        self.lease = False
        self._sender = sender
        cluster.before_write = self._hold

    async def _hold(self, call: Call) -> None:
        if self._sender not in (None, call.sender):
            return
        if call.kind == "ConfigMap":
            self.calls.append(call)
            await self.released.wait()
        if call.kind == "Lease" and self.lease:
            await asyncio.Event().wait()


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
    partition: str, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks for is refused at once, or never answered. The job that it had begun is taken up."""
    monkeypatch.setattr("luthier_operator.queue.STOP_SECONDS", 0.5)  # reconciles in which nothing is ever answered
    async with FakeCluster() as cluster:
        first = start(cluster, identity="a", lasts=5, renew=QUICK)
        await leader(first)
        second = start(cluster, identity="b", lasts=5, renew=QUICK)
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


async def test_no_request_leaves_after_the_loss() -> None:
    """The first operator is in the middle of a reconcile, whose first request is answered only after the loss."""
    async with FakeCluster() as cluster:
        first = start(cluster, identity="a", lasts=5, renew=QUICK)
        await leader(first)
        second = start(cluster, identity="b", lasts=5, renew=QUICK)
        await until("stands by", second.operator.serving)
        held = Held(cluster, first.sender)
        cluster.create(fine_tune())
        await until("in the middle", lambda: held.calls)
        held.lease = True
        await until("the loss", lambda: first.election and not first.election.leads)
        sent = sent_by(cluster, first)
        held.released.set()
        with pytest.raises(LeaseLost):
            await first.task
        await leader(second)
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert sent_by(cluster, first) == sent
        await stop(second, first)


PROCESS = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
import harness
from luthier_operator.election import exit_at_once

class Server:
    url = sys.argv[1]

async def main():
    await harness.start(Server(), signals=True, identity="a", lost=exit_at_once).task

asyncio.run(main())
"""


Send = Callable[[Client], Awaitable[object]]
RESOURCE = RESOURCES["ConfigMap"]
NAMED: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "default"}}
LOST_WHILE: dict[str, tuple[list[bool], Send]] = {
    # What the Lease says at each question of one request
    "a connection is made for a read": ([False], lambda client: client.get(RESOURCE.path("default"))),
    "a connection is made for a watch": ([False], lambda client: anext(client.watch(RESOURCE, None, "", "1"))),
    "a connection is made for a write": ([False], lambda client: client.create(NAMED)),
    "the task that writes the body waits": ([True, False], lambda client: client.create(NAMED)),
}


@pytest.mark.parametrize(("answers", "send"), LOST_WHILE.values(), ids=LOST_WHILE)
async def test_not_a_byte_is_written_when_the_lease_is_lost_while(answers: list[bool], send: Send) -> None:
    received: list[bytes] = []

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())  # until the client closes the connection
        writer.close()

    said = iter(answers)
    async with await asyncio.start_server(receive, "127.0.0.1") as server:
        host, port = server.sockets[0].getsockname()
        client = Client(Configuration(host=f"http://{host}:{port}"), may_send=lambda: next(said))
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ApiError, match="not sent, because the Lease is lost"):
                await send(client)
        await client.close()
        await until("the connection is closed", lambda: len(received) == 1)
    assert (received, list(said)) == ([b""], [])


async def test_the_process_ends_at_once_whatever_it_waits_for() -> None:
    async with FakeCluster() as cluster:
        held = Held(cluster)
        cluster.create(fine_tune())
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, cluster.url, os.path.dirname(__file__)], stderr=subprocess.PIPE
        )
        try:
            await until("in the middle", lambda: held.calls)
            lease = cluster.get("Lease", "luthier", "system")
            assert lease
            cluster.change(lease, lambda o: o["spec"].update(holderIdentity="b", leaseDurationSeconds=60))
            _, output = await asyncio.wait_for(asyncio.to_thread(process.communicate), PATIENCE)
        finally:
            process.kill()
        assert process.returncode == 1
        assert b"the Lease is lost, and this process ends: system/luthier: b has taken it" in output
        assert b"Traceback" not in output


async def test_a_slow_answer_is_waited_for_within_the_window() -> None:
    """In a burst of jobs the API server is slow. Each answer takes longer here than the pause between two renewals."""
    async with FakeCluster() as cluster:

        async def slow(call: Call) -> None:
            if call.kind == "Lease":
                await asyncio.sleep(0.5)

        cluster.before_write = slow
        first = start(cluster, identity="a", renew=Renew(within=20, attempt=15, pause=0.05))
        await leader(first)
        await until("renewed", lambda: len([c for c in cluster.calls if str(c) == "PATCH Lease luthier"]) >= 4)
        assert first.operator.alive()
        await stop(first)


async def test_a_slow_answer_shortens_the_pause_before_the_next_renewal() -> None:
    """An answer and a pause and another answer take longer than the window; two answers do not."""
    async with FakeCluster() as cluster:

        async def slow(call: Call) -> None:
            if call.kind == "Lease":
                await asyncio.sleep(1)

        first = start(cluster, identity="a", renew=Renew(within=3.95, attempt=1.9, pause=2))
        await leader(first)
        cluster.before_write = slow
        await until("renewed", lambda: len([c for c in cluster.calls if str(c) == "PATCH Lease luthier"]) >= 3)
        assert first.operator.alive()
        await stop(first)


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
