"""What 1,000 jobs at once, and a namespace of 2,000 that is deleted, do to the operator and to the API server.

On a real API server, with the real operator as a process. Nothing is measured in seconds: the counts of requests,
conditions and Events have limits, and the command fails where one is exceeded. The Job controller makes the pods of
1,000 Jobs in about a minute, so that most of them are late although nothing is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.jobs import HERE, Seen, check_alone, create_jobs, kubectl, watching
from perf.operator_process import AuditLog, OperatorProcess, moment, verb_and_resource

from luthier_operator.client import NAMESPACE_TERMINATING, RESOURCES, ApiError, Client, login
from luthier_operator.election import RENEW_WITHIN
from luthier_operator.model import Object

SYSTEM, LEASE = "luthier-bench-system", "luthier"
LONGEST = 900.0
"""Seconds for anything that is waited for: nothing of it is measured."""
QUIET_SECONDS = 40.0
"""More than the pause after which a namespace that is being deleted is tried again."""


@dataclass
class Conditions:
    """Reasons of conditions that any job has had, by a watch: how many jobs had each."""

    jobs: dict[str, set[str]] = field(default_factory=dict)

    def note(self, found: Object) -> bool:
        for condition in found.get("status", {}).get("conditions", []):
            self.jobs.setdefault(condition["reason"], set()).add(found["metadata"]["name"])
        return True

    def count(self, reason: str) -> int:
        return len(self.jobs.get(reason, ()))


async def burst(client: Client, audit_path: Path, size: int) -> dict[str, Any]:
    """`size` jobs at once, until each has the pod of its first phase."""
    names = [f"bench-{i:05}" for i in range(size)]
    seen = Conditions()
    prepares, jobs = Seen("Job"), Seen("FineTuneJob", seen.note)
    begun = Seen("Job", lambda found: bool(found.get("status", {}).get("active")))
    audit = AuditLog(audit_path, SYSTEM)
    with OperatorProcess(HERE, LUTHIER_LEASE=f"{SYSTEM}/{LEASE}") as operator:
        before = await lease(client)
        async with watching(client, prepares, jobs, begun):
            await create_jobs(client, names)
            await prepares.all_of(names, LONGEST)
            await begun.all_of(names, LONGEST)
            await asyncio.sleep(5)
        after, alive = await lease(client), operator.alive()
    renewals = [moment(event) for event in audit.calls() if verb_and_resource(event) == "patch/leases"]
    pauses = [(b - a).total_seconds() for a, b in itertools.pairwise(renewals)]
    return {
        "jobs": size,
        "jobs_with_NoPods": seen.count("NoPods"),
        "operator_alive": alive,
        "lease_kept": after["holderIdentity"] == before["holderIdentity"],
        "lease_transitions": after.get("leaseTransitions", 0),
        "lease_renewals": len(renewals),
        "longest_pause_between_renewals_s": round(max(pauses, default=0), 1),
        "limits": {
            "jobs_with_NoPods": 0,
            "operator_alive": True,
            "lease_kept": True,
            "lease_transitions": before.get("leaseTransitions", 0),
        },
        "pause_that_loses_the_lease_s": RENEW_WITHIN,
    }


async def lease(client: Client) -> Object:
    spec: Object = (await client.get(RESOURCES["Lease"].path(SYSTEM, LEASE)))["spec"]
    return spec


async def deletion(client: Client, audit_path: Path, size: int) -> dict[str, Any]:
    """Delete a namespace in which `size` jobs are at work, and another half of that has just been created."""
    names = [f"bench-{i:05}" for i in range(size)]
    seen = Conditions()
    prepares, jobs = Seen("Job"), Seen("FineTuneJob", seen.note)
    with OperatorProcess(HERE, LUTHIER_LEASE=f"{SYSTEM}/{LEASE}") as operator:
        async with watching(client, prepares, jobs):
            await create_jobs(client, names[: size // 2])
            await prepares.all_of(names[: size // 2], LONGEST)
            await create_jobs(client, names[size // 2 :])
            audit = AuditLog(audit_path, HERE)
            kubectl("delete", "namespace", HERE, "--wait=false")
            cause = await cause_of_refusal(client)
            begin = time.monotonic()
            await until_gone(client)
            seconds = time.monotonic() - begin
            calls = audit.calls()
            quiet = AuditLog(audit_path, HERE)
            await asyncio.sleep(QUIET_SECONDS)
        alive = operator.alive()
    refused = Counter(verb_and_resource(c) for c in calls if c["responseStatus"]["code"] == 403)
    made = Counter(verb_and_resource(c) for c in calls if c["responseStatus"]["code"] < 300)
    children = sum(count for name, count in refused.items() if name != "create/events")
    return {
        "jobs": size,
        "cause_of_refusal": cause,
        "seconds_until_gone": round(seconds, 1),
        "refused": dict(refused),
        "refused_children": children,
        "refused_events": refused["create/events"],
        "answered": dict(made),
        "jobs_with_FailedCreate": seen.count("FailedCreate"),
        "requests_after_it_is_gone": len(quiet.calls()),
        "operator_alive": alive,
        "limits": {
            "cause_of_refusal": NAMESPACE_TERMINATING,
            "jobs_with_FailedCreate": 0,
            "requests_after_it_is_gone": 0,
            "operator_alive": True,
        },
        "most": {"refused_children": 200, "refused_events": 200},
    }


async def cause_of_refusal(client: Client) -> str:
    """What the API server says when something is created in a namespace that is being deleted."""
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late", "namespace": HERE}}
    try:
        await client.create(config_map)
    except ApiError as error:
        return error.cause
    return "none"


async def until_gone(client: Client) -> None:
    path = f"/api/v1/namespaces/{HERE}"
    while True:
        try:
            await client.get(path)
        except ApiError as error:
            if error.status == 404:
                return
            raise
        await asyncio.sleep(1)


def exceeded(result: dict[str, Any]) -> list[str]:
    """The figures that are beyond their limits."""
    wrong = [name for name, limit in result.get("limits", {}).items() if result[name] != limit]
    return wrong + [name for name, most in result.get("most", {}).items() if result[name] > most]


async def measure(parts: argparse.Namespace, audit: Path) -> dict[str, Any]:
    client = Client(await login(), user_agent="luthier-bench")
    results: dict[str, Any] = {}
    for name, measured, size in (("burst", burst, parts.jobs), ("deletion", deletion, parts.deleted)):
        if not size:
            continue
        for namespace in (HERE, SYSTEM):
            kubectl("delete", "namespace", namespace, "--ignore-not-found", "--timeout=600s")
            kubectl("create", "namespace", namespace)
        results[name] = await measured(client, audit, size)
        results[name]["exceeded"] = exceeded(results[name])
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
    for namespace in (HERE, SYSTEM):
        kubectl("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")
    await client.close()
    return results


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Needs a cluster with the CRDs installed, its audit log beside KUBECONFIG, and no other operator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="created at once; 0: none")
    parser.add_argument("--deleted", type=int, default=2000, help="jobs of the namespace that is deleted; 0: none")
    parts = parser.parse_args(arguments)

    from cluster import choice

    os.environ.update(choice.cluster().ensure())
    choice.cluster().check_free()
    check_alone()
    top = Path(__file__).resolve().parents[2]
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(top / "crds"))
    results = asyncio.run(measure(parts, Path(os.environ["KUBECONFIG"]).parent / "audit.log"))
    if any(result["exceeded"] for result in results.values()):
        raise SystemExit(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
