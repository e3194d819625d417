"""Namespaces that are being deleted: no storm of creations, and no child of a job that keeps the namespace for ever."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from fake_api import Call, Refused, in_terminating
from fake_cluster import FakeCluster, Outcome, Pod, all_well, said
from harness import fine_tune, finished, generate, running, start, until

from luthier_operator import namespaces


def runs(pod: Pod) -> Outcome:
    """The pods of `run` go on until they are stopped."""
    return Outcome(hold=True) if pod.phase == "run" else all_well(pod)


def creations(cluster: FakeCluster) -> list[Call]:
    return [call for call in cluster.calls if call.verb == "POST" and call.kind != "Event"]


def deletions(cluster: FakeCluster) -> list[str]:
    return [f"{call.kind} {call.name}" for call in cluster.calls if call.verb == "DELETE"]


async def at_work(cluster: FakeCluster, *names: str) -> None:
    """Wait until both pods of each job run."""

    def phases(name: str) -> list[str]:
        return [pod["status"]["phase"] for pod in cluster.pods(name, "run")]

    for name in names:
        await until(name, lambda name=name: phases(name) == ["Running"] * 2)  # type: ignore[misc]


async def test_a_namespace_that_is_being_deleted_makes_no_storm() -> None:
    async with FakeCluster() as cluster:
        cluster.terminating.add("default")
        async with running(cluster):
            for number in range(50):
                cluster.create(fine_tune(f"job-{number}"))
            await until("looked at", lambda: creations(cluster))
            await asyncio.sleep(1)
            assert len(creations(cluster)) <= 4, "once for each worker"
            statuses = [c for c in cluster.calls if c.subresource == "status"]
            assert len(statuses) <= 4
            reasons = {
                c["reason"] for o in cluster.all("FineTuneJob") for c in o.get("status", {}).get("conditions", [])
            }
            assert "FailedCreate" not in reasons


async def test_a_namespace_that_is_being_deleted_is_tried_by_one_job_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "TERMINATING_SECONDS", 0.5)
    async with FakeCluster() as cluster:
        cluster.terminating.add("default")
        async with running(cluster):
            for number in range(20):
                cluster.create(fine_tune(f"job-{number}"))
            await until("tried by all workers", lambda: creations(cluster))
            await asyncio.sleep(0.3)
            by_all = len(creations(cluster))
            await asyncio.sleep(1.2)
            assert 1 <= len(creations(cluster)) - by_all <= 3, "once in each half second"
            # Another namespace of this name.
            cluster.terminating.clear()
            for number in range(20):
                await until("complete", lambda n=number: finished(cluster, "FineTuneJob", f"job-{n}"))  # type: ignore[misc]


async def test_a_namespace_with_jobs_at_work_can_be_deleted() -> None:
    """Of several jobs, each child is deleted once, and only where it holds pods."""
    async with FakeCluster(runs) as cluster, running(cluster):
        cluster.create(fine_tune())
        names = [f"gen-{number}" for number in range(20)]
        for name in names:
            cluster.create(generate(name))
        await at_work(cluster, "tune", *names)
        before = len(creations(cluster))
        cluster.delete_namespace("default")
        await until("gone", lambda: not cluster.in_namespace("default"))
        assert sorted(deletions(cluster)) == sorted(f"Job gj-{name}-run" for name in names)
        asked = creations(cluster)[before:]
        assert len(asked) <= len(names) + 8, "each asks before it deletes, beside one attempt of each worker to create"


async def test_a_namespace_can_be_deleted_after_a_restart_of_the_operator() -> None:
    async with FakeCluster(runs) as cluster:
        first = start(cluster)
        cluster.create(generate())
        await at_work(cluster, "gen")
        await first.kill()
        cluster.delete_namespace("default")
        await until("held", lambda: all(p["metadata"].get("deletionTimestamp") for p in cluster.pods("gen", "run")))
        await asyncio.sleep(0.1)
        assert cluster.in_namespace("default"), "the fake cluster holds pods as the real one does"
        async with running(cluster):
            await until("gone", lambda: not cluster.in_namespace("default"))


async def test_a_namespace_is_let_go_by_a_job_that_is_not_understood() -> None:
    async with FakeCluster(runs) as cluster, running(cluster):
        found = cluster.create(generate())
        await at_work(cluster, "gen")
        cluster.change(found, lambda o: o["spec"].update(task="telepathy"))
        cluster.delete_namespace("default")
        await until("gone", lambda: not cluster.in_namespace("default"))


def other_refusal() -> Refused:
    return Refused(403, "Forbidden", "admission webhook denied the request because it is being terminated")


def wrong_code() -> Refused:
    refused = in_terminating("default", "ConfigMap", "gj-gen")
    refused.code = 500
    return refused


@dataclass(frozen=True)
class AnswerCase:
    name: str
    answer: Refused | None = None
    """To the question whether the namespace is being deleted. Else what the API server says by itself."""
    lost: bool = False
    """Whether the config map of the job is gone, so that it could be created."""


ANSWERS = [
    AnswerCase(name="the config map exists"),
    AnswerCase(name="it could be created", lost=True),
    AnswerCase(name="a policy refuses it, in the same words", answer=other_refusal()),
    AnswerCase(name="no quota is left", answer=Refused(403, "Forbidden", "exceeded quota: configmaps")),
    AnswerCase(name="a webhook knows no dry run", answer=Refused(400, "BadRequest", "does not support dry run")),
    AnswerCase(name="an error with that cause", answer=wrong_code()),
]


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case.name)
async def test_a_job_in_a_healthy_namespace_keeps_its_children(
    case: AnswerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod of a shard was deleted, and its Job delays the next one."""
    monkeypatch.setattr(namespaces, "ASK_SECONDS", 0.1)
    async with FakeCluster(runs) as cluster, running(cluster):
        cluster.create(generate())
        await at_work(cluster, "gen")
        child = cluster.get("Job", "gj-gen-run")
        asked = []

        async def answer(call: Call) -> None:
            if call.dry_run:
                asked.append(call)
                if case.lost:
                    cluster.objects.pop(("ConfigMap", "default", "gj-gen"), None)
                if case.answer:
                    raise case.answer

        cluster.before_write = answer
        cluster.delays.add("run")
        pod = cluster.pods("gen", "run")[0]
        cluster.delete(pod)
        cluster.release(pod, Outcome(75, said("run", 75, saved=True)))
        await until("asked again", lambda: len(asked) >= 3)
        cluster.end_delays()
        await at_work(cluster, "gen")
        after = cluster.get("Job", "gj-gen-run")
        assert child is not None
        assert after is not None
        assert after["metadata"]["uid"] == child["metadata"]["uid"]
        assert deletions(cluster) == []
        assert bool(cluster.get("ConfigMap", "gj-gen")) != case.lost, "nothing is created by the question"


async def test_many_pods_that_are_held_in_a_healthy_namespace_ask_once() -> None:
    async with FakeCluster(runs) as cluster, running(cluster):
        names = [f"gen-{number}" for number in range(20)]
        for name in names:
            cluster.create(generate(name))
        await at_work(cluster, *names)
        cluster.delays.add("run")
        for name in names:
            for pod in cluster.pods(name, "run"):
                cluster.delete(pod)
                cluster.release(pod, Outcome(75, said("run", 75, saved=True)))
        await until("asked", lambda: [c for c in creations(cluster) if c.dry_run])
        await asyncio.sleep(1)
        assert len([c for c in creations(cluster) if c.dry_run]) == 1
        assert deletions(cluster) == []
