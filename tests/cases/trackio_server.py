"""A real trackio server for tests, and what its own library reads there. trackio is of another environment."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"TRACKIO_WRITE_TOKEN": TOKEN, "GRADIO_SERVER_PORT": f"{port}", "GRADIO_NUM_PORTS": "1"}
    environment = os.environ | {"TRACKIO_DIR": str(folder), "BROWSER": "true", "HF_HUB_OFFLINE": "1"} | variables
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([TRACKIO, "show", "--host", "127.0.0.1"], stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    if httpx.get(f"{url}/version").is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.2)
            assert process.poll() is None, (folder / "server.log").read_text()
            yield url
        finally:
            process.terminate()
            process.wait()


def read(folder: Path, project: str) -> list[dict[str, Any]]:
    """The runs of `project`, as trackio's own library reads them from its SQLite."""
    python = Path(str(TRACKIO)).parent / "python"
    environment = os.environ | {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", READ, project]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return found
