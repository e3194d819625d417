"""A training on the cluster that a real MLflow server with a login and TensorBoard show.

The server runs on this machine, which is the node of the local cluster; elsewhere pods cannot reach it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import mlflow_server
from cluster import choice
from cluster.local.shell import NODE_IP
from e2e import jobs
from e2e.conftest import JOBS
from e2e.kube import Kube
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.e2e
LOGIN = {"name": "mlflow-login", "keys": {"username": "user", "password": "password"}}


@pytest.fixture
def server(tmp_path: Path, kube: Kube) -> Iterator[str]:
    if choice.cluster().volume(JOBS, "work") is None:
        pytest.skip("pods of this cluster cannot reach a server on this machine")
    options = ("--app-name", "basic-auth", "--host", "0.0.0.0", "--allowed-hosts", "*")
    with mlflow_server.serving(tmp_path, *options, **mlflow_server.with_login(tmp_path)) as url:
        yield url.replace("127.0.0.1", NODE_IP)


def test_trackers_show_a_training(kube: Kube, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": LOGIN["name"]}}
    kube.apply(secret | {"stringData": {"user": "admin", "password": "correct-password"}})
    tracking = [
        {"type": "tensorboard"},
        {"type": "mlflow", "url": server, "experiment": "trials", "tags": {"team": "a"}, "secretRef": LOGIN},
    ]
    kube.apply(
        jobs.fine_tune(
            "tracked",
            model={"path": "/data/encoder"},
            task="text-classification",
            dataset={"files": ["/data/packages.jsonl"]},
            method={"type": "lora", "rank": 2},
            training=jobs.course(maxSteps=4, maxLength=128, logSteps=1),
            tracking=tracking,
        )
    )
    job = kube.complete("ftj", "tracked")

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-password")
    (run,) = mlflow_server.read(server)
    assert (run["name"], run["status"], run["tags"]["team"]) == ("tracked", "FINISHED", "a")
    assert [step for step, _ in run["loss"]] == [1, 2, 3, 4]
    assert job["status"]["tracking"] == [
        {"type": "mlflow", "run": run["id"], "url": f"{server}/#/experiments/{run['experiment']}/runs/{run['id']}"},
        {"type": "tensorboard", "run": "tracking/tensorboard/tracked"},
    ]

    volume = choice.cluster().volume(JOBS, "work")
    assert volume is not None
    folder = volume / job["status"]["workspace"]["folder"] / job["status"]["tracking"][1]["run"]
    shown = EventAccumulator(str(folder)).Reload()
    assert [(event.step, round(event.value, 3)) for event in shown.Scalars("train/loss")] == [
        (step, round(value, 3)) for step, value in run["loss"]
    ]
