"""The operator against the API server alone: FineTuneJobs to their children, beside the same children created directly.

On a real API server, with the real operator as a process. No pod runs: a node selector that no node has keeps them
pending, and the benchmark itself marks the prepare Jobs as succeeded, so that what is measured is the operator and not
the kubelet. Direct creation uses the operator's own client with as many requests in flight, on manifests that the
operator has rendered.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from luthier_operator.client import RESOURCES, Client, login
from luthier_operator.model import Object

JOBS = int(os.environ.get("LUTHIER_BENCH_JOBS", "200"))
NAMESPACES = {"operator": "luthier-bench", "direct": "luthier-bench-direct"}
SELECTOR = {"luthier.dev/bench": "no-node-has-this"}


def job(i: int) -> Object:
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": f"bench-{i:04}", "namespace": NAMESPACES["operator"]},
        "spec": {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"id": "org/data"},
            "workspace": {"claimName": "bench"},
            "resources": {"nodes": 2, "gpusPerNode": 1},
            "scheduling": {"nodeSelector": SELECTOR},
        },
    }


async def objects(client: Client, kind: str, namespace: str) -> list[Object]:
    return [item async for chunk, _ in client.list(RESOURCES[kind], namespace) for item in chunk]


async def until(client: Client, kind: str, namespace: str, count: int, limit: float = 120) -> None:
    """Wait for `count` objects; their creation times are the measurement, not this loop."""
    deadline = time.monotonic() + limit
    while len(await objects(client, kind, namespace)) < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"{kind}: fewer than {count} after {limit} s")
        await asyncio.sleep(0.2)


async def all_at_once(calls: list[Any]) -> float:
    """Seconds that the calls take together; the client bounds what is in flight."""
    begin = time.monotonic()
    await asyncio.gather(*calls)
    return time.monotonic() - begin


def cpu_and_memory(pid: int) -> tuple[float, float]:
    """CPU seconds (user and system) so far, and peak resident memory in MiB, of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(fields[11]) + int(fields[12])) / ticks, int(peak.split()[1]) / 1024


async def mark_prepared(client: Client, namespace: str) -> tuple[float, float]:
    """Give every prepare Job the status that the Job controller writes when its pod has succeeded. Returns when that
    began (monotonic), and the seconds that it took.
    """
    # The Job controller makes 20 requests a second, and a Job cannot end before it has begun
    deadline = time.monotonic() + 300
    while not all(o["status"].get("startTime") for o in await objects(client, "Job", namespace)):
        if time.monotonic() > deadline:
            raise SystemExit("the Job controller has not begun all Jobs after 300 s")
        await asyncio.sleep(1)
    begin = time.monotonic()
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # So long ago that the operator waits for no word of a pod: there is none.
    earlier = (datetime.now(UTC) - timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    ends = [
        {"type": t, "status": "True", "lastTransitionTime": earlier, "reason": "CompletionsReached"}
        for t in ("SuccessCriteriaMet", "Complete")
    ]
    status = {"active": 0, "ready": 0, "terminating": 0, "succeeded": 1, "completionTime": now, "conditions": ends}

    async def mark(name: str) -> None:
        path = RESOURCES["Job"].path(namespace, name, "status")
        for _ in range(10):  # the Job controller writes as well
            code, _, answer = await client._send(
                "PATCH", path, None, {"status": status}, "application/merge-patch+json"
            )
            if code == 200:
                return
            await asyncio.sleep(0.5)
        raise SystemExit(f"{name}: {answer}")

    names = [
        o["metadata"]["name"]
        for o in await objects(client, "Job", namespace)
        if o["metadata"]["name"].endswith("-prepare")
    ]
    return begin, await all_at_once([mark(n) for n in names])


def calls(audit: Path | None, since: float) -> dict[str, int] | None:
    """API calls of the operator since `since` (epoch seconds) by verb and resource, from the audit log; None without
    one.
    """
    if audit is None or not audit.exists():
        return None
    found: dict[str, int] = {}
    for line in audit.read_text().splitlines():
        event = json.loads(line)
        at = datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()
        if (
            at >= since
            and event.get("userAgent", "").startswith("luthier/")
            and event["verb"] not in ("watch", "list", "get")
        ):
            ref = event.get("objectRef", {})
            if ref.get("namespace") == NAMESPACES["operator"]:
                key = "/".join(filter(None, (event["verb"], ref.get("resource"), ref.get("subresource"))))
                found[key] = found.get(key, 0) + 1
    return found


def clean() -> None:
    """Children before owners: otherwise the garbage collector's requests run into the measurement."""
    for namespace in NAMESPACES.values():
        for kind in ("jobsets", "jobs", "finetunejobs"):
            subprocess.run(
                ["kubectl", "-n", namespace, "delete", kind, "--all", "--timeout=180s"],
                check=False,
                capture_output=True,
            )
        subprocess.run(
            ["kubectl", "delete", "namespace", namespace, "--ignore-not-found", "--timeout=180s"],
            check=True,
            capture_output=True,
        )


async def measure(audit: Path | None) -> dict[str, Any]:
    client = Client(await login())
    client._api.user_agent = "luthier-bench"  # the audit log tells the operator's calls from ours
    clean()
    for namespace in NAMESPACES.values():
        subprocess.run(["kubectl", "create", "namespace", namespace], check=True, capture_output=True)
    image = {"LUTHIER_TRAINER_IMAGE": "registry.example/trainer"}  # in no registry: pods only have to be created
    environment = (
        os.environ
        | image
        | {
            "LUTHIER_METRICS_PORT": "18080",
            "LUTHIER_NAMESPACES": NAMESPACES["operator"],
            "LUTHIER_LOG_LEVEL": "WARNING",
        }
    )
    operator = subprocess.Popen([sys.executable, "-m", "luthier_cli", "operator"], env=environment)
    try:
        await asyncio.sleep(5)
        here = NAMESPACES["operator"]
        cpu0, _ = cpu_and_memory(operator.pid)
        started, begin = time.time(), time.monotonic()
        applied = await all_at_once([client.create(job(i)) for i in range(JOBS)])
        await until(client, "Job", here, JOBS)
        to_prepare = time.monotonic() - begin
        cpu1, _ = cpu_and_memory(operator.pid)
        await asyncio.sleep(5)
        begin, marked = await mark_prepared(client, here)
        await until(client, "JobSet", here, JOBS)
        to_jobset = time.monotonic() - begin
        await asyncio.sleep(5)
        cpu2, peak = cpu_and_memory(operator.pid)
        made = calls(audit, started)
        jobsets = await objects(client, "JobSet", here)
    finally:
        operator.terminate()
        operator.wait()
    bare = [without_owner(o, NAMESPACES["direct"]) for o in jobsets]
    before = resource.getrusage(resource.RUSAGE_SELF)
    direct = await all_at_once([client.apply(o) for o in bare])
    after = resource.getrusage(resource.RUSAGE_SELF)
    await client.close()
    clean()
    direct_cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "jobs": JOBS,
        "finetunejobs_created_per_s": round(JOBS / applied, 1),
        "to_prepare_job": {
            "jobs_per_s": round(JOBS / to_prepare, 1),
            "operator_cpu_ms_per_job": round(1000 * (cpu1 - cpu0) / JOBS, 2),
        },
        "to_jobset": {"jobs_per_s": round(JOBS / to_jobset, 1), "marking_s": round(marked, 2)},
        "direct_jobsets_per_s": round(JOBS / direct, 1),
        "ratio_to_direct": round(direct / to_jobset, 3),
        "operator_cpu_ms_per_job_both_phases": round(1000 * (cpu2 - cpu0) / JOBS, 2),
        "operator_cpu_ratio_to_direct": round((cpu2 - cpu0) / direct_cpu, 1),
        "direct_client_cpu_ms_per_jobset": round(1000 * direct_cpu / JOBS, 2),
        "operator_peak_mib": round(peak, 1),
        "calls_per_job": {k: round(v / JOBS, 2) for k, v in sorted(made.items())} if made else None,
    }


def without_owner(item: Object, namespace: str) -> Object:
    """The JobSet as it was applied, for another namespace."""
    meta = {"name": item["metadata"]["name"], "namespace": namespace, "labels": {"luthier.dev/bench": "direct"}}
    return {"apiVersion": item["apiVersion"], "kind": item["kind"], "metadata": meta, "spec": item["spec"]}


def main() -> dict[str, Any]:
    """Needs a cluster with the CRDs installed and no other operator watching the benchmark's namespace."""
    from cluster import choice

    os.environ.update(choice.cluster().ensure())
    choice.cluster().check_free()
    top = Path(__file__).resolve().parents[2]
    subprocess.run(
        ["kubectl", "apply", "--server-side", "--force-conflicts", "-f", str(top / "crds")],
        check=True,
        capture_output=True,
    )
    audit = Path(os.environ["KUBECONFIG"]).parent / "audit.log"
    return asyncio.run(measure(audit if audit.exists() else None))


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
