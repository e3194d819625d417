"""A client of the API server that takes and returns dictionaries, and raises one type of error.

The official asyncio client reads the credentials and makes the TLS context. Requests are sent with aiohttp itself, and
JSON is read and written by msgspec: the same requests take a third of the CPU (tests/perf/jobs.py).
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

# The sub-modules, because the packages above them would import every generated model.
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

from luthier_api import API_VERSION
from luthier_api.kinds import KINDS
from luthier_operator import naming
from luthier_operator.model import Object
from luthier_operator.wire import read_answer, read_event, read_list, read_object

VERSION = importlib.metadata.version("luthier")
FIELD_MANAGER = "luthier"
Operations = list[Object]
"""A JSON patch."""
JSON, JSON_PATCH, MERGE_PATCH = "application/json", "application/json-patch+json", "application/merge-patch+json"
ALREADY_EXISTS = "AlreadyExists"
NAMESPACE_TERMINATING = "NamespaceTerminating"
"""Cause of a refusal: the namespace is being deleted, and nothing can be created in it any more."""
IN_FLIGHT = 32  # requests; more bring no gain on one API server (measured), and a burst would delay other clients
CHUNK = 500  # objects in one response of a list, which bounds its memory
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30)
"""Without bytes for so long. A limit for the whole request would take 5 % of what a request takes."""
WATCH_SECONDS = 300  # the API server ends a watch then, and the next one goes on from its last version
WATCH_TIMEOUT = aiohttp.ClientTimeout(total=WATCH_SECONDS + 30, sock_connect=5)  # a connection may die silently
WATCH_BUFFER = 1 << 20  # bytes read at once: one event of a large object must not be read in a hundred pieces
GATHER_SECONDS = 0.05
"""After a watch has delivered events it rests for so long. To receive one event costs several times as much as to read
it, and a burst of jobs has thousands. No change of a child is acted on sooner than after 0.1 s (`settling`).
"""
GATHER_LIMIT = 0.2
"""A watch that has new events after each rest rests for longer and longer, up to so long."""
TOO_MANY_ATTEMPTS = 5  # of one request that is answered with 429; after them the back-off of the queue applies
REFUSALS = {"FailedCreate", "JobCreationFailed"}  # Events of the Job controller and of JobSet about what was refused
RETRY_AFTER = 1.0  # seconds, if a 429 has no Retry-After
KEEPALIVE_SECONDS = 75
"""An idle connection is kept for so long: a new one costs as much as a dozen requests. The API server closes it after
90 seconds.
"""


@dataclass(frozen=True)
class Resource:
    """A kind, and its path in the API."""

    api_version: str
    kind: str
    plural: str

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def root(self) -> str:
        return f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        scope = f"/namespaces/{namespace}" if namespace else ""
        return "/".join([f"{self.root}{scope}/{self.plural}", *filter(None, (name, subresource))])


RESOURCES: dict[str, Resource] = {
    **{kind.value: Resource(API_VERSION, kind.value, info.plural) for kind, info in KINDS.items()},
    "Job": Resource("batch/v1", "Job", "jobs"),
    "JobSet": Resource("jobset.x-k8s.io/v1alpha2", "JobSet", "jobsets"),
    "Workload": Resource("kueue.x-k8s.io/v1beta2", "Workload", "workloads"),
    "Pod": Resource("v1", "Pod", "pods"),
    "ConfigMap": Resource("v1", "ConfigMap", "configmaps"),
    "PersistentVolumeClaim": Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    "Event": Resource("v1", "Event", "events"),
    "Lease": Resource("coordination.k8s.io/v1", "Lease", "leases"),
}


class ApiError(Exception):
    """An answer other than 2xx, or no answer at all (status 0)."""

    def __init__(self, status: int, reason: str, message: str, cause: str = "") -> None:
        """`cause`: the reason of the first cause in the details of the answer."""
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message, self.cause = status, reason, message, cause


async def login() -> Configuration:
    """The service account in a cluster (its token is read again every minute), else the kubeconfig.

    Raises ConfigException if there is neither.
    """
    configuration = Configuration()
    try:
        load_incluster_config(configuration)
    except ConfigException:
        await load_kube_config(
            os.environ.get("KUBECONFIG") or "~/.kube/config", client_configuration=configuration, persist_config=False
        )
    return configuration


class NotLeader(aiohttp.ClientError):
    """The Lease is lost: the request was not sent."""


def fenced(may_send: Callable[[], bool]) -> tuple[type[aiohttp.ClientRequest], type[aiohttp.BytesPayload]]:
    """The types of requests and of their bodies. Both ask `may_send` right before they are written; raise NotLeader.

    A process that slept may go on in the middle of a request: while it waits for a connection, or for its handshake.
    The headers of a request with a body are written together with the body, by a task of its own.
    """

    def check() -> None:
        """Raises NotLeader if nothing may be sent."""
        if not may_send():
            raise NotLeader("not sent, because the Lease is lost")

    class Request(aiohttp.ClientRequest):
        async def send(self, conn: Any) -> aiohttp.ClientResponse:
            check()
            return await super().send(conn)

    class Body(aiohttp.BytesPayload):
        async def write_with_length(self, writer: Any, content_length: int | None) -> None:
            check()
            await super().write_with_length(writer, content_length)

    return Request, Body


class Client:
    """Requests of all workers. Their number is bounded, and all pause when the API server asks for it.

    Every method that sends a request raises ApiError.
    """

    def __init__(
        self,
        configuration: Configuration,
        count: Callable[[str, str], None] = lambda method, code: None,
        user_agent: str = f"luthier/{VERSION}",
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        """Must be called in an event loop. `count` is called with method and status code of each answer. While
        `may_send` returns False, nothing is sent: another replica may be the leader.
        """
        self._configuration = configuration
        request, self._body = fenced(may_send)
        self._session = aiohttp.ClientSession(
            request_class=request,
            # The number of requests is bounded here, by `_slots`. Watches stay open beside them.
            connector=aiohttp.TCPConnector(
                ssl=RESTClientObject(configuration).ssl_context, limit=0, keepalive_timeout=KEEPALIVE_SECONDS
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "User-Agent": user_agent},
            timeout=TIMEOUT,
            trust_env=False,  # reading ~/.netrc for each request took 27 % of the client's CPU
            read_bufsize=WATCH_BUFFER,
            proxy=configuration.proxy,
        )
        self._tls_name = {"server_hostname": name} if (name := configuration.tls_server_name) else {}
        self._count = count
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._paused_until = 0.0
        self.host: str = configuration.host

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, query: dict[str, str] | None = None) -> Object:
        return await self._request("GET", path, query)

    async def installed(self, resources: Sequence[Resource]) -> bool:
        """Whether the API server serves all of these kinds. CRDs may be installed after the operator."""
        served: set[tuple[str, str]] = set()
        for root, version in {(r.root, r.api_version) for r in resources}:
            try:
                found = await self.get(root)
            except ApiError as error:
                if error.status == 404:
                    return False
                raise
            served |= {(version, r["name"]) for r in found.get("resources", [])}
        return served >= {(r.api_version, r.plural) for r in resources}

    async def list(
        self, resource: Resource, namespace: str | None, selector: str = ""
    ) -> AsyncIterator[tuple[list[Object], str]]:
        """All objects in chunks, each with the resourceVersion of the whole list. Objects have apiVersion and kind."""
        query = {"limit": str(CHUNK)} | ({"labelSelector": selector} if selector else {})
        while True:
            read = functools.partial(read_list, resource.kind)
            chunk = await self._request("GET", resource.path(namespace), query, read=read)
            for item in chunk["items"]:  # the API server leaves these out in lists
                item.setdefault("apiVersion", resource.api_version)
                item.setdefault("kind", resource.kind)
            yield chunk["items"], chunk["metadata"]["resourceVersion"]
            if not chunk["metadata"].get("continue"):
                return
            query["continue"] = chunk["metadata"]["continue"]

    async def watch(
        self, resource: Resource, namespace: str | None, selector: str, since: str
    ) -> AsyncIterator[tuple[str, Object]]:
        """Events of all objects from the version `since` on, BOOKMARK and ERROR among them: type and object.

        Ends when the API server ends the watch. Raises ApiError when it refuses it, or breaks it.
        """
        url = self.host + resource.path(namespace)
        query = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": since}
        query |= {"timeoutSeconds": str(random.randint(WATCH_SECONDS // 2, WATCH_SECONDS))}
        query |= {"labelSelector": selector} if selector else {}
        try:
            async with self._session.get(
                url, params=query, headers=await self._headers(JSON), timeout=WATCH_TIMEOUT, **self._tls_name
            ) as response:
                self._count("GET", str(response.status))
                if response.status != 200:
                    answer = read_answer(await response.read())
                    raise ApiError(response.status, answer.get("reason", ""), answer.get("message", ""))
                rest, clock, pause = b"", asyncio.get_running_loop().time, GATHER_SECONDS
                resumed = clock()
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        yield read_event(resource.kind, line)
                    pause = next_pause(pause, waited=clock() - resumed)
                    await _gather(response, pause)
                    resumed = clock()
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise ApiError(0, "Unreachable", f"WATCH {url}: {error!r}") from error

    async def create_child(self, manifest: Object) -> Object:
        """Create a child of a job, or return the one that exists already. A ConfigMap gets the data of `manifest`.

        Raises ApiError 409 if the name is taken by an object of somebody else. That is never changed: with our owner
        reference, it would be deleted with the job.
        """
        try:
            return await self.create(manifest)
        except ApiError as error:
            if error.reason != ALREADY_EXISTS:
                raise
        return await self._own(manifest)

    async def repair(self, manifest: Object) -> Object:
        """As `create_child`, for a child that is expected to exist: one request if it does."""
        try:
            return await self._own(manifest)
        except ApiError as error:
            if error.status != 404:
                raise
        return await self.create_child(manifest)

    async def _own(self, manifest: Object) -> Object:
        """The existing child with the name of `manifest`, with its data if it is a ConfigMap.

        Raises ApiError 409 if it belongs to somebody else, 404 if there is none.
        """
        meta, kind = manifest["metadata"], manifest["kind"]
        found = await self._existing(RESOURCES[kind], meta["namespace"], meta["name"])
        if found["metadata"].get("deletionTimestamp"):
            raise ApiError(409, "Terminating", "an older one of this name is being deleted")
        owners = owners_of(found)
        if meta["labels"][naming.UID_LABEL] not in owners:
            owner = ", ".join(owners.values()) or "no job"
            raise ApiError(
                409,
                "NotOwned",
                f"an object of this name exists and belongs to {owner}; it is left as it is. Rename or delete it, or"
                " create the job under another name",
            )
        if kind != "ConfigMap" or found.get("data") == manifest["data"]:
            return found
        removed = dict.fromkeys(found.get("data") or {})
        patch = {
            "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
            "data": removed | manifest["data"],
        }
        return await self.patch(kind, meta["namespace"], meta["name"], patch)

    async def _existing(self, resource: Resource, namespace: str, name: str) -> Object:
        """The object of this name. What is watched is listed, so that no right to get it is needed.

        Raises ApiError 404 if there is none.
        """
        if resource.kind == "ConfigMap":
            return await self.get(resource.path(namespace, name))
        found = await self.get(resource.path(namespace), {"fieldSelector": f"metadata.name={name}"})
        if not found["items"]:
            raise ApiError(404, "NotFound", f"{name} not found")
        return {"apiVersion": resource.api_version, "kind": resource.kind, **found["items"][0]}

    async def is_terminating(self, namespace: str, name: str) -> bool:
        """Whether the API server refuses to create anything in `namespace`, because it is being deleted.

        It is asked by a dry run with the ConfigMap `name`, which needs no right to read namespaces. Any other answer is
        no: an admission policy may refuse it, too. Raises ApiError if there is no answer.
        """
        resource = RESOURCES["ConfigMap"]
        trial = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": name}}
        try:
            await self._request("POST", resource.path(namespace), {"dryRun": "All"}, trial)
        except ApiError as error:
            if not error.status:
                raise
            return (error.status, error.cause) == (403, NAMESPACE_TERMINATING)
        return False

    async def claim(self, manifest: Object) -> Object:
        """Create a volume claim if there is none of that name.

        An existing claim of an earlier job is used and never changed: with an owner, its results would be deleted with
        the new job. Raises ApiError 409 while it is being deleted, and while it is owned by another object, with which
        the garbage collector may be about to delete it.
        """
        try:
            return await self.create(manifest)
        except ApiError as error:
            if error.reason != ALREADY_EXISTS:
                raise
        meta = manifest["metadata"]
        found = await self.get(RESOURCES[manifest["kind"]].path(meta["namespace"], meta["name"]))
        if found["metadata"].get("deletionTimestamp"):
            raise ApiError(409, "Terminating", "the claim of an earlier job is being deleted")
        owners = owners_of(found)
        if owners and meta["labels"][naming.UID_LABEL] not in owners:
            raise ApiError(
                409, "Owned", f"it exists and is owned by another {', '.join(owners.values())} ({', '.join(owners)})"
            )
        return found

    async def patch_status(self, job: Object, patch: Object) -> Object:
        """Merge `patch` into the status of `job`. Raises ApiError 409 if the object was changed since it was read.

        It is sent as a JSON patch (RFC 6902), which takes a seventh less of the API server's CPU. One that does not fit
        the object, because that was changed, is refused with 422 like a status that the schema refuses. The merge patch
        that follows then tells the two apart: its version is compared first.
        """
        meta = job["metadata"]
        path = RESOURCES[job["kind"]].path(meta["namespace"], meta["name"], "status")
        query, version = {"fieldManager": FIELD_MANAGER}, meta["resourceVersion"]
        try:
            return await self._request("PATCH", path, query, status_operations(job, patch), JSON_PATCH)
        except ApiError as error:
            if error.status != 422:
                raise
        body = {"metadata": {"resourceVersion": version}, "status": patch}
        return await self._request("PATCH", path, query, body, MERGE_PATCH)

    async def delete(self, target: Object, propagation: str, exact: bool = False) -> Object | None:
        """Delete this object, but not a later one with the same name. `exact`: only if it has not changed since it was
        read, else ApiError 409.

        Returns the object while finalizers keep it, None when it is gone.
        """
        meta = target["metadata"]
        version = {"resourceVersion": meta["resourceVersion"]} if exact else {}
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": propagation,
            "preconditions": {"uid": meta["uid"], **version},
        }
        try:
            left = await self._request(
                "DELETE", RESOURCES[target["kind"]].path(meta["namespace"], meta["name"]), None, body
            )
        except ApiError as error:
            if error.status == 404 or (error.status == 409 and "UID in" in error.message):
                return None
            raise
        return left if left.get("metadata", {}).get("deletionTimestamp") else None

    async def warning(self, child: Object) -> str:
        """The newest Event that tells why a Job or JobSet has no pods. Empty if there is none.

        A JobSet without a Job reports it itself; where it has one, the Job does.
        """
        meta = child["metadata"]
        involved = {meta["name"]: child["kind"]}
        if child["kind"] == "JobSet":
            involved[f"{meta['name']}-{naming.NODE}-0"] = "Job"
        newest = ("", "")
        for name, kind in involved.items():
            query = {"fieldSelector": f"involvedObject.name={name},involvedObject.kind={kind},type=Warning"}
            answer = await self.get(RESOURCES["Event"].path(meta["namespace"]), query | {"limit": str(CHUNK)})
            for event in answer["items"]:
                time = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
                # Of an earlier child of this name.
                if time < meta["creationTimestamp"] or event["reason"] not in REFUSALS:
                    continue
                newest = max(newest, (time, event.get("message", "")))
        return newest[1]

    async def create(self, manifest: Object) -> Object:
        kind = manifest["kind"]
        path = RESOURCES[kind].path(manifest["metadata"]["namespace"])
        return await self._request("POST", path, None, manifest, read=functools.partial(read_object, kind))

    async def patch(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        return await self._request("PATCH", RESOURCES[kind].path(namespace, name), None, patch, MERGE_PATCH)

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Object | Operations | None = None,
        content: str = JSON,
        read: Callable[[bytes], Object] = read_answer,
    ) -> Object:
        """Send a request, again while the API server answers 429. Raises ApiError for any other answer than 2xx."""
        for _ in range(TOO_MANY_ATTEMPTS):
            while (wait := self._paused_until - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait * random.uniform(1, 1.2))
            status, headers, text = await self._send(method, path, query, body, content)
            if status != 429:
                break
            # API priority and fairness has rejected the request, and would reject those of the other workers as well.
            pause = _seconds(headers.get("Retry-After"))
            self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + pause)
        if not 200 <= status < 300:
            answer = read_answer(text)
            raise ApiError(status, answer.get("reason", ""), answer.get("message", ""), first_cause(answer))
        return read(text)

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None,
        body: Object | Operations | None,
        content: str,
    ) -> tuple[int, Any, bytes]:
        """Send a request once. Returns status, headers and body. Raises ApiError with status 0 without an answer."""
        request: dict[str, Any] = {
            "params": query,
            "data": None if body is None else self._body(msgspec.json.encode(body)),
        }
        async with self._slots:
            try:
                request["headers"] = await self._headers(content)
                async with self._session.request(method, self.host + path, **request, **self._tls_name) as response:
                    status, headers, text = response.status, response.headers, await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._count(method, "<error>")
                raise ApiError(0, "Unreachable", f"{method} {path}: {error!r}") from error
        self._count(method, str(status))
        return status, headers, text

    async def _headers(self, content: str) -> dict[str, str]:
        """Type of the body, and the credentials, which the configuration reads again before they expire."""
        headers = {"Content-Type": content}
        for setting in (await self._configuration.auth_settings()).values():
            headers[setting["key"]] = setting["value"]
        return headers


def next_pause(last: float, waited: float) -> float:
    """Seconds for which a watch rests after it has waited for events since its last rest."""
    return min(2 * last, GATHER_LIMIT) if waited < GATHER_SECONDS else GATHER_SECONDS


async def _gather(watch: aiohttp.ClientResponse, seconds: float) -> None:
    """Read nothing for a moment, so that the events of that time arrive as one. The first one after a pause is never
    late.
    """
    transport = watch.connection.transport if watch.connection else None
    if transport is None or transport.is_closing():
        return
    transport.pause_reading()
    try:
        await asyncio.sleep(seconds)
    finally:
        if not transport.is_closing():
            transport.resume_reading()


def status_operations(job: Object, patch: Object) -> Operations:
    """The JSON patch that merges `patch` into the status of `job`, and fits this version of it alone: with another
    resourceVersion, the API server refuses the result.
    """
    version: Object = {"op": "add", "path": "/metadata/resourceVersion", "value": job["metadata"]["resourceVersion"]}
    if "status" not in job:
        return [version, {"op": "add", "path": "/status", "value": patch}]
    return [version, *_operations(job["status"], patch, "/status")]


def _operations(before: Object, patch: Object, path: str) -> Iterator[Object]:
    for name, value in patch.items():
        here = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
        if value is None:
            yield {"op": "remove", "path": here}
        elif isinstance(value, dict) and isinstance(before.get(name), dict):
            yield from _operations(before[name], value, here)
        else:
            yield {"op": "add", "path": here, "value": value}


def owners_of(found: Object) -> dict[str, str]:
    """uid → kind and name of the owners of an object."""
    return {r["uid"]: f"{r['kind']} {r['name']}" for r in found["metadata"].get("ownerReferences") or []}


def first_cause(answer: Object) -> str:
    """The reason of the first cause in the details of a refusal."""
    causes = (answer.get("details") or {}).get("causes") or [{}]
    return str(causes[0].get("reason", ""))


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or RETRY_AFTER))
    except ValueError:
        return RETRY_AFTER
