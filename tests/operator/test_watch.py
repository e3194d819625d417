"""What the operator does not see: events that are lost, histories that are gone, kinds that come later."""

from __future__ import annotations

import asyncio
import functools

import pytest
from fake_cluster import FakeCluster, Outcome, Pod, all_well
from harness import FAST, condition, fine_tune, finished, generate, running, settings, until

from luthier_api.kinds import JobKind
from luthier_operator.app import Pace
from luthier_operator.client import GATHER_LIMIT, GATHER_SECONDS, next_pause
from luthier_operator.model import Key

ONCE, MOST = GATHER_SECONDS, GATHER_LIMIT
RELISTS = Pace(relist=0.2, settle=0.2, discovery=0.05, restart=0.05, backoff=0.02, flush=0.2)


def held(pod: Pod) -> Outcome:
    return Outcome(hold=True) if pod.phase == "run" else all_well(pod)


async def test_watches_that_end_lose_nothing() -> None:
    async with FakeCluster(held) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("running", lambda: len(cluster.pods("tune", "run")) == 2)
        cluster.break_watches()
        for pod in cluster.pods("tune", "run"):
            cluster.release(pod, all_well(Pod("tune", "run", 0, 0)))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


async def test_after_a_410_what_was_deleted_meanwhile_is_forgotten() -> None:
    """kopf never says that it is gone; its own new list is what we go by, long before the next of ours is due."""
    async with FakeCluster(held) as cluster, running(cluster) as operator:
        job = cluster.create(fine_tune())
        cluster.create(generate())
        await until("seen", lambda: len(cluster.pods("tune", "run")) == 2 and len(list(operator.store.pods())) >= 4)
        cluster.lost = lambda event, found: event == "DELETED"
        await asyncio.sleep(2 * FAST.settle)  # the first list of ours is over
        cluster.delete(job)
        await until("gone", lambda: not cluster.pods("tune", "run"))
        cluster.compact()
        await until("forgotten", lambda: operator.store.job(Key(JobKind.FINE_TUNE, "default", "tune")) is None)
        await until("its pods, too", lambda: not [p for owner, p in operator.store.pods() if owner.key.name == "tune"])
        assert operator.store.job(Key(JobKind.GENERATE, "default", "gen")) is not None


async def test_events_that_are_lost_are_made_up_for_by_the_next_list() -> None:
    async with FakeCluster() as cluster, running(cluster, pace=RELISTS):
        cluster.lost = lambda event, found: True
        cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


async def test_a_child_that_somebody_deletes_comes_back() -> None:
    async with FakeCluster(lambda pod: Outcome(hold=True)) as cluster, running(cluster):
        cluster.create(fine_tune())
        first = await until(
            "begun", lambda: {"Job", "Pod"} <= cluster.watched and cluster.get("Job", "ftj-tune-prepare")
        )
        cluster.delete(first)
        second = await until("begun again", lambda: cluster.get("Job", "ftj-tune-prepare"))
        assert second["metadata"]["uid"] != first["metadata"]["uid"]


async def test_a_child_that_is_deleted_between_two_watches_comes_back() -> None:
    """The list after a 410 is empty, and still tells that the child is gone, long before a periodic list is due."""
    async with FakeCluster(lambda pod: Outcome(hold=True)) as cluster, running(cluster):
        cluster.create(fine_tune())
        first = await until("begun", lambda: "Job" in cluster.watched and cluster.get("Job", "ftj-tune-prepare"))
        cluster.lost = lambda event, found: event == "DELETED" and found["kind"] == "Job"
        cluster.delete(first)
        cluster.compact()
        second = await until("begun again", lambda: cluster.get("Job", "ftj-tune-prepare"))
        assert second["metadata"]["uid"] != first["metadata"]["uid"]


async def test_each_kind_of_child_is_listed_once() -> None:
    """The watch goes on from the version of the list, also after it has ended."""
    async with FakeCluster() as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("watched", lambda: {"Job", "JobSet", "Pod"} <= cluster.watched)
        cluster.break_watches()
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        lists = [call.kind for call in cluster.calls if call.verb == "LIST" and call.kind in ("Job", "JobSet", "Pod")]
        assert sorted(lists) == ["Job", "JobSet", "Pod"]


async def test_a_job_of_the_same_name_is_another_job() -> None:
    async with FakeCluster() as cluster, running(cluster):
        job = cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        cluster.delete(job)
        again = cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        owners = {
            o["uid"]
            for kind in ("Job", "JobSet")
            for c in cluster.all(kind)
            for o in c["metadata"]["ownerReferences"]
            if o["kind"] == "FineTuneJob"
        }
        assert owners == {again["metadata"]["uid"]}


async def test_jobset_may_come_later_and_go() -> None:
    async with FakeCluster(held) as cluster:
        cluster.missing.add("jobsets")
        async with running(cluster) as operator:
            cluster.create(fine_tune())
            cluster.create(generate())
            accepted = await until("said", lambda: condition(cluster, "FineTuneJob", "tune", "Accepted"))
            assert (accepted["status"], accepted["reason"]) == ("False", "JobSetMissing")
            assert "kubectl apply --server-side -f https://github.com/kubernetes-sigs/jobset/" in accepted["message"]
            await until("the other kind does not need it", lambda: cluster.pods("gen", "run"))
            cluster.missing.clear()
            await until("picked up", lambda: len(cluster.pods("tune", "run")) == 2)
            cluster.missing.add("jobsets")
            cluster.break_watches()
            await until("noticed", lambda: not operator.store.jobset_installed)
            assert operator.alive()


async def test_our_own_kinds_may_come_later() -> None:
    async with FakeCluster() as cluster:
        cluster.missing |= {"finetunejobs", "generatejobs"}
        async with running(cluster) as operator:
            await asyncio.sleep(0.2)
            assert not operator.ready.is_set()
            cluster.missing.clear()
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


async def test_only_the_namespaces_that_are_asked_for() -> None:
    async with FakeCluster() as cluster, running(cluster, settings(namespaces="mine")):
        for namespace in ("mine", "other"):
            job = fine_tune()
            job["metadata"]["namespace"] = namespace
            cluster.create(job)
        await until(
            "complete",
            lambda: any(
                c["type"] == "Complete"
                for c in cluster.get("FineTuneJob", "tune", "mine").get("status", {}).get("conditions", [])
            ),
        )
        assert "status" not in cluster.get("FineTuneJob", "tune", "other")


async def test_the_api_server_may_be_away_at_the_start() -> None:
    async with FakeCluster() as cluster:
        discover, cluster._discover = cluster._discover, lambda path: 1 / 0  # type: ignore[method-assign,assignment]
        async with running(cluster, pace=FAST) as operator:
            await asyncio.sleep(0.2)
            assert operator.alive()
            cluster._discover = discover  # type: ignore[method-assign]
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


@pytest.mark.parametrize(
    ("waited", "rests"),
    [
        pytest.param([5.0], ONCE, id="the first event after a pause"),
        pytest.param([5.0, 0.0], 2 * ONCE, id="there were more after the rest"),
        pytest.param([5.0, *[0.01] * 20], MOST, id="again and again, but not for long"),
        pytest.param([5.0, 0.0, 0.0, ONCE], ONCE, id="once there was nothing for as long as a rest"),
    ],
)
def test_a_watch_rests_for_longer_while_events_keep_coming(waited: list[float], rests: float) -> None:
    assert functools.reduce(next_pause, waited, ONCE) == rests
