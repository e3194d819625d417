"""What goes wrong: mistakes, lost pods, a Hub that is away, an operator that is killed. Nothing is lost, and the status
says why.

And what goes on purpose: a job that is deleted, before its run and after its end (test_metrics deletes those that run).
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass

import pytest
from cluster import choice
from e2e import figures, jobs
from e2e.conftest import namespace
from e2e.kube import Kube, Object, condition, conditions
from hub import manifests as hub_manifests

pytestmark = pytest.mark.e2e
KILLED = 137  # 128 + SIGKILL
STEPS = 400
"""Of trainings that are disturbed after their first checkpoint, some seconds after it was written."""


@pytest.fixture(scope="module", autouse=True)
def base(kube: Kube) -> None:
    """A small trained model to start from."""
    kube.apply(jobs.BASE)
    kube.complete("ftj", "base")


@dataclass(frozen=True)
class Case:
    name: str
    mistake: dict[str, object]
    reason: str
    messages: list[str]


MISTAKES = [
    Case(
        name="missing-column",
        mistake={"dataset": {"files": ["/data/packages.jsonl"], "columns": {"text": "txet"}}},
        reason="InvalidDataset",
        messages=["spec.dataset.columns.text", "txet", "text, label", "Did you mean"],
    ),
    Case(
        name="unknown-model",
        mistake={"model": {"id": "luthier/no-such-model"}},
        reason="NotFound",
        messages=["spec.model.id", "luthier/no-such-model"],
    ),
    Case(
        name="impossible-split",
        mistake={"dataset": {"files": ["/data/packages.jsonl"], "split": "train[500%:]"}},
        reason="InvalidSpec",
        messages=["spec.dataset.split", "train[500%:]"],
    ),
]


@pytest.fixture(scope="module")
def mistaken(kube: Kube, base: None) -> None:
    """All jobs with a mistake, whose pods prepare at the same time."""
    common = {"model": {"job": "base"}, "dataset": jobs.PROSE, "training": jobs.training()}
    kube.apply(*(jobs.fine_tune(case.name, **(common | case.mistake)) for case in MISTAKES))


@pytest.mark.usefixtures("mistaken")
@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_a_mistake_is_told_and_not_retried(kube: Kube, case: Case) -> None:
    job = kube.failed("ftj", case.name)
    failed = conditions(job)["Failed"]
    assert failed["reason"] == case.reason
    assert [text for text in case.messages if text not in failed["message"]] == []
    assert len(kube.list("pods", f"luthier.dev/job={case.name}")) == 1
    assert [(a["phase"], a["reason"], a["charged"]) for a in job["status"]["attempts"]] == [
        ("prepare", case.reason, False)
    ]


def test_a_lost_pod_restarts_the_group_from_the_checkpoint(kube: Kube) -> None:
    kube.apply(
        jobs.fine_tune(
            "interrupted",
            model={"job": "base"},
            dataset=jobs.REGISTER,
            method={"type": "lora", "rank": 8},
            training=jobs.training(maxSteps=STEPS, saveSteps=20),
            resources=jobs.CPU | {"nodes": 2},
        )
    )
    kube.until(
        "ftj",
        "interrupted",
        lambda o: (o["status"].get("checkpoint") or {}).get("step"),
        timeout=300,
        what="at a checkpoint",
    )
    victim = kube.list("pods", "luthier.dev/job=interrupted,luthier.dev/phase=run")[1]["metadata"]["name"]
    kube.delete("pod", victim, "--wait=false")
    job = kube.complete("ftj", "interrupted")
    assert job["status"]["restarts"] >= 1
    assert job["status"]["restartsCharged"] == 0
    attempt = job["status"]["attempts"][0]
    assert attempt["reason"] == "Preempted"
    assert attempt["step"] > 0
    log = kube.run("logs", "-l", "luthier.dev/job=interrupted,luthier.dev/phase=run", "--tail=-1")
    assert f"checkpoint-{attempt['step']}" in log
    assert figures.of_operator(kube).total("luthier_job_restarts_total", kind="FineTuneJob", reason="Preempted") >= 1


SIGNAL_RANK_1 = """
import os, pathlib, sys
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
    except OSError:
        continue
    if b"luthier_trainer.worker" in command and b"RANK=1" in environment.split(b"\\0"):
        os.kill(int(folder.name), int(sys.argv[1]))
        print("sent")
"""


@dataclass(frozen=True)
class RankCase:
    name: str
    signal: signal.Signals
    exit_code: int
    message: str


RANKS = [
    RankCase(
        name="killed",
        signal=signal.SIGKILL,
        exit_code=71,
        message="rank 1 was killed by SIGKILL",
    ),
    RankCase(
        name="stopped",
        signal=signal.SIGSTOP,
        exit_code=80,
        message="rank 1 is stopped",
    ),
]


@pytest.fixture(scope="module")
def signalled(kube: Kube, base: None) -> None:
    """Each job, with its signal sent. The first to have a checkpoint is not kept waiting until the others have one."""
    training = {"training": jobs.training(maxSteps=STEPS, saveSteps=20), "scheduling": {"stepTimeoutSeconds": 30}}
    common = {"model": {"job": "base"}, "dataset": jobs.REGISTER, "method": {"type": "lora", "rank": 2}} | training
    resources = jobs.CPU | {"processesPerNode": 2}
    kube.apply(*(jobs.fine_tune(f"rank-{case.name}", **common, resources=resources) for case in RANKS))
    deadline, left = time.monotonic() + 600, list(RANKS)
    while left:
        assert time.monotonic() < deadline, kube.run("describe", "ftj")
        for case in list(left):
            job = kube.get("ftj", f"rank-{case.name}") or {}
            if job.get("status", {}).get("checkpoint"):
                send(kube, case)
                left.remove(case)
        time.sleep(0.5)


def send(kube: Kube, case: RankCase) -> None:
    (pod,) = kube.list("pods", f"luthier.dev/job=rank-{case.name},luthier.dev/phase=run")
    assert kube.python(pod["metadata"]["name"], SIGNAL_RANK_1, str(int(case.signal))).strip() == "sent"


@pytest.mark.usefixtures("signalled")
@pytest.mark.parametrize("case", RANKS, ids=lambda case: case.name)
def test_a_rank_that_dies_or_hangs_is_the_cause_and_the_run_goes_on(kube: Kube, case: RankCase) -> None:
    job = kube.complete("ftj", f"rank-{case.name}")
    (attempt,) = job["status"]["attempts"]
    assert (attempt["exitCode"], attempt["rank"], attempt["charged"]) == (case.exit_code, 1, True)
    assert case.message in attempt["message"]
    assert job["status"]["progress"]["step"] == STEPS


def published(kube: Kube, name: str, hub: dict[str, object], **spec: object) -> None:
    kube.apply(
        jobs.fine_tune(
            name,
            model={"job": "base"},
            dataset=jobs.REGISTER,
            method={"type": "lora", "rank": 2},
            training=jobs.training(maxSteps=4),
            hub=hub,
            **spec,
        )
    )


def test_a_hub_that_is_away_costs_only_time(kube: Kube, system: Kube) -> None:
    hub_manifests.control(system, {"status": 503})  # until it is lifted
    try:
        published(
            kube, "patient", jobs.HUB | {"repo": "luthier/patient"}, workspace={"size": "1Gi", "whenDeleted": "Delete"}
        )
        kube.until(
            "ftj", "patient", lambda _: said_twice(kube), timeout=400, what="in publish, which waits for the Hub"
        )
        waiting = kube.get("ftj", "patient") or {}
        assert waiting["status"]["state"] == "Publishing"
        assert (condition(waiting, "Trained"), condition(waiting, "Published"), condition(waiting, "Complete")) == (
            "True",
            "False",
            None,
        )
        refused = [r for r in hub_manifests.requests(system) if (r["status"], r["path"]) == (503, "/api/repos/create")]
        assert len(refused) >= 2
    finally:
        hub_manifests.ask(system, "DELETE", "/_control")
    job = kube.complete("ftj", "patient")
    assert job["status"]["hub"]["revision"]
    assert job["status"].get("attempts", []) == []
    files = hub_manifests.tree(system, "luthier/patient", job["status"]["hub"]["revision"])
    assert figures.of_operator(kube).total("luthier_hub_upload_bytes_total", kind="FineTuneJob") >= max(
        f["size"] for f in files
    )


def said_twice(kube: Kube) -> bool:
    log = kube.run("logs", "-l", "luthier.dev/job=patient,luthier.dev/phase=publish", "--tail=-1", check=False)
    return len([line for line in log.splitlines() if "503" in line and "trying again in" in line]) >= 2


def test_a_published_job_goes_with_all_that_it_made_and_stays_on_the_hub(kube: Kube, system: Kube) -> None:
    published(
        kube, "patient", jobs.HUB | {"repo": "luthier/patient"}, workspace={"size": "1Gi", "whenDeleted": "Delete"}
    )
    job = kube.complete("ftj", "patient")
    assert len(kube.list("jobs", "luthier.dev/job=patient,luthier.dev/phase=publish")) == 1
    kube.delete_with_children("ftj", "patient", {"ConfigMap", "Job", "JobSet", "Service", "Pod"})
    kube.until_claims("patient", 0)
    assert hub_manifests.tree(system, "luthier/patient", job["status"]["hub"]["revision"])


def test_a_wrong_token_is_told_and_the_result_stays(kube: Kube) -> None:
    published(kube, "locked-out", {"repo": "luthier/locked-out", "tokenSecretRef": {"name": "wrong-token"}})
    job = kube.failed("ftj", "locked-out")
    assert conditions(job)["Published"]["reason"] == "Unauthorized"
    assert "hub.tokenSecretRef" in conditions(job)["Published"]["message"]
    assert condition(job, "Trained") == "True"
    assert "MANIFEST.json" in kube.run(
        "exec", "inspector", "--", "ls", f"/workspace/{job['status']['workspace']['folder']}/result"
    )
    assert (
        figures.of_operator(kube).total("luthier_hub_upload_failures_total", kind="FineTuneJob", reason="Unauthorized")
        >= 1
    )
    # The right token is all it takes: nothing is trained again.
    kube.run(
        "patch",
        "ftj",
        "locked-out",
        "--type=merge",
        "-p",
        json.dumps({"spec": {"hub": {"tokenSecretRef": {"name": "hub-token"}}}}),
    )
    deadline = time.monotonic() + 180
    while condition(kube.get("ftj", "locked-out") or {}, "Complete") != "True":
        assert time.monotonic() < deadline, kube.run("describe", "ftj", "locked-out")
        time.sleep(1)


def operator(system: Kube) -> Object:
    """The pod of the one that works, once its container runs."""
    deadline = time.monotonic() + 120
    while True:
        pod = system.leader()
        if pod and "deletionTimestamp" not in pod["metadata"] and "running" in container(pod).get("state", {}):
            return pod
        assert time.monotonic() < deadline, system.run("describe", "pods", "-l", "app.kubernetes.io/name=luthier")
        time.sleep(0.2)


def ended(system: Kube) -> dict[str, int]:
    """How often the container of each replica has ended: it may wait for its next start."""
    pods = system.list("pods", "app.kubernetes.io/name=luthier")
    return {
        p["metadata"]["uid"]: container(p).get("restartCount", 0) + ("running" not in container(p).get("state", {}))
        for p in pods
    }


def container(pod: Object) -> Object:
    statuses: list[Object] = pod["status"].get("containerStatuses") or [{}]
    return statuses[0]


def kill_operator(system: Kube) -> None:
    """kill -9 on its node; where the tests cannot reach the nodes, its pod is deleted by force, which sends it SIGTERM
    and waits 2 s.
    """
    pod = operator(system)
    name, uid, killed = pod["metadata"]["name"], pod["metadata"]["uid"], container(pod)["containerID"]
    if not choice.cluster().kill(pod["spec"]["nodeName"], killed.rpartition("/")[2]):
        print("kill -9 is not tested here: no node of this cluster is in reach; the pod is deleted by force instead")
        system.run("delete", "pod", name, "--grace-period=0", "--force")
        assert operator(system)["metadata"]["uid"] != uid
        return

    def seen(found: Object) -> bool:
        ends = [container(found).get(state, {}).get("terminated", {}) for state in ("state", "lastState")]
        return any(end.get("containerID") == killed and end["exitCode"] == KILLED for end in ends)

    system.until("pod", name, seen, timeout=30, what="killed with SIGKILL")


def test_the_operator_killed_three_times_changes_nothing(kube: Kube, system: Kube) -> None:
    published(kube, "unshaken", jobs.HUB | {"repo": "luthier/unshaken"})
    moments = {
        "preparing": lambda o: kube.list("pods", "luthier.dev/job=unshaken,luthier.dev/phase=prepare"),
        "running": lambda o: kube.list("pods", "luthier.dev/job=unshaken,luthier.dev/phase=run"),
        "publishing": lambda o: kube.list("pods", "luthier.dev/job=unshaken,luthier.dev/phase=publish"),
    }
    before = ended(system)
    for moment, met in moments.items():
        kube.until("ftj", "unshaken", met, timeout=180, what=moment)
        kill_operator(system)
    job = kube.complete("ftj", "unshaken")
    after = ended(system)
    if after.keys() == before.keys():
        assert sum(after.values()) == sum(before.values()) + len(moments)
    assert (job["status"].get("restarts", 0), job["status"].get("attempts", [])) == (0, [])
    assert job["status"]["metrics"]["evalLoss"] > 0
    assert job["status"]["hub"]["revision"]
    for phase, kind in (("prepare", "jobs"), ("run", "jobsets"), ("publish", "jobs")):
        assert len(kube.list(kind, f"luthier.dev/job=unshaken,luthier.dev/phase={phase}")) >= 1


def test_the_operator_that_is_stopped_hands_over(kube: Kube, system: Kube) -> None:
    """As an upgrade or a drained node stops it. The other one takes up what there is, and what comes."""
    first = operator(system)["metadata"]
    kube.apply(
        jobs.fine_tune(
            "handed-over",
            model={"path": "/data/encoder"},
            task="text-classification",
            dataset={"files": ["/data/packages.jsonl"]},
            training={"maxLength": 128},
            planOnly=True,
        )
    )
    system.run("delete", "pod", first["name"], "--wait=false")
    kube.until("ftj", "handed-over", lambda o: o["status"].get("state") == "Planned", timeout=180, what="Planned")
    assert operator(system)["metadata"]["uid"] != first["uid"]


@pytest.mark.parametrize(("policy", "left"), [("Keep", 1), ("Delete", 0)])
def test_deletion_removes_the_children_and_the_volume_only_where_the_job_says_so(
    kube: Kube, policy: str, left: int
) -> None:
    name = f"gone-{policy.lower()}"
    kube.apply(
        jobs.fine_tune(
            name,
            model={"path": "/data/encoder"},
            dataset=jobs.PROSE,
            workspace={"size": "1Gi", "whenDeleted": policy},
            planOnly=True,
        )
    )
    kube.until("ftj", name, lambda o: kube.list("pods", f"luthier.dev/job={name}"), timeout=60, what="begun")
    kube.until_claims(name, 1)
    kube.delete_with_children("ftj", name, {"ConfigMap", "Job", "Pod"})
    kube.until_claims(name, left)


def test_a_quota_is_quoted_and_the_job_goes_on_without_it(kube: Kube) -> None:
    namespace("luthier-e2e-quota")
    small = Kube("luthier-e2e-quota")
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    small.apply(
        quota,
        jobs.fine_tune("crowded", model={"path": "/none"}, dataset={"files": ["/none.txt"]}, workspace={}, volumes=[]),
    )
    try:
        job = small.until(
            "ftj",
            "crowded",
            lambda o: conditions(o).get("Prepared", {}).get("reason") == "NoPods",
            timeout=90,
            what="NoPods",
        )
        message = conditions(job)["Prepared"]["message"]
        assert message.startswith("spec.prepare: the cluster refuses the pods of Job ftj-crowded-prepare: ")
        assert "exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0. To solve it: " in message
        small.delete("resourcequota", "none")
        failed = small.failed("ftj", "crowded")
        assert conditions(failed)["Failed"]["reason"] == "NotFound"
    finally:
        small.run("delete", "namespace", "luthier-e2e-quota", "--wait=false")
