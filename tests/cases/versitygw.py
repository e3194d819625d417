"""A real S3 server for tests: versitygw, a program in Go, which serves the folders below a folder as buckets."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cases.servers import free_port, running

VERSITYGW = os.environ.get("LUTHIER_TEST_VERSITYGW") or shutil.which("versitygw")
USER, PASSWORD = "owner-of-buckets", "password-of-the-owner"


@contextmanager
def serving(folder: Path, host: str = "127.0.0.1") -> Iterator[int]:
    """A server of the buckets in `folder`; yields its port."""
    if VERSITYGW is None:
        pytest.skip(
            "needs the program versitygw (LUTHIER_TEST_VERSITYGW): go install"
            " github.com/versity/versitygw/cmd/versitygw@v1.8.0"
        )
    port = free_port(host)
    command = [VERSITYGW, "--port", f"{host}:{port}", "--quiet", "posix", "--nometa", str(folder)]
    environment = os.environ | {"ROOT_ACCESS_KEY": USER, "ROOT_SECRET_KEY": PASSWORD}

    def is_ready() -> bool:
        with socket.socket() as one:
            return one.connect_ex((host, port)) == 0

    with running(command, environment, folder.parent, is_ready):
        yield port
