"""trackio: a run on a trackio server, which is one of your own or a Space of the Hub, by version 1 of its HTTP API.

Not through the integration of transformers: its library would bring some twenty packages into the image for one
request, watches the GPU in a thread of its own, and keeps what a server did not take in the home folder of the pod.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode
from uuid import UUID, uuid4, uuid5

import httpx

from luthier_api.tracking import Tracker as TrackerSpec
from luthier_trainer.tracking.base import Report, TrackedTraining, credentials, number
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.manifest import replace_file

SECONDS = 10.0  # for a request
RUN_FILE = "run.json"
WRITE_TOKEN = "X-Trackio-Write-Token"


class Trackio:
    """Sends each report to one run, whose id the workspace keeps for later attempts."""

    def __init__(self, spec: TrackerSpec, training: TrackedTraining) -> None:
        self._spec, self._training = spec, training
        self._url = f"{spec.url}".rstrip("/")
        self._client = httpx.Client(base_url=self._url, timeout=SECONDS)
        self._authorized = False
        self._run: UUID | None = None
        self._known = False
        """Whether the server has the run, with its configuration, from this attempt."""

    def send(self, report: Report) -> None:
        if not self._authorized:
            self._authorize()
        if self._run is None:
            self._run = self._resumed() or self._begun()
        project = self._spec.experiment or self._training.namespace
        entry = {
            "project": project,
            "run": self._spec.run_name or self._training.name,
            "run_id": self._run.hex,
            "step": report.step,
            "metrics": {name: number(value) for name, value in report.values.items()},
            # The server leaves out a report whose id it has: what is sent twice after a lost answer, and the steps that
            # an attempt repeats after a checkpoint.
            "log_id": uuid5(self._run, f"{report.step} {sorted(report.values)}").hex,
        }
        if not self._known:
            entry["config"] = self._training.documents["spec"] | {"luthier": self._training.documents["provenance"]}
        accepted(self._client.post("/api/bulk_log", json={"kwargs": {"logs": [entry], "hf_token": None}}))
        if not self._known:
            self._known = True
            page = f"{self._url}/?" + urlencode({"project": canonical(project), "run_ids": self._run.hex})
            tracked_runs.keep(self._training.folder, "trackio", run=self._run.hex, url=page)

    def close(self, complete: bool) -> None:
        self._client.close()

    def _authorize(self) -> None:
        """Send the token as both kinds of servers read it. Each ignores the header of the other."""
        token = credentials(self._spec)["writeToken"]
        self._client.headers.update({"Authorization": f"Bearer {token}", WRITE_TOKEN: token})
        self._authorized = True

    def _resumed(self) -> UUID | None:
        """Return the id of the run that an earlier attempt has begun on this server."""
        file = self._training.folder / RUN_FILE
        if not file.exists():
            return None
        kept = json.loads(file.read_text())
        return UUID(kept["id"]) if kept["url"] == self._url else None

    def _begun(self) -> UUID:
        """Return the id of a run that is to be. A report creates it, so it is kept before the first one is sent."""
        run = uuid4()
        self._training.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._training.folder / RUN_FILE, json.dumps({"id": run.hex, "url": self._url}).encode())
        return run


def canonical(project: str) -> str:
    """Return the name that trackio gives to `project`: letters, digits, - and _ of it."""
    return "".join(letter for letter in project if letter.isalnum() or letter in "-_") or "default"


def accepted(answer: httpx.Response) -> None:
    """Raise PermissionError if the server has refused the token, and OSError if it has not taken the report."""
    body: Any = None
    if answer.headers.get("Content-Type", "").startswith("application/json"):
        body = answer.json()
    if answer.is_success and isinstance(body, dict) and "data" in body:
        return
    error = body.get("error") if isinstance(body, dict) else None
    said = f"{answer.url.host} answered {answer.status_code}" + (f": {error}" if error else "")
    # trackio has no status of its own for it: its servers answer 400, and its Spaces 500.
    if "token" in f"{error}" or answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise PermissionError(f"{said}; see spec.tracking.secretRef")
    if error is None and not answer.is_server_error:
        raise OSError(f"{said}; is spec.tracking.url the address of a trackio server?")
    raise OSError(said)
