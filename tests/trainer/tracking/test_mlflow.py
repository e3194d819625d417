"""A real MLflow server with SQLite has one run of a training in two attempts, as its own client reads it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases.mlflow_server import read, serving, with_login
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run

from luthier_api.status import TrackedRun
from luthier_api.tracking import Tracker
from luthier_trainer.runtime import notices
from luthier_trainer.tracking.base import Report, TrackedTraining
from luthier_trainer.tracking.mlflow import MLflow
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat
from luthier_trainer.workspace import tracked_runs


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server beside other tests on few cores takes seconds for a request, and hashes a password with each."""
    monkeypatch.setattr("luthier_trainer.tracking.mlflow.SECONDS", 90.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path) as url:
        yield url


DOCUMENTS: dict[str, Any] = {"spec": {"task": "causal-lm"}, "provenance": {}}


def answered_by(answer: Callable[[httpx.Request], httpx.Response], folder: Path, **fields: Any) -> MLflow:
    """A tracker whose server is `answer`."""
    spec = Tracker.model_validate({"type": "mlflow", "url": "http://mlflow", **fields})
    tracker = MLflow(spec, TrackedTraining("job", "default", folder, 0, DOCUMENTS))
    tracker._client = httpx.Client(base_url="http://mlflow/api/2.0/mlflow/", transport=httpx.MockTransport(answer))
    return tracker


def test_numbers_that_are_not_finite(server: str, tmp_path: Path) -> None:
    spec = Tracker.model_validate({"type": "mlflow", "url": server, "experiment": "trials", "tags": {"a*b": "c"}})
    documents = {"spec": {"method": {"rankPattern": {"layers.[01]": 2}}}, "provenance": {}}
    tracker = MLflow(spec, TrackedTraining("job", "default", tmp_path / "tracking", 0, documents))
    for step, value in enumerate((float("nan"), float("inf"), float("-inf"), 1.0)):
        tracker.send(Report(step, {"loss": value}))
    tracker.close(complete=False)
    (found,) = read(server)
    assert found["status"] == "KILLED"
    assert [step for step, _ in found["loss"]] == [0, 1, 2, 3]
    assert (found["tags"]["a_b"], found["params"]) == ("c", {"method.rankPattern.layers._01_": "2"})


def test_a_resumed_training_is_one_run(
    tmp_path: Path, server: str, llama: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(80)))
    training = {"maxSteps": 8, "saveSteps": 3}
    tracking = [{"type": "mlflow", "url": server, "experiment": "trials", "tags": {"team": "a"}}]
    plain = prepared_run(tmp_path / "plain", llama, data, training=training)
    run = prepared_run(tmp_path / "job", llama, data, training=training, tracking=tracking)
    train.main(plain)

    class Breaking(Heartbeat):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Breaking)
        with pytest.raises(RuntimeError, match="broken"):
            train.main(run)
    notices.forget()  # of reports that were on their way when it broke; they are sent again
    for thread in threading.enumerate():
        if thread.name == "tracker-mlflow":  # in a pod it ends with its process
            thread.join()
    train.main(run)
    assert notices.given() == []
    assert losses(run) == losses(plain)
    (found,) = read(server)
    assert (found["name"], found["status"]) == ("job", "FINISHED")
    page = f"{server}/#/experiments/{found['experiment']}/runs/{found['id']}"
    assert tracked_runs.read(tmp_path / "job/tracking") == [TrackedRun(type="mlflow", url=page, run=found["id"])]
    assert (found["tags"]["team"], found["tags"]["luthier.job"]) == ("a", "default/job")
    assert json.loads(found["tags"]["luthier.provenance"])["model"] == {"source": str(llama)}
    assert found["params"]["training.maxSteps"] == "8"
    assert [step for step, _ in found["loss"]] == list(range(1, 9))
    assert [value for _, value in found["loss"]] == losses(plain)


LOGIN = {"name": "login", "keys": {"username": "user", "password": "password"}}


def test_the_credentials_of_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow with its own authentication takes the right password, and a wrong one is said with the field."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    with serving(tmp_path, "--app-name", "basic-auth", **with_login(tmp_path)) as url:
        spec = Tracker.model_validate({"type": "mlflow", "url": url, "experiment": "trials", "secretRef": LOGIN})

        def send(password: str, folder: str) -> None:
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
            tracker = MLflow(spec, TrackedTraining("job", "default", tmp_path / folder, 0, DOCUMENTS))
            tracker.send(Report(1, {"loss": 2.0}))
            tracker.close(complete=True)

        with pytest.raises(PermissionError, match=r"127\.0\.0\.1 answered 401; see spec.tracking.secretRef"):
            send("wrong-password", "a")
        send("correct-password", "b")
        (found,) = read(url)  # MLflow's own client, with the same variables
        assert found["loss"] == [[1, 2.0]]
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            assert "correct-password" not in "\n".join(database.iterdump())


@dataclass(frozen=True)
class HeaderCase:
    name: str
    keys: dict[str, str]
    variables: dict[str, str]
    header: str


HEADERS = [
    HeaderCase(
        name="a token",
        keys={"token": "t"},
        variables={"MLFLOW_TRACKING_TOKEN": "abc\n"},
        header="Bearer abc",
    ),
    HeaderCase(
        name="a name and a password",
        keys={"username": "u", "password": "p"},
        variables={"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "abc"},
        header="Basic bWU6YWJj",
    ),
    HeaderCase(
        name="a Secret without the key",
        keys={"username": "u", "password": "p"},
        variables={"MLFLOW_TRACKING_USERNAME": "me"},
        header="Secret login has no key p, or it is empty; see spec.tracking.secretRef",
    ),
]


@pytest.mark.parametrize("case", HEADERS, ids=lambda case: case.name)
def test_what_a_server_gets(case: HeaderCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value)
    secret = {"name": "login", "keys": case.keys}
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200, json={"experiment": {"experiment_id": "1"}, "run": {"info": {"run_id": "r1"}}})

    tracker = answered_by(answer, tmp_path, secretRef=secret)
    try:
        tracker.send(Report(1, {"loss": 1.0}))
    except PermissionError as error:
        seen.append(str(error))
    assert set(seen) == {case.header}


def test_a_server_that_is_away(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(40)))
    tracking = [{"type": "mlflow", "url": "http://127.0.0.1:9"}]
    message = train.main(prepared_run(tmp_path, llama, data, training={"maxSteps": 3}, tracking=tracking))
    assert message.reason == "Completed"
    assert notices.given() == [
        "spec.tracking: MLflow lacks 4 of 4 reports of the training: ConnectError: [Errno 111] Connection refused"
    ]


def test_a_server_that_fails_between_requests_still_gets_the_parameters(tmp_path: Path) -> None:
    """The next attempt, too, describes a run that an earlier one has only created."""
    described: list[str] = []
    created: list[str] = []
    healthy = False

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        if request.url.path.endswith("runs/create"):
            created.append(body["run_name"])
            return httpx.Response(200, json={"run": {"info": {"run_id": "r1"}}})
        if body.get("params"):
            if not healthy:
                return httpx.Response(503)
            described.extend(param["key"] for param in body["params"])
        return httpx.Response(200, json={"experiment": {"experiment_id": "1"}})

    first = answered_by(answer, tmp_path)
    for _ in range(2):
        with pytest.raises(httpx.HTTPStatusError):
            first.send(Report(1, {"loss": 1.0}))
    healthy = True
    answered_by(answer, tmp_path).send(Report(1, {"loss": 1.0}))
    answered_by(answer, tmp_path).send(Report(2, {"loss": 1.0}))
    assert (created, described) == (["job"], ["task"])
