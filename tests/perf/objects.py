"""Jobs with their children and pods as a real API server sends them: with defaults, managedFields and statuses.

Their size is what a benchmark of memory is about: a pod has 8 KiB of JSON, and a job with its children has 40.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from luthier_api.kinds import parse_job
from luthier_api.status import Phase, Plan, Prepared, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_operator import naming
from luthier_operator.decide import decide
from luthier_operator.model import Job, Object
from luthier_operator.render.job import prepare
from luthier_operator.settings import Settings
from luthier_operator.store import Store
from luthier_operator.workloads import workload

NAMESPACE = "team-a"
NAME, UID = "bench-00000", "00000000-0000-4000-8000-"
SETTINGS = Settings(trainer_image="registry.example/luthier/trainer@sha256:" + "0" * 64)
PREPARED = Prepared(
    model=ResolvedSource(source="Qwen/Qwen2.5-7B", revision="a" * 40),
    dataset=ResolvedDataset(source="roneneldan/TinyStories", revision="b" * 40, rows=100_000, eval_rows=1000),
    plan=Plan(strategy="zero2", world_size=16, steps=3000, micro_batch_size=4, accumulation_steps=1),
)
State = Literal["finished", "live"]


def world(state: State, now: str) -> list[Object]:
    """One FineTuneJob on two nodes, its children and its pods."""
    spec = {
        "task": "causal-lm",
        "model": {"id": "Qwen/Qwen2.5-7B"},
        "dataset": {"id": "roneneldan/TinyStories", "split": "train[:10%]", "evalSplit": "validation[:1000]"},
        "method": {"type": "qlora", "rank": 16, "alpha": 32},
        "training": {"epochs": 3, "learningRate": 2e-4, "batchSize": 64, "maxLength": 2048, "packing": "isolated"},
        "resources": {"nodes": 2, "gpusPerNode": 8},
        "workspace": {"claimName": "bench"},
    }
    bare = {"apiVersion": "luthier.dev/v1alpha1", "kind": "FineTuneJob", "metadata": meta(NAME, 0, now), "spec": spec}
    stored = bare | {"spec": parse_job(bare).spec.dump(), "status": status(state, now)}
    job = parse_job(stored)

    children = [prepare(workload(job), SETTINGS, {}), workload(job).run_manifest(SETTINGS, {}, 0, 0)]
    for number, child in enumerate(children, 1):
        child["metadata"] |= meta(child["metadata"]["name"], number, now)
    preparing, group = children
    preparing["status"] = {"succeeded": 1, "conditions": [condition("Complete", now)], "uncountedTerminatedPods": {}}
    group["status"] = {"restarts": 0, "replicatedJobsStatus": [{"name": naming.NODE, "ready": 1, "succeeded": 0}]}
    if state == "finished":
        group["status"]["conditions"] = [condition("Completed", now)]

    member = group["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    run_state = "done" if state == "finished" else "running"
    pods = [pod(job, "prepare", preparing["spec"]["template"], 0, "done", now)]
    pods += [pod(job, "run", member, index, run_state, now) for index in (0, 1)]
    stored["status"] = decided(job, [stored, *children, *pods])
    return [managed(found) for found in (stored, *children, *pods)]


def decided(job: Job, objects: list[Object]) -> Object:
    """The status that the operator writes for a job with these objects, so that a new one finds nothing to change."""
    store = Store()
    for found in objects:
        store.put(found | {"metadata": found["metadata"] | {"resourceVersion": "1"}})
    for _ in range(2):
        decision = decide(store.observed(job), SETTINGS, datetime.now(UTC))
        job = job.model_copy(update={"status": decision.status})
    return job.status.dump()


def meta(name: str, number: int, now: str) -> Object:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "uid": f"{UID}{number:012}",
        "resourceVersion": "RV",
        "creationTimestamp": now,
        "generation": 1,
    }


def condition(type: str, now: str, status: str = "True", message: str = "") -> Object:
    return {"type": type, "status": status, "reason": type, "message": message, "lastTransitionTime": now}


def status(state: State, now: str) -> Object:
    ended = state == "finished"
    result = f"the result is in ftj-{NAME}-{UID[:8]}/result of claim bench"
    conditions = [
        condition("Accepted", now, message="The job can run"),
        condition("Prepared", now, message="Qwen/Qwen2.5-7B@aaaaaaaaaaaa, 100000 rows and 1000 to evaluate"),
        condition("Running", now, "False" if ended else "True", "2 pods on 16 GPUs"),
    ]
    if ended:
        conditions += [condition(name, now, message=result) for name in ("Trained", "Complete")]
    return {
        "observedGeneration": 1,
        "state": "Complete" if ended else "Running",
        "conditions": [found | {"observedGeneration": 1} for found in conditions],
        "startTime": now,
        "runStartTime": now,
        "shape": "2×8",
        "prepared": PREPARED.dump(),
        "progress": {"step": 3000, "maxSteps": 3000, "epoch": 3.0, "loss": 1.4, "percent": 100, "time": now},
        "checkpoint": {"step": 3000, "time": now},
        "metrics": {"evalLoss": 1.5, "steps": 3000.0, "lastLoss": 1.4},
        "restarts": 0,
        "restartsCharged": 0,
        "attempts": [],
        "workspace": {"claimName": "bench", "folder": f"ftj-{NAME}-{UID[:8]}"},
    } | ({"completionTime": now} if ended else {})


def pod(job: Job, phase: Phase, template: Object, index: int, state: Literal["done", "running"], now: str) -> Object:
    run, child = phase == "run", naming.child_name(job, phase)
    owner = f"{child}-{naming.NODE}-0" if run else child
    labels = {"batch.kubernetes.io/job-name": owner, naming.INDEX_ANNOTATION: str(index)}
    labels |= {naming.CHILD_LABELS[1]: f"{UID}{9 if run else 1:012}"}
    if run:
        labels |= {naming.CHILD_LABELS[0]: f"{UID}{2:012}", naming.RESTART_LABEL: "0"}
        labels |= {
            f"jobset.sigs.k8s.io/{name}": "0" for name in ("job-index", "job-global-index", "replicatedjob-name")
        }
    spec = copy.deepcopy(template["spec"])
    container = spec["containers"][0]
    message = TerminationMessage(phase=phase, code=0, reason="Succeeded", prepared=None if run else PREPARED)
    ended = {"exitCode": 0, "reason": "Completed", "message": message.encode().decode(), "finishedAt": now}
    container_state: Object = {"running": {"startedAt": now}} if state == "running" else {"terminated": ended}
    kinds = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta(f"{owner}-{index}-x7k2p", 10 + index + 10 * run, now)
        | {
            "labels": template["metadata"]["labels"] | labels,
            "annotations": {naming.INDEX_ANNOTATION: str(index)},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": owner, "uid": "x", "controller": True}
            ],
        },
        "spec": spec | {"nodeName": "gpu-node-17", "schedulerName": "default-scheduler", "dnsPolicy": "ClusterFirst"},
        "status": {
            "phase": "Running" if state == "running" else "Succeeded",
            "podIP": "127.0.0.1",
            "conditions": [condition(name, now) for name in kinds],
            "containerStatuses": [
                {
                    "name": naming.CONTAINER,
                    "image": container["image"],
                    "containerID": "containerd://" + "a" * 64,
                    "state": container_state,
                    "volumeMounts": container["volumeMounts"],
                    "resources": container["resources"],
                }
            ],
        },
    }


def managed(found: Object) -> Object:
    """With `managedFields`, which list each field of an object once more."""
    managers = []
    for manager, part in (("luthier", "spec"), ("kube-controller-manager", "status")):
        listed = {"f:metadata": fields(found["metadata"]), f"f:{part}": fields(found[part])}
        managers.append({"manager": manager, "operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": listed})
    found["metadata"]["managedFields"] = managers
    return found


def fields(found: Any) -> Any:
    if isinstance(found, dict):
        return {f"f:{name}": fields(value) for name, value in found.items()}
    if isinstance(found, list) and found and all(isinstance(item, dict) and "name" in item for item in found):
        return {f'k:{{"name":"{item["name"]}"}}': fields(item) for item in found}
    return {}


@functools.cache
def texts(state: State, now: str) -> list[tuple[str, str, str]]:
    """Kind, name and JSON of each object of `world`."""
    return [(found["kind"], found["metadata"]["name"], json.dumps(found)) for found in world(state, now)]


def copies(state: State, now: str, number: int, version: int) -> list[tuple[str, str, str]]:
    """Kind, name and JSON of the objects of job `number`, from this resourceVersion on."""
    unique = str(uuid.uuid4())[:8]
    found = []
    for kind, name, text in texts(state, now):
        version += 1
        text = text.replace(NAME, f"bench-{number:05}").replace(UID, f"{unique}{UID[8:]}")
        text = re.sub(rf"(ftj-bench-{number:05}-){UID[:8]}", rf"\g<1>{unique}", text.replace('"RV"', f'"{version}"'))
        found.append((kind, name.replace(NAME, f"bench-{number:05}"), text))
    return found
