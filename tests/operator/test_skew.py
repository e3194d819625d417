"""Operator and CRD of different versions: nothing runs twice, nothing is lost, and the user is told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from fake_api import Fault, Object, Refused, check_status
from fake_cluster import FakeCluster, Outcome, Pod, all_well
from harness import HUB, condition, condition_with, fine_tune, finished, holds, running, start, until

TIME = "2026-03-01T12:00:00Z"
FOREIGN = {"type": "Admitted", "status": "True", "reason": "X", "message": "", "lastTransitionTime": TIME}
ODD = {"type": "Odd", "phase": "evaluate"}


def held_in(phase: str) -> Any:
    """A script in which the pods of `phase` run until they are released."""
    return lambda pod: Outcome(hold=True) if pod.phase == phase else all_well(pod)


def job(cluster: FakeCluster, name: str = "tune") -> Object:
    found = cluster.get("FineTuneJob", name)
    assert found is not None
    return found


def events(cluster: FakeCluster, reason: str) -> list[str]:
    return [e["message"] for e in cluster.all("Event") if e["reason"] == reason]


@dataclass(frozen=True)
class ForeignCase:
    name: str
    change: dict[str, Any]
    """Fields that another program or version writes into the status of a finished job."""


FOREIGN_CASES = [
    ForeignCase(
        name="a condition of an unknown type",
        change={"conditions": [FOREIGN]},
    ),
    ForeignCase(
        name="a condition that is none",
        change={"conditions": [ODD]},
    ),
    ForeignCase(
        name="an unknown field",
        change={"later": {"deep": [1]}},
    ),
    ForeignCase(
        name="a known field of another type",
        change={"progress": {"step": "three"}},
    ),
]


@pytest.mark.parametrize("case", FOREIGN_CASES, ids=lambda case: case.name)
async def test_a_finished_job_stays_finished_whatever_others_write_into_its_status(case: ForeignCase) -> None:
    async with FakeCluster() as cluster:
        async with running(cluster):
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        for kind in ("Job", "JobSet"):  # as a user who tidies up
            for child in cluster.all(kind):
                cluster.delete(child)
        conditions = [*job(cluster)["status"]["conditions"], *case.change.get("conditions", [])]
        written = job(cluster)["status"] | case.change | {"conditions": conditions}
        cluster.change(job(cluster), lambda o: o.update(status=written))
        started = len(cluster.started)
        async with running(cluster) as operator:
            await operator.ready.wait()
            await asyncio.sleep(0.5)
        assert len(cluster.started) == started
        assert job(cluster)["status"] == written, "nothing of it is understood, and nothing is written"


@pytest.mark.parametrize("phase", ["prepare", "run", "publish"])
async def test_a_field_that_a_newer_crd_has_added_stops_no_job_in_any_phase(phase: str) -> None:
    async with FakeCluster(held_in(phase)) as cluster, running(cluster):
        cluster.create(fine_tune(hub=HUB))
        await until("the phase", lambda: cluster.pods("tune", phase))
        cluster.change(job(cluster), lambda o: o["spec"].update(newField="default"))
        await until("said", lambda: holds(cluster, "FineTuneJob", "tune", "FieldsIgnored"))
        assert condition(cluster, "FineTuneJob", "tune", "FieldsIgnored")["message"].startswith(
            "spec.newField: this operator (0.1.0) does not know the field and ignores it"
        )
        assert holds(cluster, "FineTuneJob", "tune", "Accepted")
        for pod in cluster.pods("tune", phase):
            cluster.release(pod, all_well(Pod("tune", phase, 0, 0)))
        cluster.script = all_well
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        await until("posted", lambda: len(events(cluster, "UnknownFields")) == 1)
        assert "newField" not in cluster.get("ConfigMap", "ftj-tune")["data"]["run.json"]


async def test_a_job_of_a_newer_crd_can_be_suspended_and_goes_on_without_the_field() -> None:
    async with FakeCluster(held_in("run")) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("running", lambda: holds(cluster, "FineTuneJob", "tune", "Running"))
        cluster.change(job(cluster), lambda o: o["spec"].update(newField="default", suspend=True))
        await until("suspended", lambda: holds(cluster, "FineTuneJob", "tune", "Suspended"))
        await until("no pods", lambda: not cluster.pods("tune", "run"))
        cluster.script = all_well
        cluster.change(job(cluster), lambda o: (o["spec"].pop("newField"), o["spec"].update(suspend=False)))
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        assert condition(cluster, "FineTuneJob", "tune", "FieldsIgnored") is None


async def test_a_value_that_only_a_newer_operator_knows_is_left_to_it() -> None:
    async with FakeCluster(held_in("run")) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("running", lambda: holds(cluster, "FineTuneJob", "tune", "Running"))
        task = job(cluster)["spec"]["task"]
        cluster.change(job(cluster), lambda o: o["spec"].update(task="telepathy"))
        said = await until("said", lambda: condition_with(cluster, "FineTuneJob", "tune", "Accepted", "NotUnderstood"))
        assert "\nspec.task: input should be 'causal-lm'" in said["message"]
        await until("posted", lambda: len(events(cluster, "NotUnderstood")) == 1)
        assert (job(cluster)["status"]["state"], len(cluster.pods("tune", "run"))) == ("Running", 2)
        written = cluster.writes
        cluster.change(job(cluster), lambda o: o["metadata"].update(annotations={"a": "b"}))
        await asyncio.sleep(0.3)
        assert cluster.writes == written
        cluster.change(job(cluster), lambda o: o["spec"].update(suspend=True))
        await until("no pods", lambda: not cluster.pods("tune", "run"))
        await until("suspended", lambda: holds(cluster, "FineTuneJob", "tune", "Suspended"))
        # The newer operator is there.
        cluster.script = all_well
        cluster.change(job(cluster), lambda o: o["spec"].update(suspend=False, task=task))
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        assert holds(cluster, "FineTuneJob", "tune", "Accepted")


async def test_what_a_newer_operator_has_written_into_a_status_is_kept() -> None:
    async with FakeCluster(held_in("run")) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("running", lambda: holds(cluster, "FineTuneJob", "tune", "Running"))
        cluster.schema = lambda status: None  # that of the newer CRD
        later = {"later": {"deep": [1]}, "startTime": job(cluster)["status"]["startTime"]}
        cluster.change(
            job(cluster), lambda o: o["status"].update(**later, conditions=[*o["status"]["conditions"], FOREIGN, ODD])
        )
        for pod in cluster.pods("tune", "run"):
            cluster.release(pod, all_well(Pod("tune", "run", 0, 0)))
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        status = job(cluster)["status"]
        assert {name: status[name] for name in later} == later
        assert [c for c in status["conditions"] if c in (FOREIGN, ODD)] == [FOREIGN, ODD]


async def test_nothing_is_created_while_an_older_crd_refuses_the_status() -> None:
    async with FakeCluster() as cluster, running(cluster):
        cluster.fault = lambda number, call: Fault(answer=422) if call.subresource == "status" else None
        cluster.create(fine_tune())
        await until("tried", lambda: len([c for c in cluster.calls if c.subresource == "status"]) > 3)
        children = [c for k in ("ConfigMap", "PersistentVolumeClaim", "Job") for c in cluster.all(k)]
        assert (children, job(cluster).get("status")) == ([], None)
        assert events(cluster, "StatusRefused") == [
            "The CRDs and the operator have different versions: install both from the same chart. Until then nothing is"
            " created. The API server refuses the status of the job: a fault"
        ]
        cluster.fault = lambda number, call: None
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))


async def test_a_run_is_not_started_while_an_older_crd_refuses_what_prepare_has_found() -> None:
    async with FakeCluster() as cluster, running(cluster):

        def older(status: Object) -> None:
            if "prepared" in status:
                raise Refused(422, "Invalid", "status.prepared: unknown")

        cluster.schema = older
        cluster.create(fine_tune())
        await until("said", lambda: events(cluster, "StatusRefused"))
        assert cluster.all("JobSet") == []
        cluster.schema = check_status
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))


@pytest.mark.parametrize("phase", ["prepare", "run", "publish"])
async def test_an_operator_that_is_replaced_goes_on_in_any_phase_with_what_an_older_crd_has_kept(phase: str) -> None:
    """The older CRD drops what it does not know: here everything but the conditions."""
    async with FakeCluster(held_in(phase)) as cluster:
        write = cluster._write

        def dropping(request: Any, kind: str, ns: str, name: str, sub: str, body: Any) -> Any:
            if sub == "status":
                kept = {"conditions", "state", "startTime", "completionTime"}
                body["status"] = {k: v for k, v in body["status"].items() if k in kept}
            return write(request, kind, ns, name, sub, body)

        cluster._write = dropping  # type: ignore[method-assign]
        first = start(cluster)
        cluster.create(fine_tune(hub=HUB))
        await until("the phase", lambda: cluster.pods("tune", phase))
        await first.kill()
        async with running(cluster):
            for pod in cluster.pods("tune", phase):
                cluster.release(pod, all_well(Pod("tune", phase, 0, 0)))
            cluster.script = all_well
            await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
            await asyncio.sleep(0.3)
            written = cluster.writes
            await asyncio.sleep(0.3)
            assert cluster.writes == written
        assert len([p for p in cluster.started if p.phase == phase]) == (2 if phase == "run" else 1)
