"""kubectl as the tests use it: what a user would type, with waiting."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from kubernetes import client, config

from luthier_api import API_VERSION
from luthier_api.kinds import KINDS

Object = dict[str, Any]
CHILDREN = (  # owners before what they own; claims are not the garbage collector's
    "configmaps,jobsets,jobs,services,pods"
)
JOB_LABEL = "luthier.dev/job"
PLURALS = {info.short: info.plural for info in KINDS.values()}


@functools.cache
def api() -> client.CustomObjectsApi:
    """For jobs, which are read every half second: a process of kubectl takes twenty times as long as its request."""
    return client.CustomObjectsApi(config.new_client_from_config(os.environ["KUBECONFIG"]))


class KubectlError(Exception):
    """kubectl refused; the text is what it printed."""


@dataclass(frozen=True)
class Kube:
    """kubectl in one namespace."""

    namespace: str

    def run(self, *arguments: str, stdin: str | bytes | None = None, check: bool = True, timeout: float = 300) -> str:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            ["kubectl", "--namespace", self.namespace, *arguments],
            input=data,
            capture_output=True,
            check=False,
            timeout=timeout,
        )
        if check and done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}\n{done.stderr.decode()}")
        return done.stdout.decode()

    def apply(self, *documents: Object) -> None:
        self.run(
            "apply",
            "--server-side",
            "--force-conflicts",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}),
        )

    def get(self, kind: str, name: str) -> Object | None:
        if kind in PLURALS:
            return self._job(PLURALS[kind], name)
        text = self.run("get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def _job(self, plural: str, name: str) -> Object | None:
        group, _, version = API_VERSION.partition("/")
        try:
            found: Object = api().get_namespaced_custom_object(group, version, self.namespace, plural, name)
        except client.ApiException as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        return found

    def list(self, kind: str, selector: str = "") -> list[Object]:
        items: list[Object] = json.loads(self.run("get", kind, "-l", selector, "-o", "json"))["items"]
        return items

    def leader(self) -> Object | None:
        """The pod of the operator that works, in the namespace of the chart; None while none does."""
        lease = self.get("lease", "luthier")
        holder = lease and lease["spec"].get("holderIdentity")
        return self.get("pod", holder) if holder else None

    def delete(self, kind: str, name: str, *options: str) -> None:
        self.run("delete", kind, name, "--ignore-not-found", *options)

    def python(self, pod: str, script: str, *arguments: str, stdin: bytes | None = None, timeout: float = 300) -> str:
        """What a Python script prints in a pod."""
        return self.run(
            "exec", "-i", pod, "--", "python", "-c", script, *arguments, stdin=stdin or b"", timeout=timeout
        )

    def until(self, kind: str, name: str, met: Callable[[Object], Any], *, timeout: float, what: str) -> Object:
        """The object as soon as `met` says so; fails with the object's status and events when it takes longer, or when
        it has failed.
        """
        deadline = time.monotonic() + timeout
        found: Object | None = None
        while time.monotonic() < deadline:
            found = self.get(kind, name)
            # Nobody may have looked at it yet
            if found is not None and met(found | {"status": found.get("status", {})}):
                return found
            if found is not None and condition(found, "Failed") == "True":
                break
            time.sleep(0.5)
        raise AssertionError(
            f"{kind}/{name}: not"
            f" {what}\n{json.dumps((found or {}).get('status'), indent=1)}\n{self.run('describe', kind, name)[-3000:]}"
        )

    def until_gone(self, kind: str, selector: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while left := self.list(kind, selector):
            if time.monotonic() > deadline:
                raise AssertionError(f"still there: {[o['metadata']['name'] for o in left]}")
            time.sleep(1)

    def children(self, name: str, uids: set[str]) -> dict[str, list[str]]:
        """Kind → names of a job's children and of theirs: by its label, or by an owner among `uids`, to which their own
        uids are added.
        """
        found: dict[str, list[str]] = {}
        for item in json.loads(self.run("get", CHILDREN, "-o", "json"))["items"]:
            meta = item["metadata"]
            if meta.get("labels", {}).get(JOB_LABEL) == name or any(
                owner["uid"] in uids for owner in meta.get("ownerReferences", [])
            ):
                uids.add(meta["uid"])
                found.setdefault(item["kind"], []).append(meta["name"])
        return found

    def delete_with_children(self, kind: str, name: str, has: Collection[str], timeout: float = 90) -> None:
        """Deletes a job that has children of the kinds `has`, and waits until none of any kind is left. Claims are
        another matter.
        """
        job = self.get(kind, name)
        assert job is not None
        uids = {job["metadata"]["uid"]}
        assert set(self.children(name, uids)) == set(has)
        self.delete(kind, name)
        deadline = time.monotonic() + timeout
        while left := self.children(name, uids):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(1)

    def until_claims(self, name: str, left: int) -> None:
        """So many claims with a job's label, now and a while later: one that stays is not only slow to go."""
        if not left:
            self.until_gone("persistentvolumeclaims", f"{JOB_LABEL}={name}", timeout=60)
        time.sleep(2)
        assert len(self.list("persistentvolumeclaims", f"{JOB_LABEL}={name}")) == left

    def complete(self, kind: str, name: str, timeout: float = 600) -> Object:
        return self.until(kind, name, lambda o: condition(o, "Complete") == "True", timeout=timeout, what="Complete")

    def failed(self, kind: str, name: str, timeout: float = 300) -> Object:
        return self.until(kind, name, lambda o: condition(o, "Failed") == "True", timeout=timeout, what="Failed")

    def events(self, name: str) -> list[str]:
        """Reasons of the events of an object, oldest first."""
        items = json.loads(self.run("get", "events", "--field-selector", f"involvedObject.name={name}", "-o", "json"))[
            "items"
        ]
        return [
            i["reason"]
            for i in sorted(
                items, key=lambda i: i.get("eventTime") or i.get("lastTimestamp") or i["metadata"]["creationTimestamp"]
            )
        ]


def conditions(item: Object) -> dict[str, Object]:
    return {c["type"]: c for c in item.get("status", {}).get("conditions") or []}


def condition(item: Object, type: str) -> str | None:
    """Status of one condition: True, False, or None."""
    return conditions(item).get(type, {}).get("status")
