"""The operator as a process against a real API server, with pods that no kubelet runs.

A node selector that no node has keeps the pods pending. What a kubelet would report of them is written by the tests:
that a pod runs at an address, and how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cases.observed import PREPARED
from perf.operator_process import OperatorProcess

from luthier_api.exitcodes import ExitCode
from luthier_api.termination import TerminationMessage
from luthier_operator.client import RESOURCES, ApiError, Client, login
from luthier_operator.model import Object

NOWHERE = {"nodeSelector": {"luthier.dev/test": "no-node-has-this"}}
CONFLICT = 409
TOP = Path(__file__).resolve().parents[2]


def kubectl(*arguments: str, document: Object | None = None, check: bool = True) -> str:
    text = None if document is None else json.dumps(document)
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=check, input=text).stdout


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[None]:
    """Empty namespaces, with our CRDs, while no installed operator works."""
    query = "jsonpath={range .items[?(@.spec.replicas)]}{.metadata.namespace} {.spec.replicas}{'\\n'}{end}"
    label = "app.kubernetes.io/name=luthier"
    installed = [line.split() for line in kubectl("get", "deployments", "-A", "-l", label, "-o", query).splitlines()]
    for namespace, _ in installed:
        kubectl("-n", namespace, "scale", "deployment", "-l", label, "--replicas=0")
        kubectl("-n", namespace, "wait", "pod", "-l", label, "--for=delete", "--timeout=60s")
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(TOP / "crds"))
    for name in names:
        kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=300s")
        kubectl("create", "namespace", name)
    try:
        yield
    finally:
        for name in names:
            # No operator works any more that would let the pods of shards go.
            kubectl("-n", name, "delete", "finetunejobs,generatejobs", "--all", "--timeout=60s")
        kubectl("delete", "namespace", *names, "--ignore-not-found", "--wait=false")
        for namespace, replicas in installed:
            kubectl("-n", namespace, "scale", "deployment", "-l", label, f"--replicas={replicas}")


def operator(*watched: str, **environment: str) -> OperatorProcess:
    """The operator for these namespaces."""
    return OperatorProcess(",".join(watched), **environment)


def job(kind: str, name: str, **spec: Any) -> Object:
    base: Object = {
        "FineTuneJob": {"task": "causal-lm", "dataset": {"files": ["/data/train.txt"]}},
        "GenerateJob": {"task": "text-generation", "inputs": {"rows": [{"prompt": "a lute"}]}},
    }[kind]
    shared = {"model": {"id": "org/model"}, "workspace": {"claimName": "work"}, "scheduling": NOWHERE}
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": base | shared | spec,
    }


class World:
    """One namespace of the API server, as the user, the controllers and the kubelet change it."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client, self.namespace = client, namespace

    async def create(self, found: Object) -> Object:
        return await self.client.create(found | {"metadata": found["metadata"] | {"namespace": self.namespace}})

    async def get(self, kind: str, name: str) -> Object | None:
        try:
            found = await self.client.get(RESOURCES[kind].path(self.namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return {"apiVersion": RESOURCES[kind].api_version, "kind": kind} | found

    async def all(self, kind: str, **query: str) -> list[Object]:
        """Whole, not only what the operator reads of them."""
        items: list[Object] = (await self.client.get(RESOURCES[kind].path(self.namespace), query))["items"]
        return items

    async def pods(self, name: str, phase: str) -> list[Object]:
        """The pods of a job that have not ended, by their index."""
        found = await self.all("Pod", labelSelector=f"luthier.dev/job={name},luthier.dev/phase={phase}")
        alive = [pod for pod in found if pod["status"].get("phase") not in ("Succeeded", "Failed")]
        return sorted(alive, key=index)

    async def patch(self, kind: str, name: str, patch: Object) -> Object:
        return await self.client.patch(kind, self.namespace, name, patch)

    async def patch_status(self, kind: str, name: str, status: Object) -> None:
        """Written again while another controller writes, too."""
        path = RESOURCES[kind].path(self.namespace, name, "status")
        for _ in range(10):
            code, _, answer = await self.client._send(
                "PATCH", path, None, {"status": status}, "application/merge-patch+json"
            )
            if code != CONFLICT:
                break
            await asyncio.sleep(0.2)
        assert code == 200, answer

    async def delete(self, kind: str, name: str) -> None:
        code, _, answer = await self.client._send(
            "DELETE", RESOURCES[kind].path(self.namespace, name), None, None, "application/json"
        )
        assert code in (200, 202), answer

    async def condition(self, kind: str, name: str, type: str) -> Object | None:
        found = await self.get(kind, name) or {}
        return next((c for c in found.get("status", {}).get("conditions", []) if c["type"] == type), None)

    async def until_condition(self, kind: str, name: str, type: str, reason: str, seconds: float = 60) -> Object:
        """The condition, once it has this reason."""
        found: Object | None = None

        async def met() -> Object | None:
            nonlocal found
            found = await self.condition(kind, name, type)
            return found if found and found["reason"] == reason else None

        return await until(f"{name}: {type} with {reason}", met, seconds, lambda: found)

    async def has_node(self, pod: Object, since: timedelta) -> None:
        """What the scheduler reports, for a time, of a pod whose container has not started since."""
        then = (datetime.now(UTC) - since).strftime("%Y-%m-%dT%H:%M:%SZ")
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": then}
        await self.patch_status("Pod", pod["metadata"]["name"], {"conditions": [scheduled]})

    async def runs(self, pod: Object, address: str) -> None:
        """What the kubelet reports of a pod that runs."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "containerStatuses": [container({"running": {"startedAt": now}})],
        }
        await self.patch_status("Pod", pod["metadata"]["name"], status)

    async def ends(self, pod: Object, code: int, message: str, ahead: timedelta = timedelta()) -> None:
        """What the kubelet reports of a pod that has ended, on a node whose clock is `ahead`."""
        now = (datetime.now(UTC) + ahead).strftime("%Y-%m-%dT%H:%M:%SZ")
        terminated = {"exitCode": code, "message": message, "startedAt": now, "finishedAt": now}
        terminated["reason"] = "Error" if code else "Completed"
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [container({"terminated": terminated})],
        }
        await self.patch_status("Pod", pod["metadata"]["name"], status)

    async def pods_of(self, name: str, phase: str, count: int = 1) -> list[Object]:
        """The pods of a phase, once the Job controller has made so many."""

        async def made() -> list[Object] | None:
            found = await self.pods(name, phase)
            return found if len(found) == count else None

        return await until(f"{count} pods of {phase} of {name}", made)

    async def prepare(self, name: str, **plan: Any) -> None:
        """Let the pod of `prepare` succeed."""
        (pod,) = await self.pods_of(name, "prepare")
        prepared = PREPARED.model_copy(update={"plan": PREPARED.plan.model_copy(update=plan)})
        await self.ends(pod, 0, said("prepare", prepared=prepared))


def container(state: Object) -> Object:
    return {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}


def index(pod: Object) -> int:
    return int(pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", 0))


def said(phase: Any, code: int = 0, **fields: Any) -> str:
    """A termination message."""
    known = ExitCode.of(code)
    reason = known.reason if known else "Error"
    return TerminationMessage(phase=phase, code=code, reason=reason, **fields).encode().decode()


async def until(
    what: str, probe: Callable[[], Awaitable[Any]], seconds: float = 60, state: Callable[[], Any] = lambda: None
) -> Any:
    """What `probe` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := await probe()):
        assert time.monotonic() < deadline, f"not {what}: {state()}"
        await asyncio.sleep(0.2)
    return found


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    """A client that the audit log can tell from the operator's."""
    client = Client(await login(), user_agent="luthier-tests")
    try:
        yield client
    finally:
        await client.close()


def audit_log() -> Path:
    """Beside the kubeconfig, on a cluster of this machine."""
    return Path(os.environ["KUBECONFIG"]).parent / "audit.log"
