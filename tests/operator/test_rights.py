"""The operator's role holds what it uses, and nothing else. What it lacks would fail all over `tests/operator`:
`fake_api` refuses it.
"""

from __future__ import annotations

import asyncio

from fake_api import Fault
from fake_cluster import FakeCluster
from harness import HUB, fine_tune, finished, generate, running, until
from rights import GRANTED, Right

from luthier_operator.events import Recorder
from luthier_operator.model import Event

# Asked by an admission plugin of the real API server (OwnerReferencesPermissionEnforcement), of an owner reference that
# blocks deletion.
OF_ADMISSION = {Right("luthier.dev", f"{plural}/finalizers", "update") for plural in ("finetunejobs", "generatejobs")}


async def test_every_right_is_used() -> None:
    """Whatever the operator ever does: both kinds, published, tried again after a conflict, deleted by their time to
    live.
    """
    async with FakeCluster() as cluster:
        for kind, name, job in (("FineTuneJob", "tune", fine_tune), ("GenerateJob", "gen", generate)):
            cluster.fault = lambda number, call, kind=kind: (
                Fault(answer=409) if call.subresource and call.kind == kind and number % 3 == 0 else None
            )
            async with running(cluster) as operator:
                found = cluster.create(job(hub=HUB))
                await until("complete", lambda kind=kind, name=name: finished(cluster, kind, name))
                child = uploader(cluster, name)
                cluster.change(found, lambda o: o["spec"].update(hub=HUB | {"branch": "other"}))
                await until(
                    "publishing again", lambda child=child, name=name: uploader(cluster, name) not in (None, child)
                )
                await until("complete again", lambda kind=kind, name=name: finished(cluster, kind, name))
                cluster.change(found, lambda o: o["spec"].update(ttlSecondsAfterFinished=0))
                await until("deleted", lambda kind=kind, name=name: cluster.get(kind, name) is None)
                recorder: Recorder = operator._events
                for _ in range(2):
                    recorder.record(found, Event("Normal", "Again", "and again"))
                # As for a Job without pods.
                assert await operator._client.warning({"kind": "Job", "metadata": found["metadata"]}) == ""
        # A group that is stopped, on the claim that the job before has left; by the one of several that holds the
        # Lease.
        async with running(cluster, identity="a"):
            again = cluster.create(fine_tune())
            await until("a group", lambda: cluster.get("JobSet", "ftj-tune-run"))
            cluster.change(again, lambda o: o["spec"].update(suspend=True))
            await until("no group", lambda: cluster.get("JobSet", "ftj-tune-run") is None)
        await asyncio.sleep(0)
        assert cluster.refused == set()
        assert sorted(map(str, GRANTED - OF_ADMISSION - cluster.used)) == []


def uploader(cluster: FakeCluster, name: str) -> str | None:
    """uid of the Job that publishes."""
    return next(
        (o["metadata"]["uid"] for o in cluster.all("Job", **{"luthier.dev/job": name, "luthier.dev/phase": "publish"})),
        None,
    )
