"""Whatever happens to a write, the end is the same: no child twice, no pod more, the same status.

Each write of a whole life is, in a run of its own, refused, cut off before or after it has taken effect, or the
operator's last. The reference is a run in which nothing happens.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from fake_api import Call, Fault
from fake_cluster import FakeCluster, Object, Outcome, Pod, all_well, said
from harness import (
    FAST,
    HUB,
    condition,
    condition_with,
    fine_tune,
    finished,
    generate,
    holds,
    outlive,
    running,
    start,
    summary,
    until,
)

from luthier_operator import reconcile

AT_ONCE = 6

FAULTS = {
    "refused with 500": Fault(answer=500),
    "refused with 409": Fault(answer=409),
    "refused with 429": Fault(answer=429),
    "connection reset before": Fault(reset="before"),
    "answer lost": Fault(reset="after"),
    "operator killed before": Fault(reset="before", kill=True),
    "operator killed after": Fault(reset="after", kill=True),
}
JOBS: dict[str, Callable[[], Object]] = {
    "FineTuneJob": lambda: fine_tune("job", hub=HUB),
    "GenerateJob": lambda: generate("job", hub=HUB),
}


async def life(
    kind: str, fault: Callable[[int, Call], Fault | None] = lambda number, call: None
) -> tuple[Object, int, int]:
    """A job's whole life: the end, the number of writes, and of operators."""
    async with FakeCluster() as cluster:
        cluster.fault = fault
        cluster.create(JOBS[kind]())
        operators = await outlive(cluster, lambda: finished(cluster, kind, "job"))
        return summary(cluster), cluster.writes, operators


# The way of a write is the same for both kinds: what differs are the points at which an operator can die.
QUICK = ("operator killed after", "answer lost", "refused with 409")
MATRIX = [
    *(pytest.param("FineTuneJob", name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAULTS),
    pytest.param("GenerateJob", "operator killed after", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "name"), MATRIX)
async def test_a_fault_at_any_one_write_changes_nothing_in_the_end(kind: str, name: str) -> None:
    reference, writes, _ = await life(kind)
    assert reference["jobs"]["job"]["state"] == "Complete"
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(at: int) -> tuple[int, Object, int, int]:
        async with slots:
            return at, *await life(kind, lambda number, call: FAULTS[name] if number == at else None)

    for at, end, total, operators in await asyncio.gather(*(one(at) for at in range(1, writes + 1))):
        assert end == reference, f"after a fault at write {at}"
        if FAULTS[name].kill and at < total:  # who dies with the last write has left nothing to do
            assert operators == 2, f"nobody died at write {at}"


async def resumed(fault: Fault | None = None, at: int = 0) -> tuple[Object, int]:
    """A training that fails for want of memory and gets it: its end, and the number of writes after the change.

    Of these the one with the number `at` suffers `fault`.
    """
    repaired = False

    def script(pod: Pod) -> Outcome:
        if pod.phase != "run" or repaired:
            return all_well(pod)
        return Outcome(83, said("run", 83, step=350)) if pod.index == 0 else Outcome(hold=True)

    async with FakeCluster(script) as cluster:
        job = cluster.create(fine_tune("job"))
        await outlive(cluster, lambda: finished(cluster, "FineTuneJob", "job"))
        repaired, before = True, cluster.writes
        cluster.fault = lambda number, call: fault if number == before + at else None
        memory = {"nodes": 2, "gpusPerNode": 0, "memory": "64Gi"}
        cluster.change(job, lambda found: found["spec"].update(resources=memory))
        await outlive(cluster, lambda: holds(cluster, "FineTuneJob", "job", "Complete"))
        status = (cluster.get("FineTuneJob", "job") or {})["status"]
        attempts = sorted(attempt["attempt"] for attempt in status["attempts"])
        return summary(cluster) | {"attempts": attempts, "resumes": status["resumes"]}, cluster.writes - before


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("operator killed before", marks=pytest.mark.slow),
        pytest.param("operator killed after", marks=pytest.mark.slow),
        "answer lost",
    ],
)
async def test_a_fault_at_any_one_write_of_a_resume_changes_nothing_in_the_end(name: str) -> None:
    reference, writes = await resumed()
    assert (reference["jobs"]["job"]["state"], reference["resumes"], reference["attempts"]) == ("Complete", 1, [0])
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(at: int) -> tuple[int, Object]:
        async with slots:
            return at, (await resumed(FAULTS[name], at))[0]

    for at, end in await asyncio.gather(*(one(at) for at in range(1, writes + 1))):
        assert end == reference, f"after a fault at write {at}"


@pytest.mark.parametrize("kind", JOBS)
async def test_an_operator_that_never_survives_two_writes(kind: str) -> None:
    def kill_at_each_second_write(number: int, call: Call) -> Fault | None:
        if number % 2 == 0:
            return None
        return Fault(reset="before" if number % 3 else "after", kill=True)

    reference, writes, _ = await life(kind)
    end, _, operators = await life(kind, kill_at_each_second_write)
    assert end == reference
    assert operators > writes / 2


@pytest.mark.parametrize("kind", JOBS)
async def test_every_write_fails_at_first(kind: str) -> None:
    reference, _, _ = await life(kind)
    failed: set[str] = set()

    def once(number: int, call: Call) -> Fault | None:
        first = str(call) not in failed
        failed.add(str(call))
        return Fault(answer=503) if first else None

    end, _, _ = await life(kind, once)
    assert end == reference


async def test_events_that_cannot_be_posted_hold_nothing_up() -> None:
    async with FakeCluster() as cluster, running(cluster):
        post = cluster._write

        def write(request: object, kind: str, *rest: object) -> Object:
            if kind == "Event":
                raise ConnectionError
            return post(request, kind, *rest)  # type: ignore[arg-type]

        cluster._write = write  # type: ignore[method-assign,assignment]
        cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert not cluster.all("Event")


@dataclass(frozen=True)
class RefusalCase:
    name: str
    status: int
    child: str
    condition: str
    then: str


REFUSALS = [
    RefusalCase(
        name="an invalid field",
        status=400,
        child="Job ftj-tune-prepare",
        condition="Prepared",
        then="Preparing",
    ),
    RefusalCase(
        name="a quota",
        status=403,
        child="ConfigMap ftj-tune",
        condition="Prepared",
        then="Preparing",
    ),
    RefusalCase(
        name="storage that is away",
        status=503,
        child="PersistentVolumeClaim ftj-tune",
        condition="Prepared",
        then="Preparing",
    ),
    RefusalCase(
        name="an admission policy",
        status=422,
        child="JobSet ftj-tune-run",
        condition="Running",
        then="Starting",
    ),
    RefusalCase(
        name="JobSet's webhook does not answer",
        status=500,
        child="JobSet ftj-tune-run",
        condition="Running",
        then="Starting",
    ),
    RefusalCase(
        name="JobSet's kind is gone, which we have not yet noticed",
        status=404,
        child="JobSet ftj-tune-run",
        condition="Running",
        then="Starting",
    ),
    RefusalCase(
        name="an upload that may not start",
        status=403,
        child="Job ftj-tune-publish",
        condition="Published",
        then="Publishing",
    ),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
async def test_a_child_that_is_refused_is_told_of_once_and_tried_again(case: RefusalCase) -> None:
    async with FakeCluster() as cluster, running(cluster):
        tries = 0

        def refuse(number: int, call: Call) -> Fault | None:
            nonlocal tries
            mine = (
                f"{call.kind} {call.name or (call.body or {}).get('metadata', {}).get('name')}" == case.child
                and call.verb != "DELETE"
            )
            tries += mine
            return Fault(answer=case.status) if mine else None

        cluster.fault = refuse
        cluster.create(fine_tune(hub=HUB))
        told = await until(
            "told",
            lambda: condition_with(cluster, "FineTuneJob", "tune", case.condition, "FailedCreate"),
        )
        assert (told["status"], told["message"]) == ("False", f"{case.child}: a fault")
        found = cluster.get("FineTuneJob", "tune")["status"]
        assert found["state"] == "FailedCreate"
        assert found["startTime"]
        assert holds(cluster, "FineTuneJob", "tune", "Accepted")
        if case.condition == "Running":  # what the pod of prepare has said may come in a moment later
            await until("prepared", lambda: cluster.get("FineTuneJob", "tune")["status"].get("prepared"))
        written = len([c for c in cluster.calls if str(c) == "PATCH FineTuneJob/status tune"])
        before = tries
        await until("tried again", lambda: tries > before + 2)
        assert len([c for c in cluster.calls if str(c) == "PATCH FineTuneJob/status tune"]) == written, (
            "nothing new to say"
        )
        cluster.fault = lambda number, call: None
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        assert [e["count"] for e in cluster.all("Event") if e["reason"] == "FailedCreate"] == [1]
        assert case.then in {
            c["reason"]
            for _, _, o in cluster.history
            if o["kind"] == "FineTuneJob"
            for c in o.get("status", {}).get("conditions", [])
        }


@dataclass(frozen=True)
class ClaimCase:
    name: str
    metadata: Object
    expect: str


CLAIMS = [
    ClaimCase(
        name="it is being deleted",
        metadata={"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["kubernetes.io/pvc-protection"]},
        expect="the claim of an earlier job is being deleted",
    ),
    ClaimCase(
        name="it goes with a job that is gone already",
        metadata={"ownerReferences": [{"kind": "FineTuneJob", "name": "tune", "uid": "an-earlier-uid"}]},
        expect="it exists and is owned by another FineTuneJob tune (an-earlier-uid)",
    ),
]


@pytest.mark.parametrize("case", CLAIMS, ids=lambda case: case.name)
@pytest.mark.parametrize("kept", ["Keep", "Delete"])
async def test_a_claim_that_is_about_to_go_is_waited_for(case: ClaimCase, kept: str) -> None:
    async with FakeCluster() as cluster:
        cluster.collect_garbage = lambda: False  # type: ignore[method-assign]  # it is late, as it may be
        old = cluster.create(claim() | {"metadata": {"name": "ftj-tune", "namespace": "default"} | case.metadata})
        async with running(cluster):
            cluster.create(fine_tune(workspace={"whenDeleted": kept}))
            told = await until(
                "told",
                lambda: condition_with(cluster, "FineTuneJob", "tune", "Prepared", "FailedCreate"),
            )
            assert told["message"] == f"PersistentVolumeClaim ftj-tune: {case.expect}"
            cluster.finalize(old)
            cluster.delete(old)
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
            assert cluster.get("PersistentVolumeClaim", "ftj-tune")["metadata"]["uid"] != old["metadata"]["uid"]


async def test_a_claim_that_an_earlier_job_left_is_used_and_one_that_is_too_small_is_told_of() -> None:
    async with FakeCluster() as cluster, running(cluster):
        old = cluster.create(claim())
        cluster.create(fine_tune(workspace={"size": "5Gi"}))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert cluster.get("PersistentVolumeClaim", "ftj-tune")["metadata"]["uid"] == old["metadata"]["uid"]
        event = await until(
            "an event", lambda: next((e for e in cluster.all("Event") if e["reason"] == "SmallWorkspace"), None)
        )
        assert (event["type"], event["message"]) == (
            "Warning",
            "spec.workspace.size: 5Gi are requested, but the claim ftj-tune of an earlier job has 1Gi. Resize the"
            " claim, delete it with the results on it, or give this job another name",
        )


def claim() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "ftj-tune", "namespace": "default"},
        "spec": {"resources": {"requests": {"storage": "1Gi"}}},
    }


async def test_an_answer_that_is_lost_is_no_refusal() -> None:
    async with FakeCluster() as cluster, running(cluster):
        cluster.fault = lambda number, call: Fault(reset="after") if call.kind == "Job" else None
        cluster.create(fine_tune())
        await until("tried", lambda: [c for c in cluster.calls if (c.verb, c.kind) == ("POST", "Job")])
        cluster.fault = lambda number, call: None
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert "FailedCreate" not in {e["reason"] for e in cluster.all("Event")}


async def test_the_deadline_runs_while_a_child_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is kept, however long the next attempt is put off."""
    monkeypatch.setattr(reconcile, "CREATED_SECONDS", 0.3)
    async with FakeCluster() as cluster, running(cluster, pace=replace(FAST, backoff=60)):
        cluster.fault = lambda number, call: Fault(answer=403) if call.kind == "Job" else None
        cluster.create(fine_tune(activeDeadlineSeconds=1))
        await until("failed", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert condition(cluster, "FineTuneJob", "tune", "Failed")["reason"] == "DeadlineExceeded"


async def test_figures_that_json_cannot_say_do_not_keep_a_job_from_its_end() -> None:
    """Written as Python's json does, by whatever image: the real API server refuses a status that holds one of them."""
    last = said("run", metrics={"evalLoss": 120.0}, step=30).replace(
        "120.0", '120.0,"perplexity":Infinity,"trainLoss":NaN'
    )
    async with (
        FakeCluster(lambda pod: Outcome(message=last) if pod.phase == "run" else all_well(pod)) as cluster,
        running(cluster),
    ):
        cluster.create(fine_tune())
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        assert cluster.get("FineTuneJob", "tune")["status"]["metrics"] == {"evalLoss": 120.0}


async def test_nothing_is_written_when_nothing_happens() -> None:
    def script(pod: Pod) -> Outcome:
        return Outcome(hold=True) if pod.job == "at-work" and pod.phase == "run" else all_well(pod)

    async with FakeCluster(script) as cluster, running(cluster):
        cluster.create(fine_tune("done"))
        cluster.create(fine_tune("at-work"))
        cluster.create(generate("waiting", model={"job": "at-work"}))
        await until(
            "done", lambda: finished(cluster, "FineTuneJob", "done") and len(cluster.pods("at-work", "run")) == 2
        )
        await asyncio.sleep(0.3)
        before = len(cluster.calls)
        await asyncio.sleep(2)
        assert [str(c) for c in cluster.calls[before:] if c.verb != "LIST"] == []


async def test_a_restarted_operator_writes_nothing_either() -> None:
    async with FakeCluster() as cluster:
        async with running(cluster):
            cluster.create(fine_tune())
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        before = cluster.writes
        async with running(cluster) as operator:
            await operator.ready.wait()
            await asyncio.sleep(0.5)
        assert cluster.writes == before


OPERATOR = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
import harness

class Server:
    url = sys.argv[1]

async def main():
    await harness.start(Server(), signals=True).task

asyncio.run(main())
"""


def process(cluster: FakeCluster) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", OPERATOR, cluster.url, os.path.dirname(__file__)], stderr=subprocess.PIPE
    )


async def test_a_process_that_is_killed_and_one_that_is_told_to_stop() -> None:
    async with FakeCluster(lambda pod: Outcome(hold=True) if pod.phase == "run" else all_well(pod)) as cluster:
        cluster.create(fine_tune())
        first = process(cluster)
        try:
            await until("running", lambda: len(cluster.pods("tune", "run")) == 2)
        finally:
            first.send_signal(signal.SIGKILL)
            await asyncio.to_thread(first.communicate)
        for pod in cluster.pods("tune", "run"):
            cluster.release(pod, all_well(Pod("tune", "run", 0, 0)))
        second = process(cluster)
        try:
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
            second.send_signal(signal.SIGTERM)
            _, said = await asyncio.wait_for(asyncio.to_thread(second.communicate), 10)
        finally:
            second.kill()
        assert second.returncode == 0
        assert b"Traceback" not in said
        assert len([c for c in cluster.calls if c.verb == "POST" and c.kind == "JobSet"]) == 1


async def test_start_is_used_up() -> None:
    """An operator that is stopped before it was ready ends, too."""
    async with FakeCluster() as cluster:
        cluster.fault = lambda number, call: Fault(answer=500)
        operator = start(cluster)
        await asyncio.sleep(0.01)
        operator.operator.stop()
        await asyncio.wait_for(operator.task, 5)
        await operator.client.close()
