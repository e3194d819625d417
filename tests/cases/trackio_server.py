"""A real trackio server for tests, and what its own library reads there. trackio is of another environment."""

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

TRACKIO = os.environ.get("LUTHIER_TEST_TRACKIO") or shutil.which("trackio")
TOKEN = "right-write-token"
READ = """
import json, sys
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
project = sys.argv[1]
print(json.dumps([
    {
        "id": run.id, "name": run.name, "config": run.config,
        "logs": SQLiteStorage.get_logs(project, run.name, run_id=run.id),
    }
    for run in Api().runs(project)
]))
"""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server with SQLite in `folder`, which takes reports with `TOKEN`; yields its address."""
    if TRACKIO is None:
        pytest.skip("needs the program trackio (LUTHIER_TEST_TRACKIO)")
    port = free_port()
    variables = {"TRACKIO_WRITE_TOKEN": TOKEN, "GRADIO_SERVER_PORT": f"{port}", "GRADIO_NUM_PORTS": "1"}
    environment = os.environ | {"TRACKIO_DIR": str(folder), "BROWSER": "true", "HF_HUB_OFFLINE": "1"} | variables
    url = f"http://127.0.0.1:{port}"
    with running([TRACKIO, "show", "--host", "127.0.0.1"], environment, folder, answers(f"{url}/version")):
        yield url


def read(folder: Path, project: str) -> list[dict[str, Any]]:
    """The runs of `project`, as trackio's own library reads them from its SQLite."""
    python = Path(str(TRACKIO)).parent / "python"
    environment = os.environ | {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", READ, project]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return found
