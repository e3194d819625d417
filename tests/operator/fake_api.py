"""An API server in memory, over HTTP: lists, watches and versions as the real one has them, and faults on request.

What the operator relies on is here: resource versions, watch events with bookmarks and 410, the status subresource with
its conflict, deletion with preconditions, owner references, and the rights of the chart's role.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from jsonpatch import JsonPatchException, apply_patch
from jsonpointer import JsonPointerException
from pydantic import ValidationError
from rights import GRANTED, VERBS, Right

from luthier_api.kinds import parse_job
from luthier_api.status import JobStatus
from luthier_operator.client import JSON_PATCH, RESOURCES, Resource

Object = dict[str, Any]
BY_PLURAL = {(r.api_version, r.plural): r for r in RESOURCES.values()}
# kopf's start looks these up, though it is told not to watch them.
BACKBONE = [
    Resource("v1", "Namespace", "namespaces"),
    Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions"),
]
URL = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))(?:/namespaces/(?P<ns>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status))?$"
)


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.body = (
            code,
            {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": message},
        )


@dataclass(frozen=True)
class Fault:
    """What happens at a write. `answer`: this status instead of the write. `reset`: the connection ends before or after
    it.
    """

    answer: int = 0
    reset: str = ""
    """before, after"""
    kill: bool = False
    """The sender is dead from now on: nothing that it sends is heard."""


@dataclass(frozen=True)
class Call:
    verb: str
    kind: str
    name: str
    subresource: str
    sender: str
    body: Any = field(compare=False, default=None)
    dry_run: bool = False

    def __str__(self) -> str:
        return f"{self.verb} {self.kind}{'/' + self.subresource if self.subresource else ''} {self.name}".strip()


class FakeApi:
    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}  # kind, namespace, name
        self.version = 100
        self.history: list[tuple[int, str, Object]] = []
        self.compacted = 0
        self.calls: list[Call] = []
        self.writes = 0  # of senders, Events left out: they are posted beside, in no certain order
        self.fault: Callable[[int, Call], Fault | None] = lambda number, call: None
        self.killed: set[str] = set()
        self.unanswered: set[str] = set()  # senders that wait for ever
        self.asked: dict[str, set[str]] = {}  # sender, kinds: of every request but those of discovery
        self.on_kill: Callable[[str], None] = lambda sender: None
        self.schema: Callable[[Object], None] = check_status  # what the CRD refuses in a status
        self.missing: set[str] = set()
        self.terminating: set[str] = set()  # namespaces that are being deleted
        self.lost: Callable[[str, Object], bool] = lambda event, found: False
        self.before_list: Callable[[str], Awaitable[None]] = _at_once  # is awaited before a kind is listed
        self.before_write: Callable[[Call], Awaitable[None]] = _at_once  # is awaited after a write was noted in `calls`
        self.used: set[Right] = set()
        self.refused: set[Right] = set()
        self.watched: set[str] = set()  # kinds that somebody has begun to watch
        self._changed = asyncio.Event()
        self._breaks = 0
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def __aenter__(self) -> Any:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.break_watches()
        assert self._runner
        await self._runner.cleanup()

    # The cluster, as seen by tests and controllers

    def get(self, kind: str, name: str, namespace: str = "default") -> Object | None:
        return self.objects.get((kind, namespace, name))

    def all(self, kind: str, **labels: str) -> list[Object]:
        found = [o for (k, _, _), o in list(self.objects.items()) if k == kind]
        return [
            o for o in found if all(o["metadata"].get("labels", {}).get(key) == value for key, value in labels.items())
        ]

    def create(self, manifest: Object) -> Object:
        found = copy.deepcopy(manifest)
        meta = found["metadata"]
        meta.setdefault("namespace", "default")
        key = (found["kind"], meta["namespace"], meta["name"])
        if key in self.objects:
            raise Refused(409, "AlreadyExists", f"{meta['name']} already exists")
        if found["kind"] in ("FineTuneJob", "GenerateJob"):
            found = {**found, "spec": parse_job(found).spec.dump()}
        self._default(found)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
        meta["managedFields"] = [{"manager": "somebody"}]
        self.objects[key] = found
        self._record("ADDED", found)
        return found

    def change(self, found: Object, change: Callable[[Object], None]) -> Object:
        """Change a copy; nothing happens when it stays the same."""
        meta = found["metadata"]
        key = (found["kind"], meta["namespace"], meta["name"])
        current = self.objects[key]
        after = copy.deepcopy(current)
        change(after)
        if after == current:
            return current
        if after.get("spec") != current.get("spec"):
            after["metadata"]["generation"] = current["metadata"]["generation"] + 1
        self.objects[key] = after
        self._record("MODIFIED", after)
        return after

    def delete(self, found: Object, propagation: str = "Background") -> Object | None:
        """What is left of it: an object that waits for its dependents, or nothing."""
        meta = found["metadata"]
        key = (found["kind"], meta["namespace"], meta["name"])
        if key not in self.objects:
            return None
        if propagation == "Foreground" and self._dependents(meta["uid"]):
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return self.change(
                found, lambda o: o["metadata"].update(deletionTimestamp=now, finalizers=["foregroundDeletion"])
            )
        if meta.get("finalizers") and "foregroundDeletion" not in meta["finalizers"]:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return self.change(found, lambda o: o["metadata"].setdefault("deletionTimestamp", now))
        gone = self.objects.pop(key)
        self.version += 1
        self._record("DELETED", gone)
        return None

    def finalize(self, found: Object) -> None:
        """Remove the finalizers of an object, which is gone then if it was deleted."""
        meta = found["metadata"]
        current = self.objects.get((found["kind"], meta["namespace"], meta["name"]))
        if current and current["metadata"].get("finalizers"):
            current = self.change(current, lambda o: o["metadata"].pop("finalizers"))
            if current["metadata"].get("deletionTimestamp"):
                self.delete(current)

    def collect_garbage(self) -> bool:
        """One turn of the garbage collector: whether it did anything."""
        uids = {o["metadata"]["uid"] for o in self.objects.values()}
        waiting = {
            o["metadata"]["uid"]
            for o in self.objects.values()
            if "foregroundDeletion" in o["metadata"].get("finalizers", [])
        }
        did = False
        for found in list(self.objects.values()):
            owners = {r["uid"] for r in found["metadata"].get("ownerReferences", [])}
            if (
                (owners and not owners & uids)
                or owners & waiting
                or (found["metadata"]["uid"] in waiting and not self._dependents(found["metadata"]["uid"]))
            ):
                self.delete(found)
                did = True
        return did

    def _dependents(self, uid: str) -> list[Object]:
        return [
            o for o in self.objects.values() if any(r["uid"] == uid for r in o["metadata"].get("ownerReferences", []))
        ]

    def _record(self, type: str, found: Object) -> None:
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, type, copy.deepcopy(found)))
        self._changed.set()
        self._changed = asyncio.Event()

    def _default(self, found: Object) -> None:
        """A few of the fields that the real one fills in: whoever compares manifests must stand them."""
        spec = found.get("spec", {})
        if found["kind"] == "Job":
            for name, value in (
                ("backoffLimit", 6),
                ("completions", 1),
                ("parallelism", 1),
                ("completionMode", "NonIndexed"),
                ("suspend", False),
            ):
                spec.setdefault(name, value)
            spec["template"]["spec"].setdefault("dnsPolicy", "ClusterFirst")
            spec["template"].setdefault("metadata", {}).setdefault("labels", {})["batch.kubernetes.io/job-name"] = (
                found["metadata"]["name"]
            )
        if found["kind"] == "JobSet":
            spec.setdefault("network", {"enableDNSHostnames": True})
            spec.setdefault("suspend", False)

    # Faults

    def break_watches(self) -> None:
        """End every watch, as a server does that restarts."""
        self._breaks += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def compact(self) -> None:
        """Forget history: whoever watches now is too late when it comes back, and gets a 410."""
        self.version += 1
        self.compacted = self.version
        self.break_watches()

    # HTTP

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        sender = request.headers.get("Authorization", "").split(" ")[-1]
        if sender in self.killed:
            return self._reset(request)
        if sender in self.unanswered:
            await asyncio.sleep(3600)
        try:
            if (answer := self._discover(request.path)) is not None:
                return web.json_response(answer)
            match = URL.match(request.path)
            resource = BY_PLURAL.get((match["core"] or match["group"], match["plural"])) if match else None
            if not match or resource is None or resource.plural in self.missing:
                raise Refused(404, "NotFound", "the server could not find the requested resource")
            return await self._resource(
                request, resource, match["ns"] or "", match["name"] or "", match["sub"] or "", sender
            )
        except Refused as refused:
            return web.json_response(refused.body, status=refused.code)

    async def _resource(
        self, request: web.Request, resource: Resource, ns: str, name: str, sub: str, sender: str
    ) -> web.StreamResponse:
        kind, body = resource.kind, json.loads(await request.text() or "null", parse_constant=no_number)
        call = Call(request.method, kind, name, sub, sender, body, "dryRun" in request.query)
        self.asked.setdefault(sender, set()).add(kind)
        verb = VERBS.get(request.method) or ("watch" if "watch" in request.query else "get" if name else "list")
        self._permit(resource, sub, verb)
        if request.method == "GET":
            if "watch" in request.query:
                return await self._watch(request, resource, ns)
            if name:
                return web.json_response(self._existing(kind, ns, name))
            self.calls.append(Call("LIST", kind, "", "", sender))
            await self.before_list(kind)
            return web.json_response(self._list(request, resource, ns))
        self.calls.append(call)
        if call.verb == "POST" and ns in self.terminating:
            raise in_terminating(ns, kind, body["metadata"]["name"])
        if call.dry_run:
            await self.before_write(call)
        if call.verb == "POST" and (kind, ns, body["metadata"]["name"]) in self.objects:  # it changes nothing
            raise Refused(409, "AlreadyExists", f"{body['metadata']['name']} already exists")
        if call.dry_run:
            return web.json_response(body, status=201)
        await self.before_write(call)
        fault = None
        if kind != "Event":
            self.writes += 1
            fault = self.fault(self.writes, call)
        if fault and fault.answer:
            headers = {"Retry-After": "0.05"} if fault.answer == 429 else {}
            return web.json_response(
                Refused(fault.answer, "Injected", "a fault").body, status=fault.answer, headers=headers
            )
        if fault and fault.reset == "before":
            return self._cut_off(request, fault, sender)
        if request.content_type == JSON_PATCH:
            body = patched(self._existing(kind, ns, name), body)
        done = copy.deepcopy(self._write(request, kind, ns, name, sub, body))
        if fault and fault.reset == "after":
            return self._cut_off(request, fault, sender)
        return web.json_response(done)

    def _permit(self, resource: Resource, sub: str, verb: str) -> None:
        right = Right(resource.group, f"{resource.plural}/{sub}".rstrip("/"), verb)
        if right not in GRANTED:
            self.refused.add(right)
            raise Refused(403, "Forbidden", f"may not {right}")
        self.used.add(right)

    def _cut_off(self, request: web.Request, fault: Fault, sender: str) -> web.Response:
        if fault.kill:
            self.killed.add(sender)
            self.on_kill(sender)
        return self._reset(request)

    def _reset(self, request: web.Request) -> web.Response:
        if request.transport:
            request.transport.abort()
        return web.Response()

    def _write(self, request: web.Request, kind: str, ns: str, name: str, sub: str, body: Any) -> Object:
        if request.method == "POST":
            return self.create({**body, "kind": kind})
        if request.method == "DELETE":
            found = self._existing(kind, ns, name)
            for field, name in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
                wanted = body["preconditions"].get(field, found["metadata"][field])
                if wanted != found["metadata"][field]:
                    message = f"the {name} in the precondition does not match the {name} in record"
                    raise Refused(409, "Conflict", message)
            return self.delete(found, body["propagationPolicy"]) or {"kind": "Status", "status": "Success"}
        found = self._existing(kind, ns, name)
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted and wanted != found["metadata"]["resourceVersion"]:
            raise Refused(409, "Conflict", "the object has been modified")
        part = {"status": body["status"]} if sub == "status" else body
        if request.content_type != JSON_PATCH:
            part = merged(found, part)
        if sub == "status":
            self.schema(part["status"])
        return self.change(found, lambda o: o.update(part))

    def _existing(self, kind: str, ns: str, name: str) -> Object:
        if (kind, ns, name) not in self.objects:
            raise Refused(404, "NotFound", f"{name} not found")
        return self.objects[kind, ns, name]

    def _list(self, request: web.Request, resource: Resource, ns: str) -> Object:
        items = [copy.deepcopy(o) for o in self.all(resource.kind) if self._selected(request, o, ns)]
        items.sort(key=lambda o: (o["metadata"]["namespace"], o["metadata"]["name"]))
        start, limit = int(request.query.get("continue", "0")), int(request.query.get("limit", "0")) or len(items)
        for item in items:  # as the real one
            del item["kind"], item["apiVersion"]
        more = {"continue": str(start + limit)} if start + limit < len(items) else {}
        return {
            "kind": f"{resource.kind}List",
            "apiVersion": resource.api_version,
            "items": items[start : start + limit],
            "metadata": {"resourceVersion": str(self.version), **more},
        }

    def _selected(self, request: web.Request, found: Object, ns: str) -> bool:
        label = request.query.get("labelSelector", "")
        for term in filter(None, request.query.get("fieldSelector", "").split(",")):
            path, _, value = term.partition("=")
            at: Any = found
            for part in path.split("."):
                at = at.get(part, {})
            if at != value:
                return False
        return (not ns or found["metadata"]["namespace"] == ns) and (
            not label or label in found["metadata"].get("labels", {})
        )

    async def _watch(self, request: web.Request, resource: Resource, ns: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since, breaks = int(request.query["resourceVersion"]), self._breaks
        self.watched.add(resource.kind)
        position = 0
        try:
            if since < self.compacted:
                await send(
                    response,
                    "ERROR",
                    {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"},
                )
                return response
            while self._breaks == breaks and resource.plural not in self.missing:
                changed = self._changed
                while position < len(self.history):
                    version, event, found = self.history[position]
                    position += 1
                    if (
                        version > since
                        and found["kind"] == resource.kind
                        and self._selected(request, found, ns)
                        and not self.lost(event, found)
                    ):
                        await send(response, event, found)
                mark = {
                    "kind": resource.kind,
                    "apiVersion": resource.api_version,
                    "metadata": {"resourceVersion": str(self.version)},
                }
                await send(response, "BOOKMARK", mark)
                await changed.wait()
        except (ConnectionError, asyncio.CancelledError):
            pass
        return response

    def _discover(self, path: str) -> Object | None:
        known = [*(r for r in RESOURCES.values() if r.plural not in self.missing), *BACKBONE]
        versions = sorted({r.api_version for r in known})
        if path == "/version":
            return {"major": "1", "minor": "35"}
        if path == "/api":
            return {"versions": ["v1"]}
        if path == "/apis":
            groups = [{"groupVersion": v, "version": v.split("/")[1]} for v in versions if "/" in v]
            return {
                "groups": [
                    {"name": g["groupVersion"].split("/")[0], "versions": [g], "preferredVersion": g} for g in groups
                ]
            }
        for version in versions:
            if path == (f"/apis/{version}" if "/" in version else f"/api/{version}"):
                verbs = ["get", "list", "watch", "create", "patch", "delete"]
                entry = {"namespaced": True, "verbs": verbs}
                return {
                    "kind": "APIResourceList",
                    "resources": [
                        {**entry, "name": r.plural, "kind": r.kind, "singularName": r.kind.lower()}
                        for r in known
                        if r.api_version == version
                    ],
                }
        return None


def in_terminating(namespace: str, kind: str, name: str) -> Refused:
    """The answer to every creation in a namespace that is being deleted."""
    because = f"unable to create new content in namespace {namespace} because it is being terminated"
    refused = Refused(403, "Forbidden", f'{kind.lower()}s "{name}" is forbidden: {because}')
    cause = {"reason": "NamespaceTerminating", "message": f"namespace {namespace} is being terminated"}
    refused.body["details"] = {"name": name, "causes": [cause | {"field": "metadata.namespace"}]}
    return refused


def check_status(status: Object) -> None:
    """What the CRD of this version refuses. Fields that it does not know are those of a newer one. Raises Refused."""
    try:
        JobStatus.model_validate(status)
    except ValidationError as error:
        wrong = [problem for problem in error.errors() if problem["type"] != "extra_forbidden"]
        if wrong:
            raise Refused(422, "Invalid", f"status: {wrong}") from None


async def _at_once(_: object) -> None:
    """Do not wait."""


def no_number(word: str) -> Any:
    """Python writes NaN and Infinity into what it calls JSON."""
    raise Refused(400, "BadRequest", f"invalid character '{word[0]}' looking for beginning of value")


async def send(response: web.StreamResponse, type: str, found: Object) -> None:
    await response.write(json.dumps({"type": type, "object": found}).encode() + b"\n")


def patched(found: Object, operations: list[Object]) -> Object:
    """`found` after a JSON patch. Raises Refused if it does not fit."""
    try:
        after: Object = apply_patch(found, operations)
    except (JsonPatchException, JsonPointerException) as error:
        raise Refused(422, "", f"the server rejected our request due to an error in our request: {error}") from None
    return after


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
