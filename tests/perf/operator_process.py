"""The operator as a process of this machine, under measurement: its CPU, memory, readiness and API calls."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
ACCOUNT = "luthier-bench"


@contextlib.contextmanager
def service_account() -> Iterator[dict[str, str]]:
    """A service account with all rights. Yields the environment in which a process uses it."""

    def kubectl(*arguments: str, check: bool = True) -> str:
        return subprocess.run(["kubectl", *arguments], check=check, stdout=subprocess.PIPE, text=True).stdout

    def remove() -> None:
        kubectl("-n", "default", "delete", "serviceaccount", ACCOUNT, "--ignore-not-found", check=False)
        kubectl("delete", "clusterrolebinding", ACCOUNT, "--ignore-not-found", check=False)

    remove()
    kubectl("-n", "default", "create", "serviceaccount", ACCOUNT)
    kubectl(
        "create", "clusterrolebinding", ACCOUNT, "--clusterrole=cluster-admin", f"--serviceaccount=default:{ACCOUNT}"
    )
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    token = kubectl("-n", "default", "create", "token", ACCOUNT, "--duration=6h").strip()
    config["users"] = [{"name": config["contexts"][0]["context"]["user"], "user": {"token": token}}]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        try:
            yield {"KUBECONFIG": file.name}
        finally:
            remove()


def free_port() -> int:
    """A port that nobody uses: with a fixed one, another benchmark's operator would answer for this one."""
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port


class OperatorProcess:
    """Runs the operator for one namespace. No pod runs, so its image is in no registry."""

    def __init__(self, namespace: str, **environment: str) -> None:
        settings = {
            "LUTHIER_TRAINER_IMAGE": "registry.example/trainer",
            "LUTHIER_METRICS_PORT": str(free_port()),
            "LUTHIER_NAMESPACES": namespace,
            "LUTHIER_LOG_LEVEL": "WARNING",
        }
        self._environment = os.environ | settings | environment

    def __enter__(self) -> OperatorProcess:
        self._began = time.monotonic()
        self._process = subprocess.Popen([sys.executable, "-m", "luthier_cli", "operator"], env=self._environment)
        self.seconds_to_ready = self._wait_until_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def _wait_until_ready(self, limit: float = 120) -> float:
        while self.alive() and (elapsed := time.monotonic() - self._began) < limit:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=1):
                    return elapsed
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.05)
        raise SystemExit(f"the operator has ended, or is not ready after {limit} s")

    @property
    def url(self) -> str:
        """Where it serves probes and metrics."""
        return f"http://127.0.0.1:{self._environment['LUTHIER_METRICS_PORT']}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def cpu_seconds(self) -> float:
        """CPU seconds so far, user and system."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def reconciles(self) -> int:
        """Reconciles so far."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith("controller_runtime_reconcile_total{")]
        return sum(int(float(line.rpartition(" ")[2])) for line in found)

    def memory_mib(self, field: str = "VmHWM") -> float:
        """Peak resident memory (VmHWM), or the current one (VmRSS)."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


class AuditLog:
    """The calls of the operator since this object was made, from the audit log of the API server."""

    def __init__(self, path: Path, namespace: str) -> None:
        self._path, self._namespace, self._begin = path, namespace, datetime.now(UTC)

    def calls(self) -> list[dict[str, Any]]:
        """Every request but lists and watches. Empty where there is no audit log."""
        return [
            event
            for event in self._events()
            if event.get("userAgent", "").startswith("luthier/")
            and event["verb"] not in ("watch", "list")
            and event.get("objectRef", {}).get("namespace") == self._namespace
            and moment(event) >= self._begin
        ]

    def _events(self) -> Iterator[dict[str, Any]]:
        """What has been written since, also into files that were renamed when they were full."""
        for path in self._path.parent.glob(f"{self._path.stem}*{self._path.suffix}"):
            if path.stat().st_mtime >= self._begin.timestamp():
                with path.open() as file:
                    yield from map(json.loads, file)


def verb_and_resource(event: dict[str, Any]) -> str:
    """`patch/finetunejobs/status`."""
    ref = event["objectRef"]
    return "/".join(filter(None, (event["verb"], ref.get("resource"), ref.get("subresource"))))


def per_job(calls: list[dict[str, Any]], jobs: int) -> dict[str, float]:
    """Verb and resource → calls a job."""
    counted = Counter(verb_and_resource(event) for event in calls)
    return {name: round(count / jobs, 2) for name, count in sorted(counted.items())}


def calls_to_jobset(calls: list[dict[str, Any]]) -> float | None:
    """Calls a job up to the one that creates its JobSet, that one included. None without an audit log."""
    by_job: dict[str, list[dict[str, Any]]] = {}
    for event in calls:
        found = re.search(
            r"bench-\d+", event["objectRef"].get("name", "")
        )  # children and Events have it in their names
        if found:
            by_job.setdefault(found[0], []).append(event)
    counts = []
    for events in by_job.values():
        created = [moment(event) for event in events if event["objectRef"].get("resource") == "jobsets"]
        if created:
            counts.append(sum(moment(event) <= min(created) for event in events))
    return round(sum(counts) / len(counts), 2) if counts else None


def moment(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["requestReceivedTimestamp"])
