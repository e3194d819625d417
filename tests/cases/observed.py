"""What the operator observes, built in a line: jobs, their children and pods as the API server would show them, and a
word for what is decided.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from luthier_api.conditions import ConditionType
from luthier_api.exitcodes import ExitCode
from luthier_api.kinds import FineTuneJob, GenerateJob
from luthier_api.status import Condition, HubStatus, JobStatus, Phase, Plan, Prepared, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_operator import children as children_module
from luthier_operator import naming
from luthier_operator.decide import decide
from luthier_operator.failure.pod_end import pod_end
from luthier_operator.kept import project
from luthier_operator.model import ChildRef, Decision, Job, Object, Observed, PodEnd
from luthier_operator.render.job import hub_hash, hub_target
from luthier_operator.settings import Settings
from luthier_operator.statuses import text
from luthier_operator.wire import read_object
from luthier_operator.workloads import workload

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
BEGIN = NOW - timedelta(hours=1)
SETTINGS = Settings(trainer_image="registry.example/luthier-trainer:1")
PREPARED = Prepared(
    model=ResolvedSource(source="org/model", revision="c0ffee" * 6 + "c0ff"),
    dataset=ResolvedDataset(source="org/chats", rows=900, eval_rows=100),
    plan=Plan(strategy="ddp", world_size=2, steps=40),
)
HUB = {"repo": "org/bot", "tokenSecretRef": {"name": "hf"}}


def at(seconds: float) -> datetime:
    """So many seconds from now."""
    return NOW + timedelta(seconds=seconds)


def status(*true: str, false: dict[str, str] | None = None, **fields: Any) -> JobStatus:
    """A status in which `true` are True, and `false` (type → reason) are False."""
    conditions = [
        Condition(
            type=ConditionType(t), status=value, reason=reason, last_transition_time=text(BEGIN), observed_generation=1
        )
        for value, pairs in (("True", [(t, t) for t in true]), ("False", (false or {}).items()))
        for t, reason in pairs
    ]
    return JobStatus(conditions=conditions, **fields)


def fine_tune(
    given: JobStatus | None = None, name: str = "bot", uid: str = "f00dcafe-0000-4000-8000-000000000001", **spec: Any
) -> FineTuneJob:
    base = {
        "task": "causal-lm",
        "model": {"id": "org/model"},
        "dataset": {"id": "org/chats"},
        "resources": {"nodes": 2, "gpusPerNode": 8},
    }
    job = {
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "ml", "uid": uid, "generation": 1},
        "spec": base | spec,
    }
    return FineTuneJob.model_validate(job).model_copy(update={"status": given or JobStatus()})


def generate(
    given: JobStatus | None = None, name: str = "lutes", uid: str = "beefcafe-0000-4000-8000-000000000002", **spec: Any
) -> GenerateJob:
    base = {
        "task": "text-generation",
        "model": {"id": "org/model"},
        "inputs": {"rows": [{"prompt": "a lute"}]},
        "shards": 2,
    }
    job = {
        "kind": "GenerateJob",
        "metadata": {"name": name, "namespace": "ml", "uid": uid, "generation": 1},
        "spec": base | spec,
    }
    return GenerateJob.model_validate(job).model_copy(update={"status": given or JobStatus()})


def child(
    job: Job,
    phase: Phase,
    state: str = "",
    message: str = "",
    reason: str = "",
    since: datetime = BEGIN,
    born: datetime = BEGIN,
    deleting: bool = False,
    suspend: bool = False,
    notes: dict[str, str] | None = None,
    restarts: int = 0,
    charged: int = 0,
    resumed: datetime | None = None,
) -> Object:
    """The Job or JobSet of `phase`. `state`: Complete, Failed, or nothing while it is at work. `resumed`: when its
    queue let it go on.
    """
    ref = workload(job).child(phase)
    word = "Completed" if ref.kind == "JobSet" and state == "Complete" else state
    conditions = (
        [{"type": word, "status": "True", "reason": reason, "message": message, "lastTransitionTime": text(since)}]
        if state
        else []
    )
    if suspend or resumed:
        conditions.append(
            {
                "type": "Suspended",
                "status": "False" if resumed else "True",
                "lastTransitionTime": text(resumed or BEGIN),
            }
        )
    counters = {}
    if ref.kind == "JobSet":
        counters["restarts"] = restarts
        if charged:  # JobSet leaves it out while it is zero
            counters["restartsCountTowardsMax"] = charged
    annotations = (
        {naming.HUB_ANNOTATION: hub_hash(job), naming.TARGET_ANNOTATION: hub_target(job)} if phase == "publish" else {}
    ) | (notes or {})
    meta = {
        "name": ref.name,
        "namespace": "ml",
        "uid": f"{ref.name}-uid",
        "creationTimestamp": text(born),
        "annotations": annotations,
        "labels": naming.labels(job, phase),
    } | ({"deletionTimestamp": text(NOW)} if deleting else {})
    return {
        "kind": ref.kind,
        "metadata": meta,
        "spec": {"suspend": True} if suspend else {},
        "status": {"conditions": conditions} | counters,
    }


def pod(
    job: Job,
    phase: Phase,
    index: int = 0,
    attempt: int = 0,
    state: Object | None = None,
    node: str = "node-a",
    deleting: bool = False,
    disrupted: bool = False,
    unschedulable: str = "",
    since: datetime | None = None,
    over: str = "Running",
    suffix: str = "",
    scheduled: datetime | None = None,
    free: int = 0,
    born: datetime | None = None,
) -> Object:
    """A pod whose container is in `state`; `over` is its phase. `attempt`: restarts of its group, or of its shard, of
    which `free` were so. `since`: when the scheduler found it `unschedulable`.
    """
    conditions = (
        [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}] if disrupted else []
    )
    if unschedulable:
        refused = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unschedulable}
        conditions.append(refused | ({"lastTransitionTime": text(since)} if since else {}))
    if scheduled:
        conditions.append({"type": "PodScheduled", "status": "True", "lastTransitionTime": text(scheduled)})
    name = f"{naming.child_name(job, phase)}-{index}-{attempt}{suffix}"
    shard = {naming.INDEX_FAILURES_ANNOTATION: str(attempt - free)} | (
        {naming.INDEX_IGNORED_ANNOTATION: str(free)} if free else {}
    )
    labels = naming.labels(job, phase) | (
        {naming.RESTART_LABEL: str(attempt)} if phase == "run" and job.kind == "FineTuneJob" else {}
    )
    annotations = {}
    if phase == "run":
        annotations[naming.INDEX_ANNOTATION] = str(index)
    if phase == "run" and job.kind == "GenerateJob":
        annotations |= shard
    meta = {
        "name": name,
        "namespace": "ml",
        "uid": f"{name}-uid",
        "labels": labels,
        "annotations": annotations,
    }
    meta |= {"deletionTimestamp": text(NOW)} if deleting else {}
    meta |= {"creationTimestamp": text(born)} if born else {}
    statuses = [{"name": naming.CONTAINER, "state": state}] if state else []
    return {
        "kind": "Pod",
        "metadata": meta,
        "spec": {"nodeName": node} if node else {},
        "status": {"phase": over, "conditions": conditions, "containerStatuses": statuses},
    }


RUNNING: Object = {"running": {"startedAt": text(BEGIN)}}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def ended(
    job: Job,
    phase: Phase,
    code: int,
    index: int = 0,
    attempt: int = 0,
    message: str = "",
    when: float = -60,
    kubernetes: str = "Error",
    disrupted: bool = False,
    suffix: str = "",
    silent: bool = False,
    free: int = 0,
    **said: Any,
) -> PodEnd:
    """How a pod ended, read from the pod as the operator does. `silent`: without a termination message of ours."""
    known = ExitCode.of(code)
    message_rank = {"rank": index} if phase == "run" else {}  # as if each pod had one process
    word = TerminationMessage(
        phase=phase, code=code, reason=known.reason if known else "", message=message, **(message_rank | said)
    )
    terminated = {
        "exitCode": code,
        "reason": kubernetes,
        "finishedAt": text(at(when)),
        "message": message if silent else word.encode().decode(),
    }
    over = "Failed" if code else "Succeeded"
    state = {"terminated": terminated}
    found = pod(job, phase, index, attempt, state, disrupted=disrupted, over=over, suffix=suffix, free=free)
    if kubernetes == "OOMKilled":
        found["spec"]["containers"] = [{"name": naming.CONTAINER, "resources": {"limits": {"memory": "16Gi"}}}]
    end = pod_end(found, NOW, was_watched=False)
    assert end
    return end


def prepared_end(job: Job) -> PodEnd:
    return ended(job, "prepare", 0, prepared=PREPARED)


def hub_end(job: Job) -> PodEnd:
    hub = HubStatus(repo="org/bot", revision="abcdef0123456789", url="https://hub.example/org/bot")
    return ended(job, "publish", 0, hub=hub)


def received(found: Object) -> Object:
    """A Job, a JobSet or a pod as it is kept after it was read from an answer of the API server."""
    return project(read_object(found["kind"], json.dumps(found).encode()))


def observed(
    job: Job, *children: Object, pods: Iterable[Object] = (), ends: Iterable[PodEnd] = (), **more: Any
) -> Observed:
    """As the store holds it: what `wire` or `kept` drops, no decision can be made by."""
    named = {ChildRef(c["kind"], c["metadata"]["name"]): received(c) for c in children}
    # As if the operator had seen each end at once, and no clock were wrong.
    since = {ref: ended_at for ref, found in named.items() if (ended_at := children_module.ended_at(found))}
    kept = [received(pod) for pod in pods]
    return Observed(job=job, children=named, pods=kept, ended=list(ends), **({"ended_since": since} | more))


def decided(job: Job, *children: Object, **more: Any) -> Decision:
    return decide(observed(job, *children, **more), SETTINGS, NOW)


def said(decision: Decision, type: str) -> str:
    """A condition in a line: `False Preparing: starting`."""
    condition = decision.status.condition(ConditionType(type))
    return f"{condition.status} {condition.reason}: {condition.message}" if condition else "absent"


def describe(decision: Decision) -> str:
    """What is to be done: `repairs C; applies A, B; deletes C; Failed InvalidDataset; again in 3 s`, or `waits`."""
    parts = []
    if decision.repair:
        parts.append(f"repairs ConfigMap {decision.repair['metadata']['name']}")
    if decision.apply:
        parts.append("applies " + ", ".join(f"{o['kind']} {o['metadata']['name']}" for o in decision.apply))
    if decision.delete:
        parts.append("deletes " + ", ".join(f"{r.kind} {r.name}" for r in decision.delete))
    if decision.delete_job:
        parts.append("deletes the job")
    parts += [
        f"{t} {c.reason}"
        for t in ("Complete", "Failed")
        if (c := decision.status.condition(ConditionType(t))) and c.status == "True"
    ]
    if decision.requeue_after is not None:
        parts.append(f"again in {decision.requeue_after:g} s")
    return "; ".join(parts) or "waits"


def run_document(manifest: Object) -> Any:
    """The run config in a ConfigMap."""
    return json.loads(manifest["data"][naming.RUN_FILE])
