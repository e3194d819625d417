"""The controllers around the API server: Job, JobSet, garbage collector, and a kubelet that plays a script.

As much of them as the operator can see: pods and their ends, conditions and counts, failure rules, restarts of the
group, and the deletion of a namespace in its order. They act at once, so that whole lives of jobs pass in a fraction of
a second.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fake_api import FakeApi, Object

from luthier_api.exitcodes import ExitCode
from luthier_api.status import HubStatus, Plan, Prepared, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_operator import naming

HOLD = "batch.kubernetes.io/job-tracking"
"""The finalizer of a Job's pods. Only where Jobs hold pods for long does it exist here: with a limit for each index."""
TICK = 0.002  # seconds between a change and what controllers make of it


@dataclass(frozen=True)
class Pod:
    """What a script is asked about."""

    job: str
    phase: str
    index: int
    attempt: int


@dataclass(frozen=True)
class Outcome:
    """How a pod ends, after `seconds`. `waiting`: it never starts, for this reason. `hold`: it runs until `release`."""

    code: int = 0
    message: str = ""
    seconds: float = 0.01
    reason: str = ""
    disrupted: bool = False
    waiting: str = ""
    hold: bool = False


PREPARED = Prepared(
    model=ResolvedSource(source="org/model", revision="a" * 40),
    dataset=ResolvedDataset(source="org/data", revision="b" * 40, rows=100, outputs=100, eval_rows=10),
    plan=Plan(strategy="ddp", world_size=2, steps=30, micro_batch_size=4, accumulation_steps=1),
)


def said(phase: str, code: int = 0, **fields: Any) -> str:
    """A termination message."""
    known = ExitCode.of(code)
    reason = known.reason if known else "Error"
    return TerminationMessage(phase=phase, code=code, reason=reason, **fields).encode().decode()  # type: ignore[arg-type]


def all_well(pod: Pod) -> Outcome:
    """The script in which nothing goes wrong."""
    match pod.phase:
        case "prepare":
            return Outcome(message=said("prepare", prepared=PREPARED))
        case "publish":
            hub = HubStatus(repo="org/result", revision="c" * 40, url="https://hub/org/result", files=3, bytes=1000)
            return Outcome(message=said("publish", hub=hub))
    return Outcome(message=said("run", metrics={"evalLoss": 1.5}, step=30), seconds=0.03)


class FakeCluster(FakeApi):
    def __init__(self, script: Callable[[Pod], Outcome] = all_well) -> None:
        super().__init__()
        self.script = script
        self.started: list[Pod] = []
        self.delays: set[str] = set()  # phases whose Jobs create no pods now: their back-off
        self._running: set[str] = set()
        self._emptied: set[str] = set()  # namespaces whose content is being deleted
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> FakeCluster:
        await super().__aenter__()
        self._task = asyncio.create_task(self._controllers())
        return self

    async def __aexit__(self, *_: Any) -> None:
        assert self._task
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await super().__aexit__()

    def pods(self, job: str, phase: str) -> list[Object]:
        found = self.all("Pod", **{naming.JOB_LABEL: job, naming.PHASE_LABEL: phase})
        return sorted(found, key=lambda p: p["metadata"]["annotations"][naming.INDEX_ANNOTATION])

    def release(self, pod: Object, outcome: Outcome) -> None:
        """A pod that was held ends like this."""
        self._end(pod["metadata"]["name"], pod["metadata"]["namespace"], outcome)

    def delete_namespace(self, namespace: str) -> None:
        """Begin to delete it. Its name is in `terminating` until it is gone."""
        self.terminating.add(namespace)
        self._emptied.add(namespace)
        self._wake()

    def end_delays(self) -> None:
        self.delays.clear()
        self._wake()

    def _wake(self) -> None:
        """Let the controllers look, which wait for a change."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def in_namespace(self, namespace: str) -> list[Object]:
        return [found for (_, ns, _), found in self.objects.items() if ns == namespace]

    async def _controllers(self) -> None:
        seen = -1
        while True:
            if seen == self.version:
                changed = self._changed
                await changed.wait()
            await asyncio.sleep(TICK)
            seen = self.version
            for jobset in self.all("JobSet"):
                self._jobset(jobset)
            for job in self.all("Job"):
                self._job(job)
            for pod in self.all("Pod"):
                self._kubelet(pod)
            for namespace in sorted(self._emptied):
                self._delete_content(namespace)
            self.collect_garbage()
            self._release_orphans()

    # Namespace

    def _delete_content(self, namespace: str) -> None:
        """Pods first, and the rest once they are gone: ordered deletion."""
        if pods := [found for found in self.in_namespace(namespace) if found["kind"] == "Pod"]:
            for pod in pods:
                if not pod["metadata"].get("deletionTimestamp"):
                    self._stop(pod)
            return
        for found in self.in_namespace(namespace):
            self.delete(found)
        self._emptied.discard(namespace)
        self.terminating.discard(namespace)

    def _release_orphans(self) -> None:
        """The Job controller holds no pod of a Job that is gone."""
        jobs = {job["metadata"]["uid"] for job in self.all("Job")}
        for pod in self.all("Pod"):
            if not jobs & {owner["uid"] for owner in pod["metadata"].get("ownerReferences", [])}:
                self.finalize(pod)

    # Job

    def _job(self, job: Object) -> None:
        meta, spec, status = job["metadata"], job["spec"], copy.deepcopy(job.get("status", {}))
        pods = [p for p in self.all("Pod") if _owned(p, job)]
        if meta.get("deletionTimestamp") or _is(status, "Complete") or _is(status, "Failed"):
            for pod in pods:
                self.finalize(pod)
            return
        live = [p for p in pods if p["status"]["phase"] in ("Pending", "Running")]
        if spec["suspend"]:
            for pod in live:
                self._stop(pod)
            for pod in pods:
                self.finalize(pod)
            self._set(job, {**status, "active": 0, "ready": 0, "conditions": [_condition("Suspended", "JobSuspended")]})
            return
        conditions = [c for c in status.get("conditions", []) if c["type"] != "Suspended"]
        status = {**status, "startTime": status.get("startTime") or _now(), "conditions": conditions}
        verdicts = {p["metadata"]["uid"]: self._verdict(job, p) for p in pods if p["status"]["phase"] == "Failed"}
        fatal = next((m for v, m in verdicts.values() if v == "FailJob"), "")
        done, failed, active = set[int](), set[int](), len(live)
        for index in range(spec["completions"]):
            mine = [p for p in pods if _index(p) == index]
            counted = [p for p in mine if verdicts.get(p["metadata"]["uid"], ("",))[0] == "Count"]
            if any(p["status"]["phase"] == "Succeeded" for p in mine):
                done.add(index)
            elif any(verdicts.get(p["metadata"]["uid"], ("",))[0] == "FailIndex" for p in mine) or (
                "backoffLimitPerIndex" in spec and len(counted) > spec["backoffLimitPerIndex"]
            ):
                failed.add(index)
            elif "backoffLimitPerIndex" not in spec and len(counted) > spec["backoffLimit"]:
                fatal = fatal or "BackoffLimitExceeded:Job has reached the specified backoff limit"
            elif (
                not fatal and active < spec["parallelism"] and not any(p in live for p in mine) and self._may_begin(job)
            ):
                self._create_pod(job, index, len(mine), len(counted))
                active += 1
        self._release_counted(job)
        live = [p for p in self.all("Pod") if _owned(p, job) and p["status"]["phase"] in ("Pending", "Running")]
        if failed and len(done) + len(failed) == spec["completions"]:
            fatal = "FailedIndexes:Job has failed indexes"
        elif len(failed) > spec.get("maxFailedIndexes", spec["completions"]):
            fatal = "MaxFailedIndexesExceeded:Job has exceeded the specified maximal number of failed indexes"
        ready = sum(p["status"]["phase"] == "Running" for p in live)
        status |= {
            "active": len(live),
            "ready": ready,
            "succeeded": len(done),
            "failed": len(verdicts),
            "completedIndexes": ",".join(map(str, sorted(done))),
            "failedIndexes": ",".join(map(str, sorted(failed))),
        }
        if fatal:
            reason, message = fatal.split(":", 1)
            for pod in live:
                self._stop(pod)
            status |= {
                "active": 0,
                "ready": 0,
                "conditions": [
                    *conditions,
                    _condition("FailureTarget", reason, message),
                    _condition("Failed", reason, message),
                ],
            }
        elif len(done) == spec["completions"]:
            ends = [
                _condition("SuccessCriteriaMet", "CompletionsReached"),
                _condition("Complete", "CompletionsReached"),
            ]
            status |= {"completionTime": _now(), "conditions": [*conditions, *ends]}
        self._set(job, status)

    def _may_begin(self, job: Object) -> bool:
        """Whether it can create a pod now."""
        meta = job["metadata"]
        return meta["namespace"] not in self.terminating and meta["labels"].get(naming.PHASE_LABEL) not in self.delays

    def _release_counted(self, job: Object) -> None:
        """Let go the pods that the Job has counted. The last failed one of an index tells how often that has failed,
        and is held until the next one exists.
        """
        newest: dict[int, Object] = {}
        for pod in (p for p in self.all("Pod") if _owned(p, job)):
            if earlier := newest.get(_index(pod)):
                self.finalize(earlier)
            newest[_index(pod)] = pod
        for pod in newest.values():
            if pod["status"]["phase"] == "Succeeded":
                self.finalize(pod)

    def _verdict(self, job: Object, pod: Object) -> tuple[str, str]:
        """Action of the first failure rule that matches, with reason:message of the Job's end."""
        state = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        place = f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']}"
        for i, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", [])):
            codes, wanted = rule.get("onExitCodes"), rule.get("onPodConditions", [])
            if codes and (state["exitCode"] in codes["values"]) == (codes["operator"] == "In"):
                text = (
                    f"Container {codes['containerName']} for {place} failed with exit code {state['exitCode']} matching"
                    f" {rule['action']} rule at index {i}"
                )
            elif any(c["type"] == w["type"] for c in pod["status"].get("conditions", []) for w in wanted):
                text = (
                    f"{place[:1].upper()}{place[1:]} has condition DisruptionTarget matching {rule['action']} rule at"
                    f" index {i}"
                )
            else:
                continue
            return rule["action"], f"PodFailurePolicy:{text}"
        return "Count", ""

    def _create_pod(self, job: Object, index: int, number: int, failures: int) -> None:
        template, meta = job["spec"]["template"], job["metadata"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
        self.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "spec": {**template["spec"], "nodeName": f"node-{index}"},
                "metadata": {
                    **({"finalizers": [HOLD]} if "backoffLimitPerIndex" in job["spec"] else {}),
                    "name": f"{meta['name']}-{index}-{meta['uid'][:4]}{number}",
                    "namespace": meta["namespace"],
                    "ownerReferences": [owner],
                    "labels": {
                        **template["metadata"]["labels"],
                        "batch.kubernetes.io/job-completion-index": str(index),
                        "batch.kubernetes.io/controller-uid": meta["uid"],
                    },
                    "annotations": {
                        naming.INDEX_ANNOTATION: str(index),
                        naming.INDEX_FAILURES_ANNOTATION: str(failures),
                    }
                    | ({naming.INDEX_IGNORED_ANNOTATION: str(number - failures)} if number > failures else {}),
                },
                "status": {"phase": "Pending"},
            }
        )

    # JobSet

    def _jobset(self, jobset: Object) -> None:
        meta, spec, status = jobset["metadata"], jobset["spec"], copy.deepcopy(jobset.get("status", {}))
        if meta.get("deletionTimestamp") or _is(status, "Completed") or _is(status, "Failed"):
            return
        status.setdefault("restarts", 0)
        status.setdefault("restartsCountTowardsMax", 0)
        status.setdefault("conditions", [])
        children = [j for j in self.all("Job") if _owned(j, jobset)]
        if any(j["metadata"].get("deletionTimestamp") for j in children):
            return  # BlockingRecreate: until all are gone
        replicated = spec["replicatedJobs"][0]
        if not children and meta["namespace"] not in self.terminating:
            self._create_child(jobset, replicated, status["restarts"])
        job = next(iter(children), None)
        if job and job["spec"]["suspend"] != spec["suspend"]:
            self.change(job, lambda o: o["spec"].update(suspend=spec["suspend"]))
        state = job.get("status", {}) if job else {}
        status["conditions"] = [c for c in status["conditions"] if c["type"] != "Suspended"]
        if spec["suspend"]:
            status["conditions"].append(_condition("Suspended", "JobsSuspended"))
        status["replicatedJobsStatus"] = [
            {
                "name": replicated["name"],
                "ready": int(bool(state.get("ready")) and state["ready"] == job["spec"]["completions"]) if job else 0,
                "active": int(bool(state.get("active"))),
                "succeeded": int(_is(state, "Complete")),
                "failed": int(_is(state, "Failed")),
                "suspended": int(_is(state, "Suspended")),
            }
        ]
        if _is(state, "Complete"):
            status["conditions"].append(_condition("Completed", "AllJobsCompleted", "jobset completed successfully"))
            status["terminalState"] = "Completed"
        elif job and _is(state, "Failed"):
            self._group_failed(jobset, job, status)
        self._set(jobset, status)

    def _group_failed(self, jobset: Object, job: Object, status: Object) -> None:
        end = next(c for c in job["status"]["conditions"] if c["type"] == "Failed")
        policy = jobset["spec"]["failurePolicy"]
        action = "RestartJobSet"
        for rule in policy.get("rules", []):
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if end["reason"] in rule.get("onJobFailureReasons", [end["reason"]]) and any(
                re.search(p, end["message"]) for p in patterns
            ):
                action = rule["action"]
                break
        charged = status["restartsCountTowardsMax"] + (action == "RestartJobSet")
        if action == "FailJobSet":
            status["conditions"].append(_condition("Failed", "FailJobSetFailurePolicyAction", end["message"]))
            status["terminalState"] = "Failed"
        elif charged > policy.get("maxRestarts", 0):
            status["conditions"].append(
                _condition("Failed", "ReachedMaxRestarts", "jobset failed due to reaching max number of restarts")
            )
            status["terminalState"] = "Failed"
        else:
            status |= {"restarts": status["restarts"] + 1, "restartsCountTowardsMax": charged}
            self.delete(job, "Foreground")

    def _create_child(self, jobset: Object, replicated: Object, restarts: int) -> None:
        meta, template = jobset["metadata"], copy.deepcopy(replicated["template"])
        names = {
            "jobset.sigs.k8s.io/jobset-name": meta["name"],
            "jobset.sigs.k8s.io/jobset-uid": meta["uid"],
            naming.RESTART_LABEL: str(restarts),
        }
        labels = template["spec"]["template"].setdefault("metadata", {}).setdefault("labels", {})
        labels |= names
        owner = {
            "apiVersion": jobset["apiVersion"],
            "kind": "JobSet",
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
        }
        name = f"{meta['name']}-{replicated['name']}-0"
        self.create(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "spec": {**template["spec"], "suspend": jobset["spec"]["suspend"]},
                "metadata": {"name": name, "namespace": meta["namespace"], "labels": names, "ownerReferences": [owner]},
            }
        )

    # Kubelet

    def _kubelet(self, pod: Object) -> None:
        meta = pod["metadata"]
        if pod["status"]["phase"] != "Pending" or meta["uid"] in self._running:
            return
        labels = meta["labels"]
        attempt = int(labels.get(naming.RESTART_LABEL) or len(self._earlier(pod)))
        asked = Pod(labels[naming.JOB_LABEL], labels[naming.PHASE_LABEL], _index(pod), attempt)
        outcome = self.script(asked)
        self._running.add(meta["uid"])
        self.started.append(asked)
        if outcome.waiting:
            state = {"waiting": {"reason": outcome.waiting, "message": outcome.message}}
            self._set(
                pod,
                {**pod["status"], "containerStatuses": [{"name": naming.CONTAINER, "ready": False, "state": state}]},
            )
            return
        state = {"running": {"startedAt": _now()}}
        self._set(
            pod,
            {
                "phase": "Running",
                "podIP": "127.0.0.1",
                "startTime": _now(),
                "containerStatuses": [{"name": naming.CONTAINER, "ready": True, "restartCount": 0, "state": state}],
            },
        )
        if not outcome.hold:
            asyncio.get_running_loop().call_later(outcome.seconds, self._end, meta["name"], meta["namespace"], outcome)

    def _earlier(self, pod: Object) -> list[Object]:
        owner = pod["metadata"]["ownerReferences"][0]["uid"]
        mine = [p for p in self.all("Pod") if any(r["uid"] == owner for r in p["metadata"].get("ownerReferences", []))]
        return [p for p in mine if _index(p) == _index(pod) and p["metadata"]["uid"] != pod["metadata"]["uid"]]

    def _end(self, name: str, namespace: str, outcome: Outcome) -> None:
        pod = self.objects.get(("Pod", namespace, name))
        if pod is None or pod["status"]["phase"] not in ("Running", "Pending"):
            return
        reason = outcome.reason or ("Completed" if outcome.code == 0 else "Error")
        ended = {"exitCode": outcome.code, "reason": reason, "message": outcome.message, "finishedAt": _now()}
        disruption = (
            [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]
            if outcome.disrupted
            else []
        )
        self._set(
            pod,
            {
                **pod["status"],
                "phase": "Failed" if outcome.code else "Succeeded",
                "conditions": disruption,
                "containerStatuses": [
                    {"name": naming.CONTAINER, "ready": False, "restartCount": 0, "state": {"terminated": ended}}
                ],
            },
        )

    def _stop(self, pod: Object) -> None:
        """SIGTERM: it saves, ends, and is gone at once."""
        if pod["status"]["phase"] == "Running":
            phase = pod["metadata"]["labels"][naming.PHASE_LABEL]
            message = said(phase, 75, message="stopped", saved=True, step=10)
            self._end(pod["metadata"]["name"], pod["metadata"]["namespace"], Outcome(75, message))
        elif pod["metadata"].get("finalizers"):  # it has no container that could end: the pod garbage collector does it
            self._end(pod["metadata"]["name"], pod["metadata"]["namespace"], Outcome(137))
        self.delete(pod)

    def _set(self, found: Object, status: Object) -> None:
        self.change(found, lambda o: o.update(status=status))


def _condition(type: str, reason: str, message: str = "") -> Object:
    return {"type": type, "status": "True", "reason": reason, "message": message, "lastTransitionTime": _now()}


def _is(status: Object, type: str) -> bool:
    return any(c["type"] == type and c["status"] == "True" for c in status.get("conditions", []))


def _owned(found: Object, owner: Object) -> bool:
    return any(r["uid"] == owner["metadata"]["uid"] for r in found["metadata"].get("ownerReferences", []))


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][naming.INDEX_ANNOTATION])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
