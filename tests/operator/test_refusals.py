"""A Job whose pods the cluster refuses: the operator reads the Job's Events, and the user reads the cluster's words."""

from __future__ import annotations

from typing import Any

import pytest
from fake_cluster import FakeCluster
from harness import condition_with, fine_tune, running, until

from luthier_operator import reconcile, store
from luthier_operator.phases import waiting

QUOTA = (
    'pods "ftj-tune-prepare-0-" is forbidden: exceeded quota: small, requested: pods=1, used: pods=1, limited: pods=1'
)


class WithoutRoom(FakeCluster):
    """A namespace whose quota allows no further pod."""

    def _job(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        if not self.get("Event", f"{name}.refused"):
            self.create(refusal(job, QUOTA))


def refusal(job: dict[str, Any], message: str, **more: Any) -> dict[str, Any]:
    """An Event of the Job controller about pods that it may not create."""
    meta = job["metadata"]
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{meta['name']}.refused", "namespace": meta["namespace"]},
        "involvedObject": {"kind": "Job", "name": meta["name"], "uid": meta["uid"]},
        "type": "Warning",
        "reason": "FailedCreate",
        "message": message,
        "lastTimestamp": meta["creationTimestamp"],
    }
    return event | more


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "CREATED_SECONDS", 0.3)
    monkeypatch.setattr(waiting, "NO_POD_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "SECONDS_PER_POD", 0.0)
    monkeypatch.setattr(waiting, "ASK_AGAIN_SECONDS", 0.3)


async def test_the_user_reads_why_there_are_no_pods() -> None:
    async with WithoutRoom() as cluster, running(cluster):
        cluster.create(fine_tune())
        found = await until("told", lambda: condition_with(cluster, "FineTuneJob", "tune", "Prepared", "NoPods"))
        assert f"the cluster refuses the pods of Job ftj-tune-prepare: {QUOTA}" in found["message"]
        posted = await until("posted", lambda: [e for e in cluster.all("Event") if e["reason"] == "NoPods"])
        assert [QUOTA in event["message"] for event in posted] == [True]


async def test_a_backlog_is_no_alarm_and_a_later_refusal_is_found() -> None:
    class Busy(WithoutRoom):
        refuses = False

        def _job(self, job: dict[str, Any]) -> None:
            if self.refuses:
                super()._job(job)

    async with Busy() as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("asked twice", lambda: len([c for c in cluster.calls if str(c).startswith("LIST Event")]) > 1)
        assert condition_with(cluster, "FineTuneJob", "tune", "Prepared", "Preparing")
        cluster.refuses = True
        cluster._record("MODIFIED", cluster.all("Job")[0])
        await until("told", lambda: condition_with(cluster, "FineTuneJob", "tune", "Prepared", "NoPods"))


async def test_the_user_reads_that_no_scheduler_takes_the_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing happens then: no event tells of it."""

    class WithoutScheduler(FakeCluster):
        def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
            if manifest["kind"] == "Pod":
                del manifest["spec"]["nodeName"]
            return super().create(manifest)

        def _kubelet(self, pod: dict[str, Any]) -> None:
            pass

    for module in (reconcile, store, waiting):
        monkeypatch.setattr(module, "NO_SCHEDULER_SECONDS", 2.0)
    async with WithoutScheduler() as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("created", lambda: cluster.pods("tune", "prepare"))
        assert condition_with(cluster, "FineTuneJob", "tune", "Prepared", "Preparing")
        found = await until("told", lambda: condition_with(cluster, "FineTuneJob", "tune", "Prepared", "Unschedulable"))
        assert "has no node, and no scheduler has said why" in found["message"]
