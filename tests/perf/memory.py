"""Memory of the operator with thousands of jobs, and what it writes when it starts over them. Limits are beside.

The API server is a small one that answers lists from texts, because a real one would take an hour to fill. The objects
have real sizes (`perf.objects`).
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web
from perf.objects import NAMESPACE, State, copies
from perf.operator_process import OperatorProcess

from luthier_operator.client import RESOURCES, Resource

FINISHED, WITH_CHILDREN, LIVE = 5000, 1000, 500
FINISHED_MIB, LIVE_MIB = 150, 100
RESTING_SECONDS = 45.0  # from readiness to the measurement: kopf and the operator have listed everything once more
BY_PLURAL = {(resource.api_version, resource.plural): resource for resource in RESOURCES.values()}


class ApiServer:
    """Serves lists, and watches in which nothing happens. Writes of a status are carried out, all writes counted."""

    def __init__(self) -> None:
        self.writes: Counter[str] = Counter()
        self._items: dict[str, dict[str, str]] = {}  # by kind and name
        self._version = 1000
        self._loop = asyncio.new_event_loop()
        self._port = 0

    def add(self, state: State, numbers: range, now: str, children: bool) -> None:
        for number in numbers:
            for kind, name, text in copies(state, now, number, self._version):
                self._version += 1
                if children or kind == "FineTuneJob":
                    self._items.setdefault(kind, {})[name] = text

    def __enter__(self) -> ApiServer:
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    def kubeconfig(self, folder: str) -> str:
        """Path of a new kubeconfig that names this server."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}],
            "users": [{"name": "bench", "user": {"token": "bench"}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
            "current-context": "bench",
        }
        path = Path(folder, "kubeconfig")
        path.write_text(json.dumps(document))
        return str(path)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self._port = runner.addresses[0][1]
        started.set()
        self._loop.run_forever()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        if not rest:
            return web.json_response(discovery(request.path.strip("/"), version))
        if rest[0] == "namespaces":
            rest = rest[2:]
        resource = BY_PLURAL.get((version, rest[0])) if rest else None
        if resource is None:
            return web.json_response({"kind": "Status", "code": 404}, status=404)
        if request.method != "GET":
            self.writes[f"{request.method} {'/'.join([resource.plural, *rest[2:]])}"] += 1
            return self._write(await request.text(), resource, rest)
        if len(rest) > 1:
            return web.Response(text=self._items[resource.kind][rest[1]], content_type="application/json")
        if "watch" in request.query:
            return await self._watch(request, resource)
        return self._list(request, resource)

    def _write(self, body: str, resource: Resource, rest: list[str]) -> web.Response:
        if rest[2:] != ["status"]:
            return web.json_response({"kind": "Status", "code": 409, "message": "only statuses"}, status=409)
        found = json.loads(self._items[resource.kind][rest[1]])
        found["status"] = merged(found["status"], json.loads(body)["status"])
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        self._items[resource.kind][rest[1]] = json.dumps(found)
        return web.json_response(found)

    def _list(self, request: web.Request, resource: Resource) -> web.Response:
        start, limit = int(request.query.get("continue", 0)), int(request.query.get("limit", 0)) or 1 << 30
        found = list(self._items.get(resource.kind, {}).values())
        meta: dict[str, Any] = {"resourceVersion": str(self._version)}
        if start + limit < len(found):
            meta["continue"] = str(start + limit)
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": meta}
        items = ",".join(found[start : start + limit])
        return web.Response(text=f'{json.dumps(head)[:-1]}, "items": [{items}]}}', content_type="application/json")

    async def _watch(self, request: web.Request, resource: Resource) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        meta = {"resourceVersion": str(self._version)}
        bookmark = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": meta}
        while True:
            await response.write(json.dumps({"type": "BOOKMARK", "object": bookmark}).encode() + b"\n")
            await asyncio.sleep(30)


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def discovery(path: str, version: str) -> dict[str, Any]:
    """The kinds of an API group; at the roots the versions, which kopf asks for."""
    groups = sorted({resource.api_version for resource in RESOURCES.values() if "/" in resource.api_version})
    if path == "api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "apis":
        return {"kind": "APIGroupList", "groups": [group(each) for each in groups]}
    found = [resource for resource in RESOURCES.values() if resource.api_version == version]
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": each.plural, "singularName": "", "namespaced": True, "kind": each.kind, "verbs": verbs}
        for each in found
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def group(version: str) -> dict[str, Any]:
    known = {"groupVersion": version, "version": version.rpartition("/")[2]}
    return {"name": version.partition("/")[0], "versions": [known], "preferredVersion": known}


def measure(limit_mib: float, *jobs: tuple[State, range, bool]) -> dict[str, Any]:
    """Start an operator over `jobs`: state, numbers, and whether their children and pods exist."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    server = ApiServer()
    for state, numbers, children in jobs:
        server.add(state, numbers, now, children)
    with (
        server,
        tempfile.TemporaryDirectory() as folder,
        OperatorProcess(NAMESPACE, KUBECONFIG=server.kubeconfig(folder)) as operator,
    ):
        time.sleep(RESTING_SECONDS)
        resident = operator.memory_mib("VmRSS")
        return {
            "jobs": sum(len(numbers) for _, numbers, _ in jobs),
            "residentMiB": round(resident),
            "limitMiB": limit_mib,
            "ratio": round(resident / limit_mib, 2),
            "peakMiB": round(operator.memory_mib()),
            "readySeconds": round(operator.seconds_to_ready, 1),
            "cpuSeconds": round(operator.cpu_seconds(), 1),
            "writes": dict(server.writes),
        }


def main() -> dict[str, Any]:
    recent, old = range(WITH_CHILDREN), range(WITH_CHILDREN, FINISHED)
    return {
        "nothing": measure(LIVE_MIB),
        "finished": measure(FINISHED_MIB, ("finished", range(FINISHED), False)),
        "finishedWithChildren": measure(FINISHED_MIB, ("finished", recent, True), ("finished", old, False)),
        "live": measure(LIVE_MIB, ("live", range(LIVE), True)),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
