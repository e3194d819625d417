"""Real servers for tests, which are programs of another environment."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

PAUSE = 0.1  # seconds between two questions whether a server answers


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
    return port


def answers(url: str) -> Callable[[], bool]:
    """Whether `url` can be read now."""

    def ask() -> bool:
        try:
            return httpx.get(url).is_success
        except httpx.HTTPError:
            return False

    return ask


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, is_ready: Callable[[], bool]
) -> Iterator[None]:
    """Run a server in `folder`, where its log is, once it is ready. Raises AssertionError if it ends before."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            while process.poll() is None and not is_ready():
                time.sleep(PAUSE)
            assert process.poll() is None, (folder / "server.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait()
