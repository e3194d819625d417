"""Workloads of Kueue as the operator sees them: those of its own children, where Kueue is installed and may be read."""

from __future__ import annotations

from typing import Any

import fake_api
import pytest
from fake_api import Fault
from fake_cluster import FakeCluster
from harness import condition, fine_tune, running, settings, until
from rights import GRANTED

Object = dict[str, Any]
QUEUED = fine_tune(scheduling={"queueName": "gpu"})


async def queued_child(cluster: FakeCluster) -> Object:
    """The JobSet, suspended as by Kueue's webhook."""
    cluster.create(QUEUED)
    jobset = await until("created", lambda: cluster.get("JobSet", "ftj-tune-run"))
    return cluster.change(jobset, lambda o: o["spec"].update(suspend=True))


def workload_of(child: Object, message: str = "no quota") -> Object:
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "Workload",
        "metadata": {
            "name": f"jobset-{child['metadata']['name']}-21a0d",
            "namespace": child["metadata"]["namespace"],
            "ownerReferences": [
                {"kind": "JobSet", "name": child["metadata"]["name"], "uid": child["metadata"]["uid"]},
            ],
        },
        "status": {
            "conditions": [{"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}]
        },
    }


def admitted(cluster: FakeCluster) -> str:
    found = condition(cluster, "FineTuneJob", "tune", "Admitted") or {}
    return f"{found.get('status')} {found.get('reason')} {found.get('message')}"


async def test_the_workload_of_a_child_is_told() -> None:
    async with FakeCluster() as cluster, running(cluster):
        jobset = await queued_child(cluster)
        workload = cluster.create(workload_of(jobset))
        await until("told", lambda: admitted(cluster) == 'False Pending queue "gpu": no quota')
        cluster.change(workload, lambda o: o["status"]["conditions"][0].update(reason="Inadmissible"))
        await until("changed", lambda: admitted(cluster) == 'False Inadmissible queue "gpu": no quota')


async def test_kueue_may_come_later_and_go() -> None:
    async with FakeCluster() as cluster:
        cluster.missing.add("workloads")
        # Another text of a condition is mere progress, and is written no more often than progress is.
        async with running(cluster, settings(progress_every=0.2)) as operator:
            jobset = await queued_child(cluster)
            await until("without Kueue", lambda: "see `kubectl describe workloads`" in admitted(cluster))
            cluster.create(workload_of(jobset))
            cluster.missing.clear()
            await until("read", lambda: admitted(cluster) == 'False Pending queue "gpu": no quota')
            cluster.missing.add("workloads")
            cluster.break_watches()
            await until("noticed", lambda: not operator.store.workloads.listed)
            assert operator.alive()


async def test_while_kueue_is_down_its_webhooks_refuse_children_and_the_job_says_so() -> None:
    down = True
    async with FakeCluster() as cluster, running(cluster):
        cluster.fault = lambda number, call: Fault(answer=500) if down and call.kind == "JobSet" else None
        cluster.create(QUEUED)
        await until(
            "told", lambda: (condition(cluster, "FineTuneJob", "tune", "Running") or {}).get("reason") == "FailedCreate"
        )
        down = False
        await until("tried again", lambda: cluster.get("JobSet", "ftj-tune-run"))


async def test_a_role_without_workloads_costs_only_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    rights = frozenset(right for right in GRANTED if right.resource != "workloads")
    monkeypatch.setattr(fake_api, "GRANTED", rights)
    async with FakeCluster() as cluster, running(cluster) as operator:
        jobset = await queued_child(cluster)
        cluster.create(workload_of(jobset))
        await until("told without", lambda: "see `kubectl describe workloads`" in admitted(cluster))
        assert operator.alive()
