"""A real MLflow server for tests, and what its own client reads there. MLflow is a program of another environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cases.servers import answers, free_port, running

MLFLOW = os.environ.get("LUTHIER_TEST_MLFLOW") or shutil.which("mlflow")
READ = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.get_experiment_by_name("trials")
runs = client.search_runs([experiment.experiment_id])
print(json.dumps([
    {
        "id": run.info.run_id, "experiment": run.info.experiment_id, "name": run.info.run_name,
        "status": run.info.status, "tags": run.data.tags, "params": run.data.params,
        "loss": [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "loss")],
    }
    for run in runs
]))
"""


AUTH = """
[mlflow]
default_permission = READ
database_uri = sqlite:///auth.db
admin_username = admin
admin_password = correct-password
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def with_login(folder: Path) -> dict[str, str]:
    """Variables of a server with MLflow's own authentication: the user admin, the password correct-password."""
    (folder / "auth.ini").write_text(AUTH)
    return {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "any"}


@contextmanager
def serving(folder: Path, *options: str, **variables: str) -> Iterator[str]:
    """A server with SQLite in `folder`; yields its address."""
    if MLFLOW is None:
        pytest.skip("needs the program mlflow (LUTHIER_TEST_MLFLOW)")
    port = free_port()
    store = f"sqlite:///{folder}/mlflow.db"
    command = [MLFLOW, "server", "--backend-store-uri", store, "--port", f"{port}", "--workers", "1", *options]
    environment = os.environ | {"PATH": f"{Path(MLFLOW).parent}:{os.environ['PATH']}"} | variables
    url = f"http://127.0.0.1:{port}"
    with running(command, environment, folder, answers(f"{url}/health")):
        yield url


def read(server: str) -> list[dict[str, Any]]:
    """The runs of the experiment, as MLflow's own client has them."""
    python = Path(str(MLFLOW)).parent / "python"
    printed = subprocess.run([python, "-c", READ, server], capture_output=True, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return found
