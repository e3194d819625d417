"""Whole lives of jobs: the real operator, an API server and controllers in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from fake_cluster import FakeCluster, Object, Outcome, Pod, all_well, said
from harness import HUB, children, condition, fine_tune, finished, generate, holds, running, settings, until

from luthier_api.kinds import parse_job
from luthier_operator import naming


def status(cluster: FakeCluster, kind: str, name: str) -> Object:
    found = cluster.get(kind, name)
    assert found is not None
    return found.get("status", {})


async def test_fine_tune_to_complete() -> None:
    async with FakeCluster() as cluster, running(cluster):
        cluster.create(fine_tune(hub=HUB))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        found = status(cluster, "FineTuneJob", "tune")
        assert found["state"] == "Complete"
        assert found["metrics"] == {"evalLoss": 1.5}
        assert found["hub"]["revision"] == "c" * 40
        assert found["prepared"]["model"]["revision"] == "a" * 40
        assert [c["type"] for c in found["conditions"] if c["status"] == "True"] == [
            "Accepted",
            "Prepared",
            "Trained",
            "Published",
            "Complete",
        ]
        assert list(children(cluster)) == [
            "ConfigMap ftj-tune",
            "PersistentVolumeClaim ftj-tune",
            "Job ftj-tune-prepare",
            "JobSet ftj-tune-run",
            "Job ftj-tune-publish",
        ]


async def test_generate_to_complete() -> None:
    async with FakeCluster() as cluster, running(cluster):
        cluster.create(generate(hub=HUB | {"repo": "org/rows"}))
        await until("complete", lambda: finished(cluster, "GenerateJob", "gen"))
        assert status(cluster, "GenerateJob", "gen")["state"] == "Complete"
        assert sorted(p.index for p in cluster.started if p.phase == "run") == [0, 1]
        assert "Job gj-gen-run" in children(cluster)


async def test_a_bare_pod_with_our_labels_neither_counts_nor_blocks() -> None:
    """A copy of a pod, to look into the workspace. `prepare` would wait for it if it were taken for an old one."""
    async with FakeCluster() as cluster, running(cluster):
        job = cluster.create(fine_tune(suspend=True))
        await until("suspended", lambda: holds(cluster, "FineTuneJob", "tune", "Suspended"))
        copy = cluster.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": "copy",
                    "namespace": "default",
                    "labels": naming.labels(parse_job(job), "prepare"),
                    "annotations": {naming.INDEX_ANNOTATION: "0"},
                },
                "spec": {},
                "status": {"phase": "Running", "podIP": "127.0.0.1"},
            }
        )
        cluster.change(job, lambda o: o["spec"].update(suspend=False))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        assert cluster.get("Pod", "copy") == copy


async def test_a_job_that_uses_the_result_of_another_waits_for_it() -> None:
    async with FakeCluster() as cluster, running(cluster):
        cluster.create(generate(model={"job": "tune"}))
        await until(
            "waiting",
            lambda: (condition(cluster, "GenerateJob", "gen", "Accepted") or {}).get("reason") == "WaitingForJob",
        )
        assert not list(children(cluster))
        cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "GenerateJob", "gen"))
        assert holds(cluster, "FineTuneJob", "tune", "Complete")


def at(phase: str, *outcomes: Outcome, index: int = 0, group: bool = True) -> Callable[[Pod], Outcome]:
    """A script: the pod of `phase` and `index` ends like this, one outcome an attempt; then, and elsewhere, all is
    well.
    """

    def script(pod: Pod) -> Outcome:
        if pod.phase == phase and pod.index == index and pod.attempt < len(outcomes):
            return outcomes[pod.attempt]
        # The other ranks of a group that is about to lose one are in the same attempt: they find out later.
        doomed = group and phase == pod.phase == "run" and any(o.code for o in outcomes[pod.attempt :])
        return Outcome(81, said("run", 81), seconds=0.5) if doomed else all_well(pod)

    return script


MISTAKE = Outcome(65, said("prepare", 65, message='spec.dataset.columns.text: no column "text" (columns: body)'))
DIVERGED = Outcome(82, said("run", 82, message="the loss is not a number"))
CRASH = Outcome(70, said("run", 70, message="RuntimeError: boom", step=10))
LATER_CRASH = Outcome(70, said("run", 70, message="RuntimeError: boom", step=20))
EVICTED = Outcome(75, said("run", 75, saved=True, step=10), disrupted=True)
OOM = Outcome(137, "", reason="OOMKilled")


@dataclass(frozen=True)
class Case:
    name: str
    script: Callable[[Pod], Outcome]
    expect: object
    spec: Object = field(default_factory=dict)


FAILURES = [
    Case(
        name="a mistake in prepare is not retried",
        script=at("prepare", MISTAKE),
        expect=("Failed InvalidDataset", [("InvalidDataset", False)], 0),
    ),
    Case(
        name="the Hub is away for a moment",
        script=at("prepare", Outcome(69, said("prepare", 69))),
        expect=("Complete Completed", [("HubUnavailable", True)], 0),
    ),
    Case(
        name="a crash restarts the group",
        script=at("run", CRASH),
        expect=("Complete Completed", [("TrainingError", True)], 1),
    ),
    Case(
        name="rank 1 crashes",
        script=at("run", CRASH, index=1),
        expect=("Complete Completed", [("TrainingError", True)], 1),
    ),
    Case(
        name="an eviction is free",
        script=at("run", EVICTED),
        spec={"restarts": {"max": 0}},
        expect=("Complete Completed", [("Preempted", False)], 1),
    ),
    Case(
        name="crashes until the budget is spent",
        script=at("run", CRASH, LATER_CRASH),
        spec={"restarts": {"max": 1}},
        expect=("Failed TrainingError", [("TrainingError", True), ("TrainingError", True)], 1),
    ),
    Case(
        name="divergence is not retried",
        script=at("run", DIVERGED),
        expect=("Failed Diverged", [("Diverged", False)], 0),
    ),
    Case(
        name="killed by the kernel for memory",
        script=at("run", OOM),
        spec={"restarts": {"max": 0}},
        expect=("Failed HostOutOfMemory", [("HostOutOfMemory", True)], 0),
    ),
    Case(
        name="a wrong token: the result stays",
        script=at("publish", Outcome(77, said("publish", 77, message="401 from the Hub"))),
        spec={"hub": HUB},
        expect=("Failed Unauthorized", [("Unauthorized", False)], 0),
    ),
]


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.name)
async def test_failures(case: Case) -> None:
    async with FakeCluster(case.script) as cluster, running(cluster):
        cluster.create(fine_tune(**case.spec))
        await until("an end", lambda: finished(cluster, "FineTuneJob", "tune"))
        found = status(cluster, "FineTuneJob", "tune")
        end = next(c for c in found["conditions"] if c["type"] in ("Complete", "Failed") and c["status"] == "True")
        attempts = [(a["reason"], a["charged"]) for a in found["attempts"]]
        assert (f"{end['type']} {end['reason']}", attempts, found["restarts"]) == case.expect


async def test_the_message_of_a_mistake_reaches_the_status() -> None:
    async with FakeCluster(at("prepare", MISTAKE)) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("failed", lambda: finished(cluster, "FineTuneJob", "tune"))
        failed = condition(cluster, "FineTuneJob", "tune", "Failed")
        assert failed is not None
        assert failed["message"].startswith('spec.dataset.columns.text: no column "text" (columns: body)')


async def test_a_killed_shard_is_started_again_alone() -> None:
    async with FakeCluster(at("run", Outcome(137), index=1, group=False)) as cluster, running(cluster):
        cluster.create(generate())
        await until("complete", lambda: finished(cluster, "GenerateJob", "gen"))
        assert holds(cluster, "GenerateJob", "gen", "Complete")
        assert sorted(p.index for p in cluster.started if p.phase == "run") == [0, 1, 1]
        found = status(cluster, "GenerateJob", "gen")
        assert (found["restarts"], found["restartsCharged"]) == (1, 1)
        # If the replacement pod is seen before the end of the failed one, another event names the reason later.
        await until(
            "an event with the reason",
            lambda: any(
                e["reason"] == "Restarting" and e["message"].startswith("restart 1 after InfrastructureError: ")
                for e in cluster.all("Event")
            ),
        )
        assert [attempt["reason"] for attempt in found["attempts"]] == ["InfrastructureError"]


async def test_an_image_that_is_not_there() -> None:
    script = at("prepare", Outcome(waiting="ImagePullBackOff", message='Back-off pulling image "x"'))
    async with FakeCluster(script) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("said", lambda: status(cluster, "FineTuneJob", "tune").get("state") == "ImagePullFailed")
        prepared = condition(cluster, "FineTuneJob", "tune", "Prepared")
        assert prepared is not None
        assert prepared["message"].startswith("x:latest cannot be pulled for pod ftj-tune-prepare-0-")


async def test_suspend_and_resume() -> None:
    def script(pod: Pod) -> Outcome:
        return Outcome(hold=True) if pod.phase == "run" and not resumed else all_well(pod)

    resumed = False
    async with FakeCluster(script) as cluster, running(cluster):
        job = cluster.create(fine_tune())
        await until("running", lambda: holds(cluster, "FineTuneJob", "tune", "Running"))
        cluster.change(job, lambda o: o["spec"].update(suspend=True))
        await until(
            "no pods", lambda: holds(cluster, "FineTuneJob", "tune", "Suspended") and not cluster.pods("tune", "run")
        )
        assert cluster.get("JobSet", "ftj-tune-run") is None
        resumed = True
        cluster.change(job, lambda o: o["spec"].update(suspend=False))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        found = status(cluster, "FineTuneJob", "tune")
        assert (found["state"], found["restarts"], found["attempts"]) == ("Complete", 0, [])


async def test_plan_only_stops_after_prepare_and_goes_on_later() -> None:
    async with FakeCluster() as cluster, running(cluster):
        job = cluster.create(fine_tune(planOnly=True))
        await until("planned", lambda: status(cluster, "FineTuneJob", "tune").get("state") == "Planned")
        assert status(cluster, "FineTuneJob", "tune")["prepared"]["plan"]["steps"] == 30
        cluster.change(job, lambda o: o["spec"].update(planOnly=False))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))


def left(cluster: FakeCluster) -> list[str]:
    """Jobs, JobSets and pods that exist."""
    return [f"{kind} {o['metadata']['name']}" for kind in ("Job", "JobSet", "Pod") for o in cluster.all(kind)]


@pytest.mark.parametrize("kept", [86400, 0], ids=["its pods are kept", "its pods are deleted"])
async def test_what_was_complete_is_published_when_that_is_wanted(kept: int) -> None:
    async with FakeCluster() as cluster, running(cluster, settings(finished_pods_seconds=kept)):
        job = cluster.create(fine_tune())
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        await until("deleted", lambda: kept or not left(cluster))
        for hub in (HUB, HUB | {"branch": "other"}):
            cluster.change(job, lambda o, hub=hub: o["spec"].update(hub=hub))
            await until("taken back", lambda: not finished(cluster, "FineTuneJob", "tune"))
            await until("complete again", lambda: finished(cluster, "FineTuneJob", "tune"))
            assert holds(cluster, "FineTuneJob", "tune", "Published")
            assert status(cluster, "FineTuneJob", "tune")["hub"]["revision"] == "c" * 40
            await until("deleted", lambda: kept or not left(cluster))
        assert [p.phase for p in cluster.started].count("publish") == 2


async def test_a_finished_job_without_children_stays_as_it_is() -> None:
    """Also where it used the result of a job that is gone, and for an operator that has seen nothing of it."""
    at_once = settings(finished_pods_seconds=0)
    async with FakeCluster() as cluster:
        async with running(cluster, at_once) as operator:
            cluster.create(fine_tune("base"))
            cluster.create(generate(model={"job": "base"}))
            await until("complete", lambda: finished(cluster, "GenerateJob", "gen"))
            await until("deleted", lambda: not left(cluster))
            await until("at rest", lambda: b'workqueue_depth{name="luthier"} 0.0' in operator.metrics_text())
            base = cluster.get("FineTuneJob", "base")
            assert base
            cluster.delete(base)
        before, writes = cluster.get("GenerateJob", "gen"), cluster.writes
        async with running(cluster, at_once) as operator:
            await operator.ready.wait()
            await asyncio.sleep(0.3)
            assert (cluster.get("GenerateJob", "gen"), cluster.writes) == (before, writes)

            job = cluster.get("GenerateJob", "gen")
            assert job
            cluster.change(job, lambda o: o["spec"].update(hub=HUB | {"repo": "org/rows"}))
            await until("published", lambda: holds(cluster, "GenerateJob", "gen", "Published"))
            await until("deleted", lambda: not left(cluster))
        assert [pod.phase for pod in cluster.started if pod.job == "gen"] == ["prepare", "run", "run", "publish"]
        (source,) = status(cluster, "GenerateJob", "gen")["sources"]
        config = cluster.get("ConfigMap", "gj-gen")
        assert config
        assert source["folder"] in config["data"]["run.json"]


async def test_more_time_lets_a_job_go_on() -> None:
    def script(pod: Pod) -> Outcome:
        return Outcome(hold=True) if pod.phase == "run" and not enough else all_well(pod)

    enough = False
    async with FakeCluster(script) as cluster, running(cluster):
        job = cluster.create(fine_tune(activeDeadlineSeconds=1))
        await until("failed", lambda: holds(cluster, "FineTuneJob", "tune", "Failed"))
        enough = True
        cluster.change(job, lambda o: o["spec"].update(activeDeadlineSeconds=600))
        await until("complete", lambda: holds(cluster, "FineTuneJob", "tune", "Complete"))
        assert not holds(cluster, "FineTuneJob", "tune", "Failed")


OUT_OF_MEMORY = Outcome(83, said("run", 83, message="no memory; raise spec.resources.memory", step=350))
NO_HUB = Outcome(77, said("publish", 77, message="401 from the Hub"))


@dataclass(frozen=True)
class ResumeCase:
    name: str
    job: Object
    fails: Outcome
    """How each pod of `phase` ends until the spec changes."""
    phase: str
    change: Object
    attempts: list[int]
    """Numbers of the attempts in the end, with one more that fails after the resume."""


RESUMES = [
    ResumeCase(
        name="a training gets the memory that its message asks for",
        job=fine_tune(),
        fails=OUT_OF_MEMORY,
        phase="run",
        change={"resources": {"nodes": 2, "gpusPerNode": 0, "memory": "64Gi"}},
        attempts=[0, 1],
    ),
    ResumeCase(
        name="a training that has used up its restarts is tried again as it is",
        job=fine_tune(restarts={"max": 1}),
        fails=CRASH,
        phase="run",
        change={"retry": 1},
        attempts=[0, 1, 2],
    ),
    ResumeCase(
        name="the data of a training were repaired",
        job=fine_tune(),
        fails=MISTAKE,
        phase="prepare",
        change={"retry": 1},
        attempts=[0, 1],
    ),
    ResumeCase(
        name="the token to publish with was repaired",
        job=fine_tune(hub=HUB),
        fails=NO_HUB,
        phase="publish",
        change={"hub": HUB | {"tokenSecretRef": {"name": "better"}}},
        attempts=[0, 1],
    ),
    ResumeCase(
        name="shards get the memory that their message asks for",
        job=generate("tune", shards=1),
        fails=OUT_OF_MEMORY,
        phase="run",
        change={"resources": {"gpus": 0, "memory": "64Gi"}},
        attempts=[0, 1],
    ),
    ResumeCase(
        name="shards that have used up their retries get more",
        job=generate("tune", shards=1, retriesPerShard=1),
        fails=CRASH,
        phase="run",
        change={"retriesPerShard": 5},
        attempts=[0, 1, 2],
    ),
]


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
@pytest.mark.parametrize("kept", [True, False], ids=["its children are there", "its children are gone"])
async def test_a_failed_job_goes_on_when_its_spec_changes(case: ResumeCase, kept: bool) -> None:
    """With one failure more afterwards that is retried, to see that numbers and budgets go on."""
    repaired, interrupted = False, False

    def script(pod: Pod) -> Outcome:
        nonlocal interrupted
        if pod.phase != case.phase:
            return all_well(pod)
        if not repaired:
            return case.fails if pod.index == 0 else Outcome(hold=True)
        if not interrupted:
            interrupted = True
            return Outcome(71, said(pod.phase, 71, message="a broken network", step=360))
        return all_well(pod)

    kind = case.job["kind"]
    async with FakeCluster(script) as cluster, running(cluster):
        job = cluster.create(case.job)
        await until("failed", lambda: holds(cluster, kind, "tune", "Failed"))
        failed = condition(cluster, kind, "tune", "Failed")
        assert failed is not None
        assert failed["message"].endswith("or set spec.retry: 1 to try again as it is")
        if not kept:
            for child in [*cluster.all("Job"), *cluster.all("JobSet")]:
                cluster.delete(child)
            await until("no children", lambda: not (cluster.all("Job") or cluster.all("JobSet")))
        repaired = True
        cluster.change(job, lambda o: o["spec"].update(case.change))
        await until("complete", lambda: holds(cluster, kind, "tune", "Complete"))
        found = status(cluster, kind, "tune")
        assert not holds(cluster, kind, "tune", "Failed")
        numbers = sorted(a["attempt"] for a in found["attempts"] if a["phase"] == case.phase)
        assert numbers == case.attempts, found["attempts"]
        assert found["resumes"] == 1
        reasons = [event["reason"] for event in cluster.all("Event")]
        assert reasons.count("Resumed") == 1


async def test_a_suspended_job_goes_on_with_changed_fields() -> None:
    """A change of the layout is planned again; the pods then have the changed fields."""

    def script(pod: Pod) -> Outcome:
        return Outcome(hold=True) if pod.phase == "run" and not changed else all_well(pod)

    changed = False
    async with FakeCluster(script) as cluster, running(cluster):
        job = cluster.create(fine_tune())
        await until("running", lambda: holds(cluster, "FineTuneJob", "tune", "Running"))
        cluster.change(job, lambda o: o["spec"].update(suspend=True))
        await until("suspended", lambda: cluster.get("JobSet", "ftj-tune-run") is None)
        changed = True
        memory = {"nodes": 2, "gpusPerNode": 0, "memory": "64Gi"}
        cluster.change(job, lambda o: o["spec"].update(suspend=False, strategy="zero3", resources=memory))
        await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        made = [found for _, event, found in cluster.history if event == "ADDED"]
        assert [found["metadata"]["name"] for found in made if found["kind"] in ("Job", "JobSet")][-3:] == [
            "ftj-tune-prepare",
            "ftj-tune-run",
            "ftj-tune-run-node-0",
        ]
        pod = next(found for found in reversed(made) if found["kind"] == "Pod")
        assert pod["spec"]["containers"][0]["resources"]["limits"]["memory"] == "64Gi"
        config = cluster.get("ConfigMap", "ftj-tune")
        assert config is not None
        assert '"strategy": "zero3"' in config["data"]["run.json"]


async def test_cuda_out_of_memory_halves_the_micro_batch_once() -> None:
    full = Outcome(79, said("run", 79, message="CUDA out of memory. The GPU is full"))

    def script(pod: Pod) -> Outcome:
        return full if pod.phase == "run" and pod.index == 0 else all_well(pod)

    async with FakeCluster(script) as cluster, running(cluster):
        cluster.create(fine_tune())
        await until("failed", lambda: finished(cluster, "FineTuneJob", "tune"))
        found = status(cluster, "FineTuneJob", "tune")
        plan = found["prepared"]["plan"]
        assert (plan["microBatchSize"], plan["accumulationSteps"], found["reducedMicroBatchSize"]) == (2, 2, 2)
        assert sorted(a["attempt"] for a in found["attempts"]) == [0, 1]
        assert (found["restarts"], found["restartsCharged"]) == (1, 0)
        config = cluster.get("ConfigMap", "ftj-tune")
        assert config is not None
        assert '"microBatchSize": 2' in config["data"]["run.json"]
        failed = condition(cluster, "FineTuneJob", "tune", "Failed")
        assert failed is not None
        assert failed["reason"] == "CudaOutOfMemory"
    notice = next(e["message"] for e in cluster.all("Event") if e["reason"] == "Notice")
    assert notice == (
        "microBatchSize: 2 instead of 4, because CUDA ran out of memory; 2 accumulation steps instead of 1 keep the"
        " batch of a step and its loss the same"
    )


@pytest.mark.parametrize(("kept", "left"), [("Keep", ["PersistentVolumeClaim"]), ("Delete", [])])
async def test_deletion_takes_every_child_and_the_volume_only_where_the_job_says_so(kept: str, left: list[str]) -> None:
    async with FakeCluster(at("run", Outcome(hold=True))) as cluster, running(cluster):
        job = cluster.create(fine_tune(workspace={"whenDeleted": kept}))
        await until("running", lambda: cluster.pods("tune", "run"))
        cluster.delete(job)
        await until("gone", lambda: len(cluster.objects) - len(cluster.all("Event")) == len(left))
        assert [k for k, _, _ in cluster.objects if k != "Event"] == left


async def test_a_finished_job_is_deleted_when_its_time_is_over() -> None:
    async with FakeCluster() as cluster, running(cluster):
        cluster.create(fine_tune(ttlSecondsAfterFinished=0))
        await until("deleted", lambda: any(str(c).startswith("DELETE FineTuneJob tune") for c in cluster.calls))
        await until("gone", lambda: cluster.get("FineTuneJob", "tune") is None)
        assert cluster.get("PersistentVolumeClaim", "ftj-tune") is not None


async def test_events_tell_the_story_once() -> None:
    async with FakeCluster() as cluster:
        async with running(cluster):
            cluster.create(fine_tune(hub=HUB))
            await until("complete", lambda: finished(cluster, "FineTuneJob", "tune"))
        events = cluster.all("Event")
        assert all(e["involvedObject"]["name"] == "tune" and e["count"] == 1 for e in events)
        reasons = [e["reason"] for e in events]
        assert {"Preparing", "Prepared", "Trained", "Published", "Completed"} <= set(reasons)
        assert len(reasons) == len(set(reasons)) <= 12


async def test_a_mistake_that_is_common_to_all_shards_fails_once() -> None:
    started = set()

    def script(pod: Pod) -> Outcome:
        if pod.phase != "run":
            return all_well(pod)
        started.add(pod.index)
        return OUT_OF_MEMORY if pod.index == 1 else Outcome(hold=True)

    async with FakeCluster(script) as cluster, running(cluster):
        cluster.create(generate("many", shards=64, parallelism=4))
        await until("failed", lambda: holds(cluster, "GenerateJob", "many", "Failed"))
        failed = condition(cluster, "GenerateJob", "many", "Failed")
        assert failed is not None
        assert "This ended shard 1 of 64 for good, and spec.maxFailedShards: 0 stopped the others" in failed["message"]
        assert started == {0, 1, 2, 3}
