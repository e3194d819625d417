"""The operator against the API server alone: FineTuneJobs to their children, beside the same children created directly.

On a real API server, with the real operator as a process. No container runs. The pods of `prepare` get a node that has
no kubelet (`node`): the benchmark itself writes that they run and how they end, and ends their Jobs, so that what is
measured is the operator and not a kubelet. The pods of `run` name a scheduler that does not exist: a pod that a
scheduler refuses would be reported, with a status and an Event more than for a job that runs.
`PYTHONPATH=tests python -m perf.jobs --sizes 200 1000 --finished 5000` sets the sizes.

The peer (`bare`) creates the same ConfigMaps, Jobs and JobSets, while the benchmark marks its Jobs as succeeded, too.
Both use a service account: an administrator is exempt from the API server's priority and fairness.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perf import node
from perf.bare import create_in_process
from perf.operator_process import AuditLog, OperatorProcess, calls_to_jobset, per_job, service_account

from luthier_api.kinds import parse_job
from luthier_api.status import JobStatus, Plan, Prepared, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_operator import naming
from luthier_operator.client import RESOURCES, ApiError, Client, login
from luthier_operator.decide import decide
from luthier_operator.model import Object, Observed
from luthier_operator.objects import objects
from luthier_operator.phases.waiting import in_turn
from luthier_operator.reconcile import CREATED_SECONDS
from luthier_operator.settings import Settings

HERE, DIRECT = "luthier-bench", "luthier-bench-direct"
NO_SCHEDULER = "nobody"
EDITS = 20
ENDED_AT_ONCE = 16  # else all pods end before the first Job does, which no controller does
LIMIT = 300.0  # seconds for anything that is waited for


def job(name: str, namespace: str = HERE) -> Object:
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"id": f"org/{name}"},  # the operator reads the same spec only once
            "workspace": {"claimName": node.CLAIM},
            "resources": {"nodes": 2, "gpusPerNode": 1},
            "scheduling": {
                "schedulerName": NO_SCHEDULER,
                "tolerations": [node.TAINT | {"operator": "Exists"}],
            },
        },
    }


class Seen:
    """When each job was first seen to have what `true` asks for, by a watch: polling would load the API server."""

    def __init__(self, kind: str, true: Callable[[Object], bool] = lambda found: True) -> None:
        self.kind, self.true = kind, true
        self.at: dict[str, float] = {}
        self._changed = asyncio.Event()

    async def follow(self, client: Client, since: str) -> None:
        """Watch from the version `since` on, for as long as this task lives: the API server ends a watch after a while,
        or because this process has fallen behind.
        """
        while True:
            with contextlib.suppress(ApiError):
                async for event, found in client.watch(RESOURCES[self.kind], HERE, "", since):
                    if event == "ERROR":
                        raise SystemExit(f"{self.kind}: the watch was ended: {found}")
                    since = found["metadata"]["resourceVersion"]
                    if event in ("ADDED", "MODIFIED"):
                        self.note(found)
            await asyncio.sleep(0.1)

    def note(self, found: Object) -> None:
        if self.true(found):
            labels = found["metadata"].get("labels") or {}
            name = labels.get(naming.JOB_LABEL) or found["metadata"]["name"]
            self.at.setdefault(name, time.monotonic())
            self._changed.set()

    async def all_of(self, names: Iterable[str], limit: float = LIMIT) -> None:
        """Wait until each of `names` was seen. Exits if that takes longer than `limit` seconds."""
        missing = set(names)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while missing := missing - self.at.keys():
                    self._changed.clear()
                    await self._changed.wait()
        if missing:
            raise SystemExit(f"{self.kind}: {len(missing)} missing after {limit} s")


@contextlib.asynccontextmanager
async def watching(client: Client, *watched: Seen, kubelet: node.Kubelet | None = None) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(kubelet.serve())] if kubelet else []
    for seen in watched:
        version = (await client.get(RESOURCES[seen.kind].path(HERE), {"limit": "1"}))["metadata"]["resourceVersion"]
        tasks.append(asyncio.create_task(seen.follow(client, version)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def create_jobs(client: Client, names: list[str]) -> dict[str, float]:
    """Create all at once. Returns when each was answered."""
    answered: dict[str, float] = {}

    async def create(name: str) -> None:
        await client.create(job(name))
        answered[name] = time.monotonic()

    await asyncio.gather(*map(create, names))
    return answered


def p95(values: Iterable[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def finished_job_status() -> Object:
    """As the Job controller writes it."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ends = [
        {"type": name, "status": "True", "lastTransitionTime": now, "reason": "CompletionsReached"}
        for name in ("SuccessCriteriaMet", "Complete")
    ]
    counts = {"active": 0, "ready": 0, "terminating": 0, "succeeded": 1, "uncountedTerminatedPods": None}
    return {**counts, "completionTime": now, "conditions": ends}


def finished_pod_status() -> Object:
    """As the kubelet writes it, with what `prepare` has found."""
    prepared = Prepared(
        model=ResolvedSource(source="org/model", revision="a" * 40),
        dataset=ResolvedDataset(source="org/data", revision="b" * 40, rows=1000, eval_rows=20),
        plan=Plan(strategy="ddp", world_size=2, steps=300, micro_batch_size=4, accumulation_steps=1),
    )
    said = TerminationMessage(phase="prepare", code=0, reason="Completed", prepared=prepared)
    ended = {"exitCode": 0, "reason": "Completed", "message": said.encode().decode()}
    container = {"name": naming.CONTAINER, "image": "", "imageID": "", "ready": False, "restartCount": 0}
    return {"phase": "Succeeded", "containerStatuses": [container | {"state": {"terminated": ended}}]}


async def pods_of_prepare(client: Client, namespace: str) -> dict[str, Object]:
    """Name of a Job → its pod."""
    listed = await client.get(RESOURCES["Pod"].path(namespace))
    return {pod["metadata"]["labels"]["job-name"]: pod for pod in listed["items"]}


async def end_prepares(client: Client, names: Sequence[str], namespace: str) -> list[Awaitable[None]]:
    """What ends the prepare Job of each job once it is awaited: first its pod, and soon afterwards the Job."""
    pods, slots = await pods_of_prepare(client, namespace), asyncio.Semaphore(ENDED_AT_ONCE)

    async def end(name: str) -> None:
        pod = pods[prepare_of(name)]["metadata"]["name"]
        async with slots:
            await patch_status(client, "Pod", pod, finished_pod_status(), namespace)
            await patch_status(client, "Job", prepare_of(name), finished_job_status(), namespace)

    return [end(name) for name in names]


async def patch_status(client: Client, kind: str, name: str, status: Object, namespace: str = HERE) -> None:
    """Write a status, again while another controller writes it, too."""
    path = RESOURCES[kind].path(namespace, name, "status")
    for _ in range(10):
        code, _, answer = await client._send("PATCH", path, None, {"status": status}, "application/merge-patch+json")
        if code == 200 or (code == 422 and b"field is immutable" in answer):  # its controller was faster
            return
        await asyncio.sleep(0.5)
    raise SystemExit(f"{name}: {answer}")


# Throughput


async def throughput(client: Client, account: dict[str, str], audit_path: Path, size: int) -> dict[str, Any]:
    """`size` jobs at once: to the prepare Job, and after it has succeeded to the JobSet; beside direct creation."""
    names = [f"bench-{i:05}" for i in range(size)]
    prepares, jobsets = Seen("Job"), Seen("JobSet")
    begun = Seen("Job", lambda found: "active" in found.get("status", {}))
    with OperatorProcess(HERE, **account) as operator:
        kubelet = node.Kubelet(client, HERE)
        async with watching(client, prepares, jobsets, begun, kubelet=kubelet):
            audit, cpu = AuditLog(audit_path, HERE), [operator.cpu_seconds()]
            begin = time.monotonic()
            answered = await create_jobs(client, names)
            created_in = time.monotonic() - begin
            await prepares.all_of(names)
            first_child = [prepares.at[name] - answered[name] for name in names]
            to_prepare = max(prepares.at.values()) - begin
            cpu.append(operator.cpu_seconds())
            # The Job controller makes 20 requests a second.
            await begun.all_of(names)
            async with asyncio.timeout(LIMIT):
                await kubelet.started(size)
            await asyncio.sleep(5)
            ends = await end_prepares(client, names, HERE)
            begin = time.monotonic()
            await asyncio.gather(*ends)
            await jobsets.all_of(names)
            to_jobset = max(jobsets.at.values()) - begin
            # Until each job was decided on for the last time, which its own creation of children has planned.
            await asyncio.sleep(in_turn(CREATED_SECONDS, size) + 5)
            cpu.append(operator.cpu_seconds())
        peak = operator.memory_mib()
        reconciles = operator.reconciles()
    first, second = children_of(names, DIRECT)
    direct_first = await create_in_process(first, os.environ | account)
    await until_begun(client, DIRECT)
    await asyncio.sleep(5)
    ends = await end_prepares(client, names, DIRECT)
    direct_second = await create_in_process(second, os.environ | account, ends)
    bare_jobs = await create_in_process([job(name, DIRECT) for name in names], os.environ | account)
    calls, bare_cpu = audit.calls(), direct_first.cpu_seconds + direct_second.cpu_seconds
    return {
        "jobs": size,
        "finetunejobs_created_per_s": round(size / created_in, 1),
        "first_child_p95_s": round(p95(first_child), 2),
        "to_prepare_job_per_s": round(size / to_prepare, 1),
        "to_jobset_per_s": round(size / to_jobset, 1),
        "direct_prepare_jobs_per_s": round(size / direct_first.seconds, 1),
        "direct_jobsets_per_s": round(size / direct_second.seconds, 1),
        "direct_finetunejobs_per_s": round(size / bare_jobs.seconds, 1),
        "ratio_to_direct_prepare_job": round(direct_first.seconds / to_prepare, 2),
        # Of an operator that costs what the bare client does, and writes no status: the users' objects come besides.
        "most_ratio_to_direct_prepare_job": round(direct_first.seconds / (direct_first.seconds + bare_jobs.seconds), 2),
        "ratio_to_direct_jobset": round(direct_second.seconds / to_jobset, 2),
        "ratio_to_direct": round((direct_first.seconds + direct_second.seconds) / (to_prepare + to_jobset), 2),
        "cpu_ms_per_job_to_first_child": round(1000 * (cpu[1] - cpu[0]) / size, 2),
        "cpu_ms_per_job_both_phases": round(1000 * (cpu[2] - cpu[0]) / size, 2),
        "bare_client_cpu_ms_per_job": round(1000 * bare_cpu / size, 2),
        "bare_client_cpu_ms_per_jobset": round(1000 * direct_second.cpu_seconds / size, 2),
        "cpu_ratio_to_bare_client": round((cpu[2] - cpu[0]) / bare_cpu, 1),
        "cpu_ratio_to_bare_client_of_jobsets": round((cpu[2] - cpu[0]) / direct_second.cpu_seconds, 1),
        "reconciles_per_job": round(reconciles / size, 2),
        "calls_per_job_to_its_jobset": calls_to_jobset(calls),
        "calls_per_job": per_job(calls, size),
        "peak_mib": round(peak, 1),
    }


async def until_begun(client: Client, namespace: str) -> None:
    """Wait until the Job controller has begun with all Jobs. Raises TimeoutError if that takes too long."""
    async with asyncio.timeout(LIMIT):
        while True:
            whole = await client.get(RESOURCES["Job"].path(namespace))
            if all("active" in found.get("status", {}) for found in whole["items"]):
                return
            await asyncio.sleep(2)


def prepare_of(name: str) -> str:
    return f"ftj-{name}-prepare"


def children_of(names: Iterable[str], namespace: str) -> tuple[list[Object], list[Object]]:
    """What the operator creates for these jobs before and after `prepare`, without owners, for `namespace`."""
    settings, first, second = Settings(trainer_image="registry.example/trainer"), [], []
    for name in names:
        for manifest in objects(parse_job(job(name)), settings):
            meta = {
                "name": manifest["metadata"]["name"],
                "namespace": namespace,
                "labels": {"luthier.dev/bench": "direct"},
            }
            (second if manifest["kind"] == "JobSet" else first).append(manifest | {"metadata": meta})
    return first, second


# Reaction to edits


async def edits(client: Client, account: dict[str, str], burst: int) -> dict[str, Any]:
    """From the answer to `spec.suspend: true` to the status that says Suspended: idle, and while jobs are created."""
    names = [f"bench-edit-{i:03}" for i in range(2 * EDITS)]
    prepares, suspended = Seen("Job"), Seen("FineTuneJob", is_suspended)
    with OperatorProcess(HERE, **account):
        async with watching(client, prepares, suspended):
            await create_jobs(client, names)
            await prepares.all_of(names)
            await asyncio.sleep(5)
            idle = await edit_all(client, suspended, names[:EDITS])
            load = asyncio.create_task(create_jobs(client, [f"bench-load-{i:05}" for i in range(burst)]))
            await asyncio.sleep(0.5)
            loaded = await edit_all(client, suspended, names[EDITS:])
            await load
    return {
        "edits": EDITS,
        "idle_p95_ms": round(1000 * p95(idle)),
        "jobs_created_meanwhile": burst,
        "under_load_p95_ms": round(1000 * p95(loaded)),
    }


async def edit_all(client: Client, seen: Seen, names: list[str]) -> list[float]:
    delays = []
    for name in names:
        await client.patch("FineTuneJob", HERE, name, {"spec": {"suspend": True}})
        begin = time.monotonic()
        await seen.all_of([name])
        delays.append(max(0.0, seen.at[name] - begin))
        await asyncio.sleep(0.1)
    return delays


def is_suspended(found: Object) -> bool:
    conditions = found.get("status", {}).get("conditions", [])
    return any((c["type"], c["status"]) == ("Suspended", "True") for c in conditions)


# Restart


async def restart(client: Client, account: dict[str, str], audit_path: Path, finished: int) -> dict[str, Any]:
    """Start over `finished` jobs that have ended."""
    settings = Settings(trainer_image="registry.example/trainer")
    await asyncio.gather(*(create_finished(client, f"bench-done-{i:05}", settings) for i in range(finished)))
    audit = AuditLog(audit_path, HERE)
    with OperatorProcess(HERE, **account) as operator:
        cpu_to_ready = operator.cpu_seconds()
        await asyncio.sleep(20)
        return {
            "finished_jobs": finished,
            "seconds_to_ready": round(operator.seconds_to_ready, 1),
            "cpu_seconds_to_ready": round(cpu_to_ready, 1),
            "cpu_seconds_20_s_later": round(operator.cpu_seconds(), 1),
            "writes": sum(call["verb"] != "get" for call in audit.calls()) if audit_path.exists() else None,
            "peak_mib": round(operator.memory_mib(), 1),
        }


async def create_finished(client: Client, name: str, settings: Settings) -> None:
    """A job with the status that the operator itself would write. Its children were deleted long ago."""
    created = parse_job(await client.create(job(name)))
    conditions = [
        {"type": name, "status": "True", "reason": name, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        for name in ("Accepted", "Prepared", "Trained", "Complete")
    ]
    ended = JobStatus.model_validate({"conditions": conditions, "completionTime": "2026-01-01T00:00:00Z"})
    observed = Observed(created.model_copy(update={"status": ended}), children={}, pods=[], ended=[])
    await patch_status(client, "FineTuneJob", name, decide(observed, settings, datetime.now(UTC)).status.dump())


# The cluster


def clean() -> None:
    """Children before owners: otherwise the garbage collector's requests run into the measurement. The node first: no
    kubelet would end the pods that still run there.
    """
    kubectl("delete", "node", node.NODE, "--ignore-not-found", "--timeout=60s")
    for namespace in (HERE, DIRECT):
        for kind in ("jobsets", "jobs", "finetunejobs"):
            kubectl("-n", namespace, "delete", kind, "--all", "--timeout=300s", check=False)
        kubectl("delete", "namespace", namespace, "--ignore-not-found", "--timeout=300s")
    kubectl("delete", "persistentvolume", node.VOLUME, "--ignore-not-found", "--timeout=60s")


def kubectl(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["kubectl", *arguments], check=check, capture_output=True, text=True).stdout


def check_alone() -> None:
    """Raises SystemExit if an installed operator runs: both would write to the same jobs."""
    query = "jsonpath={range .items[?(@.status.replicas)]}{.metadata.namespace}/{.metadata.name} {end}"
    found = kubectl("get", "deployments", "-A", "-l", "app.kubernetes.io/name=luthier", "-o", query).split()
    if found:
        raise SystemExit(f"an operator is installed: {', '.join(found)}. Scale it to 0 while the benchmark runs")


async def measure(parts: argparse.Namespace, account: dict[str, str], audit: Path) -> dict[str, Any]:
    client = Client(await login(), user_agent="luthier-bench")  # the audit log tells the operator's calls from these
    results: dict[str, Any] = {"throughput": []}

    async def in_empty_namespaces(measured: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        clean()
        for namespace in (HERE, DIRECT):
            kubectl("create", "namespace", namespace)
        node.create(HERE)
        async with node.ready(client):
            result = await measured()
        print(json.dumps(result), file=sys.stderr, flush=True)  # a benchmark of minutes says where it is
        return result

    for size in parts.sizes:
        result = await in_empty_namespaces(functools.partial(throughput, client, account, audit, size))
        results["throughput"].append(result)
    if parts.burst:
        results["edits"] = await in_empty_namespaces(functools.partial(edits, client, account, parts.burst))
    if parts.finished:
        results["restart"] = await in_empty_namespaces(
            functools.partial(restart, client, account, audit, parts.finished)
        )
    clean()
    await client.close()
    return results


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Needs a cluster with the CRDs installed and no other operator watching the benchmark's namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[200, 500, 1000], help="jobs created at once")
    parser.add_argument("--burst", type=int, default=500, help="jobs created while others are edited; 0: no edits")
    parser.add_argument("--finished", type=int, default=5000, help="jobs that have ended before a restart; 0: none")
    parts = parser.parse_args(arguments)

    from cluster import choice

    os.environ.update(choice.cluster().ensure())
    choice.cluster().check_free()
    check_alone()
    top = Path(__file__).resolve().parents[2]
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(top / "crds"))
    with service_account() as account:
        return asyncio.run(measure(parts, account, Path(os.environ["KUBECONFIG"]).parent / "audit.log"))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
