"""What a user may say while a job lives: stop, go on, only plan, no longer than this, and be gone afterwards."""

from __future__ import annotations

import json
import time

import pytest
from e2e import jobs
from e2e.kube import Kube, Object, condition, conditions

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def base(kube: Kube) -> None:
    """A small trained model to start from."""
    kube.apply(jobs.BASE)
    kube.complete("ftj", "base")


def lora(name: str, **spec: object) -> Object:
    return jobs.fine_tune(
        name, **({"model": {"job": "base"}, "dataset": jobs.REGISTER, "method": {"type": "lora", "rank": 2}} | spec)
    )


def patch(kube: Kube, name: str, **spec: object) -> None:
    kube.run("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))


def test_a_suspended_job_saves_leaves_and_goes_on_where_it_stopped(kube: Kube) -> None:
    kube.apply(lora("paused", training=jobs.training(maxSteps=100_000, saveSteps=100_000)))
    kube.until(
        "ftj", "paused", lambda o: (o["status"].get("progress") or {}).get("step"), timeout=180, what="at a step"
    )
    patch(kube, "paused", suspend=True)
    kube.until("ftj", "paused", lambda o: condition(o, "Suspended") == "True", timeout=30, what="Suspended")
    kube.until_gone("pods", "luthier.dev/job=paused,luthier.dev/phase=run", timeout=90)
    held = kube.get("ftj", "paused")
    assert held is not None
    assert held["status"]["state"] == "Suspended"
    assert kube.list("jobsets", "luthier.dev/job=paused") == []
    saved = saved_step(kube, "paused")
    patch(kube, "paused", suspend=False)
    until_resumed(kube, "paused", saved)
    went_on = kube.get("ftj", "paused")
    assert went_on is not None
    assert went_on["status"]["activeSince"] > went_on["status"]["startTime"]
    assert went_on["status"]["activeSeconds"] > 0
    kube.delete("ftj", "paused")


def saved_step(kube: Kube, name: str) -> int:
    """The step of the checkpoint that stopped pods have saved. The status has it a moment after they are gone."""
    deadline = time.monotonic() + 30
    while True:
        job = kube.get("ftj", name)
        assert job is not None
        if checkpoint := job["status"].get("checkpoint"):
            step: int = checkpoint["step"]
            return step
        assert time.monotonic() < deadline, kube.run("describe", "ftj", name)
        time.sleep(0.5)


def until_resumed(kube: Kube, name: str, step: int) -> None:
    """Wait until the log of a training says that it resumes from the checkpoint of this step."""
    deadline = time.monotonic() + 120
    while f"resuming from checkpoint-{step}" not in kube.run(
        "logs", "-l", f"luthier.dev/job={name},luthier.dev/phase=run", "--tail=-1", check=False
    ):
        assert time.monotonic() < deadline, kube.run("describe", "ftj", name)
        time.sleep(2)


def test_a_plan_costs_no_run_and_the_job_can_go_on_from_it_and_goes_after_its_time(kube: Kube) -> None:
    """Its result stays."""
    kube.apply(
        lora(
            "planned",
            training=jobs.training(maxSteps=2),
            planOnly=True,
            ttlSecondsAfterFinished=5,
            workspace={"size": "1Gi"},
        )
    )
    job = kube.until("ftj", "planned", lambda o: o["status"].get("state") == "Planned", timeout=120, what="Planned")
    assert job["status"]["prepared"]["plan"]["steps"] == 2
    time.sleep(3)
    assert kube.list("jobsets", "luthier.dev/job=planned") == []
    patch(kube, "planned", planOnly=False)
    kube.complete("ftj", "planned")
    deadline = time.monotonic() + 60
    while kube.get("ftj", "planned") is not None:
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(1)
    kube.until_gone("pods", "luthier.dev/job=planned", timeout=90)
    assert kube.get("pvc", "ftj-planned") is not None


def test_a_job_that_its_deadline_ends_goes_on_from_its_checkpoint_when_a_field_changes(kube: Kube) -> None:
    kube.apply(lora("repaired", training=jobs.training(maxSteps=100_000, saveSteps=100_000)))
    kube.until(
        "ftj", "repaired", lambda o: (o["status"].get("progress") or {}).get("step"), timeout=180, what="at a step"
    )
    patch(kube, "repaired", activeDeadlineSeconds=1)  # as if it had had it from the beginning
    job = kube.failed("ftj", "repaired", timeout=120)
    kube.until_gone("pods", "luthier.dev/job=repaired,luthier.dev/phase=run", timeout=90)
    assert conditions(job)["Failed"]["reason"] == "DeadlineExceeded"
    assert "spec.activeDeadlineSeconds" in conditions(job)["Failed"]["message"]
    assert conditions(job)["Failed"]["message"].endswith("set spec.retry: 1 to try again as it is")
    saved = saved_step(kube, "repaired")
    limits = job["spec"]["resources"] | {"memory": "3Gi"}
    patch(kube, "repaired", activeDeadlineSeconds=600, resources=limits)
    until_resumed(kube, "repaired", saved)
    (jobset,) = kube.list("jobsets", "luthier.dev/job=repaired")
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["memory"] == "3Gi"
    kube.delete("ftj", "repaired")


def test_gpus_are_asked_for_and_missed_with_a_word(kube: Kube) -> None:
    """The node of the local cluster counts GPUs that are not there: what a broken device plugin looks like to a job."""
    kube.apply(
        lora(
            "gpu", training=jobs.training(maxSteps=2), resources={"gpusPerNode": 1}, scheduling={"queueName": "team-a"}
        )
    )
    kube.until("ftj", "gpu", lambda o: kube.list("jobsets", "luthier.dev/job=gpu"), timeout=120, what="given a JobSet")
    jobset = kube.list("jobsets", "luthier.dev/job=gpu")[0]
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert "suspend" not in jobset["spec"]
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    capacity = kube.run("get", "nodes", "-o", "jsonpath={.items[*].status.capacity.nvidia\\.com/gpu}")
    if not capacity.strip():
        job = kube.until(
            "ftj", "gpu", lambda o: o["status"].get("state") == "Unschedulable", timeout=60, what="Unschedulable"
        )
        assert "nvidia.com/gpu" in conditions(job)["Running"]["message"]
        return
    found = conditions(kube.failed("ftj", "gpu"))
    assert found["Admitted"]["reason"] == "NotQueued"  # there is no Kueue yet
    failed = found["Failed"]
    assert failed["reason"] == "Misconfigured"
    assert "GPU" in failed["message"]
