"""MLflow: a run on a tracking server, by version 2.0 of its REST API.

Not through the integration of transformers: it hands metrics to a queue of MLflow without a limit, which loses them
without a trace when the server is away, draws from Python's random numbers of the training for its retries, and would
bring some twenty packages into the image for five requests.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx

from luthier_api.tracking import Tracker as TrackerSpec
from luthier_trainer.tracking.base import Report, TrackedTraining, credentials, number
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.manifest import replace_file

API = "/api/2.0/mlflow/"
SECONDS = 10.0  # for a request
TAG_CHARACTERS, PARAMETER_CHARACTERS, BATCH = 5000, 6000, 100  # limits of the server; the last, of a request
NAME_CHARACTERS, FOREIGN = 250, re.compile(r"[^0-9A-Za-z_\-. :/]")
RUN_FILE = "run.json"


class MLflow:
    """Sends each report as metrics of one run, whose id the workspace keeps for later attempts."""

    def __init__(self, spec: TrackerSpec, training: TrackedTraining) -> None:
        self._spec, self._training = spec, training
        self._client = httpx.Client(base_url=f"{spec.url}".rstrip("/") + API, timeout=SECONDS)
        self._authorized = False
        self._run_id: str | None = None
        self._described = False
        """Whether the run has its parameters: a server may fail between the requests."""
        self._sent: dict[str, int] = {}

    def send(self, report: Report) -> None:
        if not self._authorized:
            authorize(self._client, credentials(self._spec))
            self._authorized = True
        if self._run_id is None:
            self._run_id = self._resumed() or self._created()
        if not self._described:
            self._describe(self._run_id)
        now = round(time.time() * 1000)
        # MLflow keeps all values of a metric at a step. What an earlier attempt has sent is the same, and not repeated.
        metrics = [
            {"key": key_of(name), "value": number(value), "timestamp": now, "step": report.step}
            for name, value in report.values.items()
            if report.step > self._sent.get(key_of(name), -1)
        ]
        if metrics:
            self._post("runs/log-batch", {"run_id": self._run_id, "metrics": metrics})
            self._sent |= {key_of(name): report.step for name in report.values}
            self._keep()

    def close(self, complete: bool) -> None:
        if self._run_id is not None:
            self._update("FINISHED" if complete else "KILLED")
        self._client.close()

    def _resumed(self) -> str | None:
        """Return the id of the run that an earlier attempt has created here."""
        file = self._training.folder / RUN_FILE
        if not file.exists():
            return None
        kept = json.loads(file.read_text())
        if kept["url"] != self._spec.url:
            return None
        self._sent, self._described = kept["sent"], kept["described"]
        self._update("RUNNING", kept["id"])
        return str(kept["id"])

    def _created(self) -> str:
        """Create the run, with what it was made of as tags. Return its id."""
        name = self._spec.run_name or self._training.name
        tags = {"luthier.job": f"{self._training.namespace}/{self._training.name}"}
        tags |= {"luthier.provenance": json.dumps(self._training.documents["provenance"]), "mlflow.runName": name}
        tags |= self._spec.tags or {}
        experiment = self._experiment()
        found = self._post(
            "runs/create",
            {
                "experiment_id": experiment,
                "run_name": name,
                "start_time": round(time.time() * 1000),
                "tags": [{"key": key_of(key), "value": value[:TAG_CHARACTERS]} for key, value in tags.items()],
            },
        )
        self._run_id = run_id = str(found["run"]["info"]["run_id"])
        page = f"{self._spec.url}".rstrip("/") + f"/#/experiments/{experiment}/runs/{run_id}"
        tracked_runs.keep(self._training.folder, "mlflow", run=run_id, url=page)
        self._keep()
        return run_id

    def _describe(self, run_id: str) -> None:
        """Write the spec as parameters of the run. The server takes the same value of a parameter more than once."""
        params = [
            {"key": key_of(key), "value": str(value)[:PARAMETER_CHARACTERS]}
            for key, value in flat(self._training.documents["spec"]).items()
        ]
        for start in range(0, len(params), BATCH):
            self._post("runs/log-batch", {"run_id": run_id, "params": params[start : start + BATCH]})
        self._described = True
        self._keep()

    def _experiment(self) -> str:
        name = self._spec.experiment or self._training.namespace
        answer = self._client.get("experiments/get-by-name", params={"experiment_name": name})
        if answer.status_code != httpx.codes.NOT_FOUND:
            return str(accepted(answer).json()["experiment"]["experiment_id"])
        return str(self._post("experiments/create", {"name": name})["experiment_id"])

    def _update(self, status: str, run_id: str | None = None) -> None:
        body = {"run_id": run_id or self._run_id, "status": status}
        self._post("runs/update", body | ({} if status == "RUNNING" else {"end_time": round(time.time() * 1000)}))

    def _keep(self) -> None:
        kept = {"id": self._run_id, "url": self._spec.url, "described": self._described, "sent": self._sent}
        replace_file(self._training.folder / RUN_FILE, json.dumps(kept).encode())

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = accepted(self._client.post(path, json=body)).json()
        return dict(answer)


def authorize(client: httpx.Client, given: dict[str, str]) -> None:
    """Let `client` send the credentials, as MLflow's own client does it."""
    if "token" in given:
        client.headers["Authorization"] = f"Bearer {given['token']}"
    if "password" in given:
        client.auth = httpx.BasicAuth(given["username"], given["password"])


def accepted(answer: httpx.Response) -> httpx.Response:
    """Return `answer`. Raises PermissionError or HTTPStatusError if the server has refused the request."""
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise PermissionError(f"{answer.url.host} answered {answer.status_code}; see spec.tracking.secretRef")
    return answer.raise_for_status()


def key_of(name: str) -> str:
    """Return `name` as MLflow allows it: the same rule as in transformers' integration."""
    return FOREIGN.sub("_", name)[:NAME_CHARACTERS]


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `data` with the paths of its fields as keys: training.learningRate, ..."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
