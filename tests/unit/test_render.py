"""The Kubernetes objects, byte by byte: `REFRESH_GOLDEN=1 python -m pytest tests/unit/test_render.py` writes
tests/unit/golden anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases.observed import HUB, SETTINGS, fine_tune, generate, run_document, status

from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.run import read_run, step_timeout_of
from luthier_api.scheduling import Toleration
from luthier_api.secrets import VARIABLES
from luthier_api.status import JobStatus, Plan, Prepared, ResolvedDataset, ResolvedSource
from luthier_operator import naming
from luthier_operator.model import Job, Object
from luthier_operator.objects import objects
from luthier_operator.profiles import GpuClass, NamespacePolicy, Network, PodResources, ResourceAmounts
from luthier_operator.render.claim import claim, shortfall
from luthier_operator.render.configmap import configmap, run_config
from luthier_operator.settings import Settings
from luthier_operator.workloads import workload

GOLDEN = Path(__file__).parent / "golden"
MIRROR = SETTINGS.model_copy(
    update={"hub_endpoint": "https://hub.example", "image_pull_secrets": ("registry",), "service_account": "trainer"}
)
STYLE = fine_tune(
    status("Complete"), name="style", uid="57y1e000-0000-4000-8000-000000000003", workspace={"claimName": "shared"}
)

MANIFESTS: dict[str, tuple[Job, Settings, list[Any]]] = {
    "lora-2-nodes-of-8-gpus-queued": (
        fine_tune(
            name="support-bot",
            method={"type": "qlora"},
            training={"batchSize": 64},
            resources={"nodes": 2, "gpusPerNode": 8, "cpu": "64", "memory": "524288Mi"},
            volumes=[{"claimName": "models", "mountPath": "/models"}],
            workspace={"size": "200Gi", "storageClassName": "fast", "whenDeleted": "Delete"},
            scheduling={
                "queueName": "team-a",
                "priorityClassName": "low",
                "nodeSelector": {"pool": "h100"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            },
        ),
        SETTINGS,
        [],
    ),
    "full-cpu-2-processes-zero2-offload": (
        fine_tune(
            name="base",
            model={"config": {"modelType": "llama"}},
            dataset={"files": ["/data/prose.txt"]},
            method={"type": "full"},
            strategy="zero2-offload",
            resources={"gpusPerNode": 0, "processesPerNode": 2, "cpu": "2", "memory": "4Gi"},
            volumes=[{"claimName": "data", "mountPath": "/data"}, {"configMap": "prompts", "mountPath": "/prompts"}],
            restarts={"max": 1},
        ),
        SETTINGS,
        [],
    ),
    "generate-2-shards-with-adapter-and-hub": (
        generate(adapters=[{"job": "style", "weight": 0.8}], hub=HUB, scheduling={"queueName": "team-a"}),
        MIRROR,
        [STYLE],
    ),
}


class Readable(yaml.SafeDumper):
    """Documents within documents keep their lines."""


Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
Readable.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


@pytest.mark.parametrize("name", MANIFESTS)
def test_golden(name: str) -> None:
    job, settings, sources = MANIFESTS[name]
    drawn = yaml.dump_all(
        objects(job, settings, sources), Dumper=Readable, sort_keys=False, width=140, explicit_start=True
    )
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("REFRESH_GOLDEN"):
        path.write_text(drawn)
    assert drawn == path.read_text()


def drawn(name: str, suffix: str) -> Object:
    job, settings, sources = MANIFESTS[name]
    return next(o for o in objects(job, settings, sources) if o["metadata"]["name"].endswith(suffix))


def pods(job: Job, settings: Settings = SETTINGS, sources: Sequence[Job] = ()) -> dict[str, Object]:
    """Phase → pod spec."""
    found = {}
    for o in objects(job, settings, sources):
        if o["kind"] in ("Job", "JobSet"):
            inner = o["spec"] if o["kind"] == "Job" else o["spec"]["replicatedJobs"][0]["template"]["spec"]
            found[o["metadata"]["labels"]["luthier.dev/phase"]] = inner["template"]["spec"]
    return found


def environment(pod: Object) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in pod["containers"][0]["env"]}


EVERY_JOB = [fine_tune(hub=HUB), generate(hub=HUB), fine_tune(resources={"gpusPerNode": 0}, hub=HUB)]


@pytest.mark.parametrize("job", EVERY_JOB, ids=["training", "generation", "on CPU"])
def test_the_token_is_only_where_it_is_needed(job: Job) -> None:
    for phase, pod in pods(job, MIRROR).items():
        values = environment(pod)
        reference = {"secretKeyRef": {"name": "hf", "key": "token"}}
        expect = (None, None, "1") if phase == "run" else (reference, "https://hub.example", None)
        assert (values.get("HF_TOKEN"), values.get("HF_ENDPOINT"), values.get("HF_HUB_OFFLINE")) == expect, phase
        assert str(pod).count("'name': 'hf'") == (0 if phase == "run" else 1), "no other mention of the secret"


def test_credentials_of_a_store_are_only_in_the_pods_of_prepare() -> None:
    keys = {"accessKeyId": "id", "secretAccessKey": "key"}
    stores = [{"type": "s3", "secretRef": {"name": "bucket", "keys": keys}}, {"type": "gs", "anonymous": True}]
    for job in (fine_tune(stores=stores), generate(stores=stores)):
        for phase, pod in pods(job).items():
            found = {name: value for name, value in environment(pod).items() if name in VARIABLES}
            expect = {
                "AWS_ACCESS_KEY_ID": {"secretKeyRef": {"name": "bucket", "key": "id"}},
                "AWS_SECRET_ACCESS_KEY": {"secretKeyRef": {"name": "bucket", "key": "key"}},
            }
            assert found == (expect if phase == "prepare" else {}), phase
            assert str(pod).count("'name': 'bucket'") == (2 if phase == "prepare" else 0), "no other mention"


def test_credentials_of_a_tracker_are_only_in_the_pods_of_run() -> None:
    """A Secret that is missing keeps no pod from starting: a tracker that is away stops no training."""
    keys = {"username": "user", "password": "pw"}
    job = fine_tune(tracking=[{"type": "mlflow", "url": "http://m", "secretRef": {"name": "login", "keys": keys}}])
    for phase, pod in pods(job).items():
        found = {name: value for name, value in environment(pod).items() if name in VARIABLES}
        if phase == "run":
            assert found == {
                "MLFLOW_TRACKING_USERNAME": {"secretKeyRef": {"name": "login", "key": "user", "optional": True}},
                "MLFLOW_TRACKING_PASSWORD": {"secretKeyRef": {"name": "login", "key": "pw", "optional": True}},
            }
        else:
            assert found == {}, phase


@pytest.mark.parametrize("job", EVERY_JOB, ids=["training", "generation", "on CPU"])
def test_every_pod_is_restricted(job: Job) -> None:
    """Pod Security `restricted`, field by field; the cluster tests ask an API server that enforces it."""
    for pod in pods(job).values():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert {next(k for k in v if k != "name") for v in pod["volumes"]} <= {
            "emptyDir",
            "configMap",
            "persistentVolumeClaim",
        }
        mounted = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert mounted == {"/tmp", "/run/luthier", "/dev/shm", "/workspace"}
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_grace_of_the_pod_is_that_of_the_run_config() -> None:
    settings = SETTINGS.model_copy(update={"grace_seconds": 90})
    job = fine_tune()
    assert {p["terminationGracePeriodSeconds"] for p in pods(job, settings).values()} == {90}
    assert run_document(configmap(workload(job), settings, {}))["graceSeconds"] == 90


def test_the_limit_of_a_step_is_that_of_the_administrator_unless_the_job_has_its_own() -> None:
    settings = SETTINGS.model_copy(update={"step_timeout_seconds": 900})
    for job, expect in (
        (fine_tune(), 900),
        (fine_tune(scheduling={"stepTimeoutSeconds": 60}), 60),
        (generate(scheduling={"stepTimeoutSeconds": 7200}), 7200),
    ):
        assert step_timeout_of(run_config(workload(job), settings, {})) == expect


def planned(seconds: int | None, **spec: Any) -> Job:
    """A training whose plan asks for so many seconds of grace."""
    plan = Plan(strategy="none", grace_seconds=seconds)
    prepared = Prepared(model=ResolvedSource(source="m"), dataset=ResolvedDataset(source="d", rows=1), plan=plan)
    return fine_tune(**spec).model_copy(update={"status": JobStatus(prepared=prepared)})


@dataclass(frozen=True)
class GraceCase:
    name: str
    job: Job
    prepare: int
    run: int


GRACES = [
    GraceCase(
        name="nothing is planned yet",
        job=fine_tune(),
        prepare=60,
        run=60,
    ),
    GraceCase(
        name="the plan needs little",
        job=planned(42),
        prepare=60,
        run=60,
    ),
    GraceCase(
        name="the plan needs much",
        job=planned(1333),
        prepare=60,
        run=1333,
    ),
    GraceCase(
        name="a plan of an earlier version",
        job=planned(None),
        prepare=60,
        run=60,
    ),
    GraceCase(
        name="the job asks for more",
        job=planned(42, scheduling={"gracePeriodSeconds": 900}),
        prepare=60,
        run=900,
    ),
    GraceCase(
        name="the job asks for less",
        job=planned(1333, scheduling={"gracePeriodSeconds": 30}),
        prepare=60,
        run=30,
    ),
    GraceCase(
        name="a generation asks for more",
        job=generate(scheduling={"gracePeriodSeconds": 90}),
        prepare=60,
        run=90,
    ),
]


@pytest.mark.parametrize("case", GRACES, ids=lambda case: case.name)
def test_the_pods_of_a_run_have_the_time_that_their_plan_needs(case: GraceCase) -> None:
    found = {phase: pod["terminationGracePeriodSeconds"] for phase, pod in pods(case.job).items()}
    assert (found["prepare"], found["run"]) == (case.prepare, case.run)


@pytest.mark.parametrize("job", EVERY_JOB, ids=["training", "generation", "on CPU"])
def test_variables_of_the_administrator_are_in_every_pod_and_win(job: Job) -> None:
    settings = SETTINGS.model_copy(
        update={"env": {"HTTPS_PROXY": "http://proxy:3128", "TOKENIZERS_PARALLELISM": "true"}}
    )
    for pod in pods(job, settings).values():
        names = [e["name"] for e in pod["containers"][0]["env"]]
        assert len(names) == len(set(names))
        assert environment(pod).items() >= settings.env.items()


CPU_ONLY = {"DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"}


@dataclass(frozen=True)
class ThreadCase:
    name: str
    job: Job
    threads: str | None


THREADS = [
    ThreadCase(
        name="GPUs, cores unknown",
        job=fine_tune(),
        threads=None,
    ),
    ThreadCase(
        name="GPUs, 8 cores for each",
        job=fine_tune(resources={"gpusPerNode": 8, "cpu": "64"}),
        threads="8",
    ),
    ThreadCase(
        name="one process, cores unknown",
        job=fine_tune(resources={"gpusPerNode": 0}),
        threads=None,
    ),
    ThreadCase(
        name="two processes, three cores",
        job=fine_tune(resources={"gpusPerNode": 0, "processesPerNode": 2, "cpu": "3500m"}),
        threads="1",
    ),
    ThreadCase(
        name="a shard with four cores",
        job=generate(resources={"gpus": 0, "cpu": "4"}),
        threads="4",
    ),
    ThreadCase(
        name="half a core",
        job=generate(resources={"gpus": 0, "cpu": "0.5"}),
        threads="1",
    ),
]


@pytest.mark.parametrize("case", THREADS, ids=lambda case: case.name)
def test_processes_share_the_cores_of_their_pod(case: ThreadCase) -> None:
    values = environment(pods(case.job)["run"])
    assert values.get("OMP_NUM_THREADS") == case.threads
    assert set(values) & CPU_ONLY == (set() if workload(case.job).gpus_per_pod else CPU_ONLY)


def test_the_rules_are_those_of_the_enum() -> None:
    """A code that is added to the enum is in the rules at once; the numbers stand in the golden files."""
    member = drawn("full-cpu-2-processes-zero2-offload", "-run")["spec"]["replicatedJobs"][0]["template"]["spec"][
        "podFailurePolicy"
    ]["rules"]
    shards = drawn("generate-2-shards-with-adapter-and-hub", "-run")["spec"]["podFailurePolicy"]["rules"]
    assert [(r["action"], r.get("onExitCodes", {}).get("values", "DisruptionTarget")) for r in member] == [
        ("FailJob", ExitCode.codes(Retry.NEVER)),
        ("FailJob", "DisruptionTarget"),
        ("FailJob", ExitCode.codes(Retry.FREE)),
    ]
    assert [(r["action"], r.get("onExitCodes", {}).get("values", "DisruptionTarget")) for r in shards] == [
        ("FailIndex", ExitCode.codes(Retry.NEVER)),
        ("Ignore", "DisruptionTarget"),
        ("Ignore", ExitCode.codes(Retry.FREE)),
    ]


@dataclass(frozen=True)
class QueueCase:
    name: str
    job: Job
    queued: list[str]


QUEUES = [
    QueueCase(
        name="on GPUs",
        job=fine_tune(scheduling={"queueName": "a"}),
        queued=["ftj-bot-run"],
    ),
    QueueCase(
        name="on CPU",
        job=fine_tune(scheduling={"queueName": "a"}, resources={"gpusPerNode": 0}),
        queued=["ftj-bot-run"],
    ),
    QueueCase(
        name="shards",
        job=generate(scheduling={"queueName": "a"}, hub=HUB),
        queued=["gj-lutes-run"],
    ),
]


@pytest.mark.parametrize("case", QUEUES, ids=lambda case: case.name)
def test_the_queue_is_asked_for_the_run_alone(case: QueueCase) -> None:
    assert [
        o["metadata"]["name"]
        for o in objects(case.job, SETTINGS)
        if "kueue.x-k8s.io/queue-name" in o["metadata"]["labels"]
    ] == case.queued
    assert not [o for o in objects(case.job, SETTINGS) if "suspend" in o.get("spec", {})]


@dataclass(frozen=True)
class OwnerCase:
    name: str
    workspace: dict[str, str]
    owned: list[str]


OWNERS = [
    OwnerCase(
        name="a claim that is kept",
        workspace={},
        owned=["ConfigMap", "Job", "JobSet"],
    ),
    OwnerCase(
        name="a claim that goes with the job",
        workspace={"whenDeleted": "Delete"},
        owned=["ConfigMap", "PersistentVolumeClaim", "Job", "JobSet"],
    ),
    OwnerCase(
        name="a claim of the user",
        workspace={"claimName": "mine"},
        owned=["ConfigMap", "Job", "JobSet"],
    ),
]


@pytest.mark.parametrize("case", OWNERS, ids=lambda case: case.name)
def test_what_goes_with_the_job(case: OwnerCase) -> None:
    job = fine_tune(workspace=case.workspace)
    assert [o["kind"] for o in objects(job, SETTINGS) if "ownerReferences" in o["metadata"]] == case.owned
    for o in objects(job, SETTINGS):
        for owner in o["metadata"].get("ownerReferences", []):
            assert (owner["uid"], owner["controller"]) == (job.metadata.uid, True)


def test_a_job_that_no_api_server_has_seen_owns_nothing() -> None:
    """`luthier render | kubectl apply`: the garbage collector deletes what names an owner that does not exist."""
    assert not [
        o
        for o in objects(fine_tune(uid="", workspace={"whenDeleted": "Delete"}), SETTINGS)
        if "ownerReferences" in o["metadata"]
    ]


@dataclass(frozen=True)
class AccessCase:
    name: str
    job: Job
    mode: str


ACCESS = [
    AccessCase(
        name="one pod",
        job=fine_tune(resources={}),
        mode="ReadWriteOnce",
    ),
    AccessCase(
        name="two nodes",
        job=fine_tune(),
        mode="ReadWriteMany",
    ),
    AccessCase(
        name="two shards",
        job=generate(),
        mode="ReadWriteMany",
    ),
    AccessCase(
        name="shards one after another",
        job=generate(parallelism=1),
        mode="ReadWriteOnce",
    ),
    AccessCase(
        name="as the user says",
        job=fine_tune(workspace={"accessMode": "ReadWriteOnce"}),
        mode="ReadWriteOnce",
    ),
]


@pytest.mark.parametrize("case", ACCESS, ids=lambda case: case.name)
def test_the_access_mode_of_a_new_claim(case: AccessCase) -> None:
    made = claim(workload(case.job), SETTINGS)
    assert made is not None
    assert made["spec"]["accessModes"] == [case.mode]


@dataclass(frozen=True)
class LeftCase:
    name: str
    workspace: dict[str, str]
    sizes: dict[str, str]
    expect: str


LEFT = [
    LeftCase(
        name="as large as it should be",
        workspace={"size": "200Gi"},
        sizes={"spec": "200Gi"},
        expect="",
    ),
    LeftCase(
        name="larger",
        workspace={"size": "200Gi"},
        sizes={"spec": "1Ti"},
        expect="",
    ),
    LeftCase(
        name="smaller",
        workspace={"size": "200Gi"},
        sizes={"spec": "10Gi"},
        expect="200Gi are requested, but the claim ftj-bot of an earlier job has 10Gi",
    ),
    LeftCase(
        name="smaller than the default",
        workspace={},
        sizes={"spec": "1Gi"},
        expect="10Gi are requested, but the claim ftj-bot of an earlier job has 1Gi",
    ),
    LeftCase(
        name="its volume is larger",
        workspace={"size": "200Gi"},
        sizes={"spec": "10Gi", "status": "200Gi"},
        expect="",
    ),
    LeftCase(
        name="resized, and not there yet",
        workspace={"size": "200Gi"},
        sizes={"spec": "200Gi", "status": "10Gi"},
        expect="200Gi are requested, but the claim ftj-bot of an earlier job has 10Gi",
    ),
    LeftCase(
        name="written in another way",
        workspace={"size": "200Gi"},
        sizes={"spec": "215e9"},
        expect="",
    ),
]


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case.name)
def test_a_claim_that_is_too_small_is_told_of(case: LeftCase) -> None:
    made = claim(workload(fine_tune(workspace=case.workspace)), SETTINGS)
    assert made is not None
    capacity = {"capacity": {"storage": case.sizes["status"]}} if "status" in case.sizes else {}
    found = {
        "metadata": {"name": "ftj-bot"},
        "spec": {"resources": {"requests": {"storage": case.sizes["spec"]}}},
        "status": capacity,
    }
    remedy = ". Resize the claim, delete it with the results on it, or give this job another name"
    assert shortfall(made, found) == (f"spec.workspace.size: {case.expect}{remedy}" if case.expect else None)
    assert shortfall(made, made) is None


@dataclass(frozen=True)
class UserCase:
    name: str
    settings: dict[str, Any]
    expect: dict[str, int]


USERS = [
    UserCase(
        name="of the image",
        settings={},
        expect={"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
    ),
    UserCase(
        name="any user with group 0",
        settings={"run_as_user": 1000650000, "run_as_group": 0},
        expect={"runAsUser": 1000650000, "runAsGroup": 0, "fsGroup": 1000650000},
    ),
    UserCase(
        name="the cluster chooses",
        settings={"run_as_user": None, "run_as_group": None},
        expect={},
    ),
]


@pytest.mark.parametrize("case", USERS, ids=lambda case: case.name)
def test_the_user_of_all_pods(case: UserCase) -> None:
    for pod in pods(fine_tune(), settings=Settings(trainer_image="trainer:1", **case.settings)).values():
        assert {
            k: v for k, v in pod["securityContext"].items() if k in ("runAsUser", "runAsGroup", "fsGroup")
        } == case.expect
        assert pod["securityContext"]["runAsNonRoot"] is True


@dataclass(frozen=True)
class ResourcesCase:
    name: str
    job: Job
    phase: str
    expect: Object
    """Requests and limits of the container."""
    tmp: str = "20Gi"
    """The most that it may write to /tmp."""
    settings: Settings = SETTINGS


CLASSES = {
    "h100": GpuClass(
        node_selector={"gpu": "h100", "pool": "gpus"},
        tolerations=[Toleration(key="nvidia.com/gpu", operator="Exists")],
        runtime_class_name="nvidia",
        network=Network(
            per_pod={"rdma/hca": "1"},
            per_gpu={"vpc.amazonaws.com/efa": 4},
            env={"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "INFO"},
        ),
    ),
    "mig": GpuClass(resource="nvidia.com/mig-1g.10gb", max_per_pod=1),
}
WITH_CLASSES = SETTINGS.model_copy(update={"gpu_classes": CLASSES})
LIMITED = SETTINGS.model_copy(
    update={
        "prepare_resources": PodResources(
            requests=ResourceAmounts(cpu="1", memory="2Gi", ephemeral_storage="1Gi"),
            limits=ResourceAmounts(cpu="2", memory="4Gi", ephemeral_storage="10Gi"),
        ),
        "tmp_size": "5Gi",
    }
)


@pytest.mark.parametrize(("nodes", "expect"), [(1, {"NCCL_DEBUG": "WARN"}), (2, CLASSES["h100"].network.env)])
def test_variables_of_a_network_are_for_several_nodes(nodes: int, expect: dict[str, str]) -> None:
    """They come after those of all pods."""
    settings = WITH_CLASSES.model_copy(update={"env": {"NCCL_DEBUG": "WARN"}})
    made = pods(fine_tune(resources={"nodes": nodes, "gpusPerNode": 8, "gpuClass": "h100"}), settings)
    found = {phase: environment(pod) for phase, pod in made.items()}
    assert {name: value for name, value in found["run"].items() if name.startswith("NCCL_")} == expect
    assert found["prepare"]["NCCL_DEBUG"] == "WARN"
    assert "NCCL_IB_HCA" not in found["prepare"]


def same(amounts: Object) -> Object:
    """Of devices, requests and limits are the same."""
    return {"requests": amounts, "limits": amounts}


RESOURCES = [
    ResourcesCase(
        name="what the administrator has set",
        job=fine_tune(),
        phase="prepare",
        expect={"requests": {"cpu": "100m", "memory": "512Mi"}},
    ),
    ResourcesCase(
        name="requests and limits of the administrator",
        job=fine_tune(),
        phase="prepare",
        expect={
            "requests": {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "1Gi"},
            "limits": {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "10Gi"},
        },
        tmp="5Gi",
        settings=LIMITED,
    ),
    ResourcesCase(
        name="the job asks for more than the administrator's limits",
        job=fine_tune(prepare={"cpu": 4, "memory": "16Gi", "ephemeralStorage": "50Gi"}),
        phase="prepare",
        expect={
            "requests": {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "50Gi"},
            "limits": {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "50Gi"},
        },
        tmp="50Gi",
        settings=LIMITED,
    ),
    ResourcesCase(
        name="the job asks for some",
        job=fine_tune(prepare={"memory": "16Gi"}),
        phase="prepare",
        expect={"requests": {"cpu": "100m", "memory": "16Gi"}, "limits": {"memory": "16Gi"}},
    ),
    ResourcesCase(
        name="publish by itself",
        job=fine_tune(hub=HUB, prepare={"memory": "16Gi"}, publish={"cpu": "2"}),
        phase="publish",
        expect={"requests": {"cpu": "2", "memory": "512Mi"}},
    ),
    ResourcesCase(
        # A queue that does not cover ephemeral-storage would never admit a run that requests it
        name="a run requests no disk unless it is asked to",
        job=generate(resources={"cpu": 4, "memory": "8Gi"}),
        phase="run",
        expect={
            "requests": {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "1"},
            "limits": {"memory": "8Gi", "nvidia.com/gpu": "1"},
        },
    ),
    ResourcesCase(
        name="a run with disk",
        job=generate(resources={"gpus": 0, "ephemeralStorage": "0.5Ti"}),
        phase="run",
        expect={"requests": {"ephemeral-storage": "512Gi"}, "limits": {"ephemeral-storage": "512Gi"}},
        tmp="512Gi",
    ),
    ResourcesCase(
        name="a class with a network, on two nodes",
        job=fine_tune(resources={"nodes": 2, "gpusPerNode": 8, "gpuClass": "h100"}),
        phase="run",
        expect=same({"nvidia.com/gpu": "8", "rdma/hca": "1", "vpc.amazonaws.com/efa": "32"}),
        settings=WITH_CLASSES,
    ),
    ResourcesCase(
        name="the same on one node, which needs no network",
        job=fine_tune(resources={"gpusPerNode": 8, "gpuClass": "h100"}),
        phase="run",
        expect=same({"nvidia.com/gpu": "8"}),
        settings=WITH_CLASSES,
    ),
    ResourcesCase(
        name="shards need no network, however many there are",
        job=generate(shards=8, resources={"gpuClass": "h100"}),
        phase="run",
        expect=same({"nvidia.com/gpu": "1"}),
        settings=WITH_CLASSES,
    ),
    ResourcesCase(
        name="a MIG profile",
        job=generate(resources={"gpuClass": "mig"}),
        phase="run",
        expect=same({"nvidia.com/mig-1g.10gb": "1"}),
        settings=WITH_CLASSES,
    ),
]


@pytest.mark.parametrize("case", RESOURCES, ids=lambda case: case.name)
def test_requests_and_limits(case: ResourcesCase) -> None:
    pod = pods(case.job, case.settings)[case.phase]
    assert pod["containers"][0]["resources"] == case.expect
    sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume}
    assert sizes.keys() == {"tmp", "run", "shm"}, "all that a pod writes to its node has a limit"
    assert sizes["tmp"] == case.tmp


EVERYWHERE = {
    "labels": {"team": "nlp", "luthier.device/rack": "a"},
    "annotations": {"karpenter.sh/do-not-disrupt": "true"},
    "priorityClassName": "low",
    "tolerations": [{"key": "spot", "operator": "Exists"}],
}
OF_THE_RUN = {
    "nodeSelector": {"pool": "reserved"},
    "schedulerName": "volcano",
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}]
            }
        },
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 10,
                    "podAffinityTerm": {
                        "topologyKey": "kubernetes.io/hostname",
                        "labelSelector": {"matchLabels": {"app": "cache"}},
                    },
                }
            ]
        },
    },
    "topologySpreadConstraints": [
        {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"}
    ],
}
ANYTHING = SETTINGS.model_copy(update={"allowed_labels": ("*",), "allowed_annotations": ("*",), "gpu_classes": CLASSES})


def test_where_pods_run_and_what_others_read_on_them() -> None:
    job = fine_tune(
        hub=HUB,
        resources={"gpusPerNode": 8, "gpuClass": "h100"},
        scheduling=EVERYWHERE | OF_THE_RUN,
    )
    found = pods(job, ANYTHING)
    assert set(found) == {"prepare", "run", "publish"}
    for phase, pod in found.items():
        assert pod["priorityClassName"] == "low"
        assert {"key": "spot", "operator": "Exists"} in pod["tolerations"]
        assert ({"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]) == (phase == "run")
        if phase != "run":
            only_there = {"nodeSelector", "affinity", "schedulerName", "runtimeClassName", "topologySpreadConstraints"}
            assert not set(pod) & only_there, phase
    run = found["run"]
    assert run["nodeSelector"] == {"gpu": "h100", "pool": "reserved"}, "the job's own win"
    assert (run["schedulerName"], run["runtimeClassName"]) == ("volcano", "nvidia")
    assert run["affinity"] == OF_THE_RUN["affinity"]
    (spread,) = run["topologySpreadConstraints"]
    assert spread.pop("labelSelector")["matchLabels"]["luthier.dev/phase"] == "run"
    assert [spread] == OF_THE_RUN["topologySpreadConstraints"]


def test_metadata_of_the_user_is_on_all_pods_and_on_nothing_else() -> None:
    plain, labelled = (objects(fine_tune(hub=HUB, scheduling=s), ANYTHING) for s in ({}, EVERYWHERE))
    for before, after in zip(plain, labelled, strict=True):
        assert after["metadata"] == before["metadata"]
        if after["kind"] not in ("Job", "JobSet"):
            continue
        inner = after["spec"] if after["kind"] == "Job" else after["spec"]["replicatedJobs"][0]["template"]["spec"]
        metadata = inner["template"]["metadata"]
        assert metadata["annotations"] == EVERYWHERE["annotations"]
        phase = after["metadata"]["labels"]["luthier.dev/phase"]
        assert metadata["labels"] == EVERYWHERE["labels"] | naming.labels(fine_tune(), phase)


def test_the_pods_are_told_what_is_known_of_their_gpus() -> None:
    classes = {"h100": GpuClass(memory="80Gi", peak_flops=989e12), "any": GpuClass()}
    given = SETTINGS.model_copy(update={"gpu_classes": classes})
    known, unknown, gone = (
        run_document(configmap(workload(fine_tune(resources={"gpuClass": name})), given, {}))
        for name in ("h100", "any", "b200")
    )
    assert known["gpu"] == {"memory": 80 << 30, "peakFlops": 989e12}
    assert "gpu" not in unknown
    assert "gpu" not in gone, "publish, which needs no GPU, goes on without the class"


def test_the_pods_are_told_which_classes_the_job_may_name() -> None:
    """Of those whose memory is known: `prepare` says which of them a training would fit."""
    classes = {
        "h100": GpuClass(memory="80Gi", peak_flops=989e12),
        "l4": GpuClass(memory="24Gi"),
        "any": GpuClass(peak_flops=1e12),
    }
    given = SETTINGS.model_copy(update={"gpu_classes": classes})
    asked, without = (
        run_document(configmap(workload(fine_tune(resources=resources)), given, {}))
        for resources in ({"gpusPerNode": 1, "gpuClass": "l4"}, {"gpusPerNode": 0})
    )
    assert asked["gpu"] == {"memory": 24 << 30}
    assert asked["gpuClasses"] == {"h100": {"memory": 80 << 30, "peakFlops": 989e12}, "l4": {"memory": 24 << 30}}
    assert "gpuClasses" not in without
    allowed = NamespacePolicy.model_validate({"gpuClasses": ["l4"]})
    limited = given.model_copy(update={"namespace_policies": {"ml": allowed}})
    job = fine_tune(resources={"gpusPerNode": 1, "gpuClass": "l4"})
    assert set(run_document(configmap(workload(job), limited, {}))["gpuClasses"]) == {"l4"}


def test_shards_at_work_at_once() -> None:
    job = generate(shards=100, parallelism=8, maxFailedShards=3)
    spec = next(o for o in objects(job, SETTINGS) if o["metadata"]["name"].endswith("-run"))["spec"]
    assert (spec["completions"], spec["parallelism"], spec["maxFailedIndexes"]) == (100, 8, 3)


@dataclass(frozen=True)
class OwnershipCase:
    name: str
    job: Job
    sources: list[Job]
    fs_group: int | None
    """With it the kubelet changes owner and mode of every file on each volume that is not read-only at its source."""
    writable: list[str]
    """Claims that are not read-only at their source."""
    read_only: list[str]


OWNERSHIPS = [
    OwnershipCase(
        name="a claim that the operator creates is empty",
        job=fine_tune(),
        sources=[],
        fs_group=1000,
        writable=["ftj-bot"],
        read_only=[],
    ),
    OwnershipCase(
        name="data are never changed",
        job=fine_tune(volumes=[{"claimName": "corpus", "mountPath": "/data"}]),
        sources=[],
        fs_group=1000,
        writable=["ftj-bot"],
        read_only=["corpus"],
    ),
    OwnershipCase(
        name="a claim of the user, which may hold other data",
        job=fine_tune(workspace={"claimName": "home"}),
        sources=[],
        fs_group=None,
        writable=["home"],
        read_only=[],
    ),
    OwnershipCase(
        name="a claim of the user that may be changed",
        job=fine_tune(workspace={"claimName": "results", "ownership": "Change"}),
        sources=[],
        fs_group=1000,
        writable=["results"],
        read_only=[],
    ),
    OwnershipCase(
        name="data on the claim of the workspace",
        job=fine_tune(workspace={"claimName": "home"}, volumes=[{"claimName": "home", "mountPath": "/data"}]),
        sources=[],
        fs_group=None,
        writable=["home"],
        read_only=[],
    ),
    OwnershipCase(
        name="the result of another job",
        job=generate(model={"job": "style"}),
        sources=[STYLE],
        fs_group=1000,
        writable=["gj-lutes"],
        read_only=["shared"],
    ),
]


@pytest.mark.parametrize("case", OWNERSHIPS, ids=lambda case: case.name)
def test_the_kubelet_changes_no_files_of_a_user(case: OwnershipCase) -> None:
    found = pods(case.job, sources=case.sources)
    assert set(found) == {"prepare", "run"}
    for pod in found.values():
        context = pod["securityContext"]
        assert context.get("fsGroup") == case.fs_group
        assert context.get("fsGroupChangePolicy") == (case.fs_group and "OnRootMismatch")
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert [c["claimName"] for c in claims if not c.get("readOnly")] == case.writable
        assert [c["claimName"] for c in claims if c.get("readOnly")] == case.read_only
        # A folder below /sources or a volume of the job is mounted read-only, whatever its claim allows.
        writable = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if not m.get("readOnly")]
        assert writable == ["/tmp", "/run/luthier", "/dev/shm", "/workspace"]


def test_the_pods_read_what_was_written() -> None:
    job, settings, sources = MANIFESTS["generate-2-shards-with-adapter-and-hub"]
    config, *_ = objects(job, settings, sources)
    run = read_run(config["data"]["run.json"])
    assert (run.workspace, run.sources) == (
        "/workspace/gj-lutes-beefcafe",
        {"style": "/sources/shared/ftj-style-57y1e000"},
    )
    assert run.spec == job.spec


def test_fields_of_the_life_cycle_do_not_change_the_run() -> None:
    plain, controlled = (
        fine_tune(),
        fine_tune(suspend=True, planOnly=True, activeDeadlineSeconds=60, ttlSecondsAfterFinished=60),
    )
    assert configmap(workload(plain), SETTINGS, {}) == configmap(workload(controlled), SETTINGS, {})


def test_a_job_on_the_same_claim_is_found_below_the_workspace() -> None:
    job = generate(
        model={"job": "style"},
        workspace={"claimName": "shared"},
        volumes=[{"claimName": "shared", "mountPath": "/data"}],
    )
    config = objects(job, SETTINGS, [STYLE])[0]
    assert run_document(config)["sources"] == {"style": "/workspace/ftj-style-57y1e000"}
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in pods(job)["run"]["volumes"] if "persistentVolumeClaim" in v
    ]
    assert claims == [
        "shared",
        "ftj-style",
    ], "style is unknown here, so it is taken to have a claim of its own; ours is one volume"


def test_a_job_that_is_not_there_is_drawn_as_if_no_api_server_had_seen_it() -> None:
    config, *_ = objects(generate(model={"job": "style"}), SETTINGS)
    unseen, *_ = objects(fine_tune(name="style", uid=""), SETTINGS)
    assert run_document(config)["sources"] == {"style": "/sources/ftj-style/ftj-style-00000000"}
    assert run_document(unseen)["workspace"] == "/workspace/ftj-style-00000000"


def test_the_workspace_below_an_adapter_is_mounted_too() -> None:
    base = fine_tune(name="base", uid="ba5e0000-0000-4000-8000-000000000004", method={"type": "full"})
    adapter = fine_tune(
        name="adapter", uid="ada00000-0000-4000-8000-000000000005", model={"job": "base"}, method={"type": "lora"}
    )
    job = generate(model={"job": "adapter"})
    config, _, prepare, *_ = objects(job, SETTINGS, [base, adapter])
    assert run_document(config)["sources"] == {
        "adapter": "/sources/ftj-adapter/ftj-adapter-ada00000",
        "base": "/sources/ftj-base/ftj-base-ba5e0000",
    }
    assert [m["mountPath"] for m in prepare["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]][-2:] == [
        "/sources/ftj-adapter",
        "/sources/ftj-base",
    ]


def test_drawing_needs_no_kubernetes() -> None:
    """A laptop has none of the operator's libraries."""
    code = (
        "import sys; import luthier_operator.objects; print([m for m in ('kubernetes', 'kopf', 'torch',"
        " 'pydantic_settings') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
