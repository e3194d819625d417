"""Jobs in a queue of a real Kueue: quota, preemption with a resume, a run that Kueue gives up, and MultiKueue.

Kueue is installed for these tests alone. It manages only the namespace of the jobs, and only while they run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cluster import choice
from cluster.kueue import MANAGED
from e2e import jobs
from e2e.kube import Kube, Object, condition, conditions

pytestmark = pytest.mark.e2e
ONE_POD = {"cpu": "300m", "memory": "64Gi", "nvidia.com/gpu": "8", "ephemeral-storage": "200Gi"}
"""Quota for one pod of 200m at a time."""
GPUS_ALONE = {"nvidia.com/gpu": "8"}
DEADLINE = 15
"""Seconds of work that a job has left when it is preempted, fewer than it then waits."""
MULTIKUEUE = "kueue.x-k8s.io/multikueue"
SLOW = {"waitForPodsReady": {"timeout": "5m"}}
IMPATIENT = {
    "waitForPodsReady": {
        "timeout": "15s",
        "requeuingStrategy": {"timestamp": "Eviction", "backoffBaseSeconds": 1, "backoffLimitCount": 0},
    }
}


def of_kueue(kind: str, name: str, **spec: Any) -> Object:
    return {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, "spec": spec}


def queue(name: str, quota: dict[str, str], **spec: Any) -> list[Object]:
    """A ClusterQueue, and a LocalQueue of the same name."""
    resources = [{"name": resource, "nominalQuota": amount} for resource, amount in quota.items()]
    flavors = [{"name": "any", "resources": resources}]
    groups = [{"coveredResources": list(quota), "flavors": flavors}]
    preemption = {"withinClusterQueue": "LowerPriority"}
    return [
        of_kueue("ClusterQueue", name, namespaceSelector={}, preemption=preemption, resourceGroups=groups, **spec),
        of_kueue("LocalQueue", name, clusterQueue=name),
    ]


def priority(name: str, value: int) -> Object:
    """Read by Kueue. The scheduler preempts nobody for it."""
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}}
    return kind | {"value": value, "preemptionPolicy": "Never"}


# Of the jobs below; a test that fails leaves its own.
NAMES = ("low", "next", "high", "first", "no-queue", "too-large", "not-covered", "remote", "nowhere")


@pytest.fixture(scope="module", autouse=True)
def queues(kube: Kube) -> Iterator[None]:
    """Kueue with its queues, and a small trained model to start from."""
    kube.apply(jobs.BASE)
    kube.complete("ftj", "base")
    cluster = choice.cluster()
    try:
        cluster.install_kueue(SLOW)
    except NotImplementedError as error:
        pytest.skip(str(error))
    label(kube, **MANAGED)
    remote = {"parameters": {"apiGroup": "kueue.x-k8s.io", "kind": "MultiKueueConfig", "name": "none"}}
    kube.apply(
        of_kueue("ResourceFlavor", "any"),
        of_kueue("AdmissionCheck", "remote", controllerName=MULTIKUEUE, **remote),
        *queue("one", ONE_POD),
        *queue("gpus", GPUS_ALONE),
        *queue("multi", ONE_POD, admissionChecksStrategy={"admissionChecks": [{"name": "remote"}]}),
        priority("luthier-low", 100),
        priority("luthier-high", 1000),
    )
    yield
    kube.run("delete", "ftj", *NAMES, "--ignore-not-found", "--wait", "--timeout=120s")
    kube.run("delete", "gj", "shard", "--ignore-not-found", "--wait", "--timeout=120s")
    label(kube, **dict.fromkeys(MANAGED))
    cluster.remove_kueue()
    kube.run("delete", "priorityclass", "luthier-low", "luthier-high")


def label(kube: Kube, **labels: str | None) -> None:
    kube.run("patch", "namespace", kube.namespace, "--type=merge", "-p", json.dumps({"metadata": {"labels": labels}}))


def queued(
    name: str, queue: str = "one", steps: int = 2, resources: dict[str, Any] = jobs.CPU, **scheduling: Any
) -> Object:
    return jobs.fine_tune(
        name,
        model={"job": "base"},
        dataset=jobs.REGISTER,
        method={"type": "lora", "rank": 2},
        training=jobs.training(maxSteps=steps, saveSteps=100_000),
        resources=resources,
        scheduling={"queueName": queue} | scheduling,
    )


def admitted(job: Object) -> str:
    """The condition Admitted: `False Pending`."""
    found = conditions(job).get("Admitted", {})
    return f"{found.get('status')} {found.get('reason')}"


def until(kube: Kube, name: str, says: str, message: str = "", timeout: float = 120) -> Object:
    def met(job: Object) -> bool:
        return admitted(job) == says and message in conditions(job)["Admitted"]["message"]

    return kube.until("ftj", name, met, timeout=timeout, what=f"Admitted {says}: {message}")


def patch(kube: Kube, name: str, **spec: Any) -> None:
    kube.run("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))


def test_a_preempted_job_saves_gives_way_and_resumes(kube: Kube) -> None:
    kube.apply(queued("low", steps=100_000, priorityClassName="luthier-low"))
    kube.until("ftj", "low", lambda o: (o["status"].get("progress") or {}).get("step"), timeout=180, what="at a step")
    running = kube.get("ftj", "low")
    assert running is not None
    assert admitted(running) == "True Admitted"

    # No quota is left for a second one of the same priority. One of a higher priority takes it.
    kube.apply(queued("next", priorityClassName="luthier-low"))
    waiting = until(kube, "next", "False Pending", "insufficient unused quota for cpu")
    assert waiting["status"]["state"] == "Queued"
    assert kube.list("pods", "luthier.dev/job=next,luthier.dev/phase=run") == []
    kube.delete("ftj", "next", "--wait")
    kube.apply(queued("high", priorityClassName="luthier-high"))

    until(kube, "low", "False Preempted", "due to prioritization in the ClusterQueue")
    assert "Evicted" in kube.events("low")
    # The time in the queue is none of the deadline, which is over by the end of it.
    stopped = kube.until("ftj", "low", lambda o: not o["status"].get("activeSince"), timeout=60, what="at rest")
    worked, queued_at = stopped["status"]["activeSeconds"], time.monotonic()
    patch(kube, "low", activeDeadlineSeconds=worked + DEADLINE)
    kube.complete("ftj", "high", timeout=180)
    time.sleep(max(0.0, queued_at + DEADLINE - time.monotonic()))
    held = kube.get("ftj", "low")
    assert held is not None
    assert (held["status"]["activeSeconds"], condition(held, "Failed")) == (worked, None)
    patch(kube, "low", activeDeadlineSeconds=None)

    until(kube, "low", "True Admitted")
    deadline = time.monotonic() + 120
    while "resuming from checkpoint-" not in kube.run(
        "logs", "-l", "luthier.dev/job=low,luthier.dev/phase=run", "--tail=-1", check=False
    ):
        assert time.monotonic() < deadline, kube.run("describe", "ftj", "low")
        time.sleep(2)
    resumed = kube.until("ftj", "low", lambda o: condition(o, "Running") == "True", timeout=60, what="Running")
    assert resumed["status"]["checkpoint"]["step"] > 0
    assert resumed["status"].get("restartsCharged", 0) == 0
    assert condition(resumed, "Failed") is None
    kube.delete("ftj", "low", "--wait")


def test_a_preempted_shard_goes_on(kube: Kube) -> None:
    """Shards are an Indexed Job of their own. No rule of it may fail the Job for what an eviction does to its pods."""
    spec = jobs.IMAGES["spec"] | {"shards": 1, "scheduling": {"queueName": "one", "priorityClassName": "luthier-low"}}
    first = queued("first", priorityClassName="luthier-high")
    first["spec"]["planOnly"] = True  # prepared beforehand, so that it comes while the shard is at work
    kube.apply(first)
    kube.until("ftj", "first", lambda o: o["status"].get("state") == "Planned", timeout=180, what="Planned")
    kube.apply(jobs.generate("shard", **spec))
    kube.until("gj", "shard", lambda o: (o["status"].get("progress") or {}).get("rows"), timeout=180, what="at a row")
    patch(kube, "first", planOnly=False)
    kube.until("gj", "shard", lambda o: admitted(o) == "False Preempted", timeout=120, what="preempted")
    kube.complete("ftj", "first", timeout=180)
    done = kube.complete("gj", "shard", timeout=240)
    assert done["status"]["progress"]["rows"] == len(spec["inputs"]["rows"])
    assert done["status"].get("restartsCharged", 0) == 0
    kube.delete("gj", "shard", "--wait")


@dataclass(frozen=True)
class Case:
    name: str
    job: Object
    says: str
    message: str
    state: str


CASES = [
    Case(
        name="a queue that does not exist",
        job=queued("no-queue", queue="nope"),
        says="False Inadmissible",
        message="LocalQueue nope doesn't exist",
        state="Inadmissible",
    ),
    Case(
        name="more than the quota",
        job=queued("too-large", resources=jobs.CPU | {"cpu": "400m"}),
        says="False Unsatisfiable",
        message="> maximum capacity (300m)",
        state="Unsatisfiable",
    ),
    Case(
        name="a queue that covers GPUs alone",
        job=queued("not-covered", queue="gpus"),
        says="False Unsatisfiable",
        message="unavailable in ClusterQueue",
        state="Unsatisfiable",
    ),
    Case(
        name="a queue of MultiKueue whose cluster is away",
        job=queued("remote", queue="multi"),
        says="False Inadmissible",
        message="ClusterQueue multi is inactive",
        state="Inadmissible",
    ),
]


def test_why_a_job_is_not_admitted(kube: Kube) -> None:
    """All at once: each has to be prepared first."""
    kube.apply(*(case.job for case in CASES))
    for case in CASES:
        job = until(kube, case.job["metadata"]["name"], case.says, case.message, timeout=240)
        assert job["status"]["state"] == case.state, case.name
        assert kube.list("pods", f"luthier.dev/job={case.job['metadata']['name']},luthier.dev/phase=run") == []

    # Kueue's webhook has given the JobSet to MultiKueue, and nobody takes it back.
    before = kube.list("jobsets", "luthier.dev/job=remote")[0]
    assert before["spec"]["managedBy"] == MULTIKUEUE
    kube.run("annotate", "ftj", "remote", "touched=yes")
    time.sleep(3)
    after = kube.list("jobsets", "luthier.dev/job=remote")[0]
    assert after["metadata"]["generation"] == before["metadata"]["generation"]
    for case in CASES:
        kube.delete("ftj", case.job["metadata"]["name"], "--wait")


def test_a_run_that_kueue_gives_up_queues_again_by_suspend(kube: Kube) -> None:
    choice.cluster().install_kueue(IMPATIENT)
    kube.apply(queued("nowhere", nodeSelector={"luthier.dev/none": "none"}))
    job = until(kube, "nowhere", "False DeactivatedDueToRequeuingLimitExceeded", timeout=180)
    assert job["status"]["state"] == "Deactivated"
    assert "set spec.suspend to true" in conditions(job)["Admitted"]["message"]
    # The pod that could not be scheduled is gone, and its reason is not.
    assert conditions(job)["Running"]["reason"] == "Unschedulable"
    kube.until_gone("pods", "luthier.dev/job=nowhere,luthier.dev/phase=run", timeout=60)

    first = kube.list("jobsets", "luthier.dev/job=nowhere")[0]["metadata"]["uid"]
    patch(kube, "nowhere", suspend=True)
    kube.until_gone("jobsets", "luthier.dev/job=nowhere", timeout=60)
    patch(kube, "nowhere", suspend=False)
    until(kube, "nowhere", "True Admitted", timeout=60)
    assert kube.list("jobsets", "luthier.dev/job=nowhere")[0]["metadata"]["uid"] != first
    kube.delete("ftj", "nowhere", "--wait")
