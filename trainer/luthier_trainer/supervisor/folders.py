"""Checks that the folders that the phases write to can be written, so that a wrong mount fails in PID 1, at once."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.classify import STORAGE_ERRNOS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import run_dir

WORKSPACE = "spec.workspace"
REMEDIES = {
    WORKSPACE: (
        f"On a cluster: give the root of the claim to that group (chgrp {os.getgid()}, chmod g+rwx); or, if the claim"
        " holds nothing else, set spec.workspace.ownership: Change, and Kubernetes gives all files on it to the group,"
        " where its storage honours fsGroup"
    )
}
"""By the name of a folder's field: what to do where it cannot be written."""
TEMPORARY = ("TMPDIR", "TEMP", "TMP")  # in the order in which `tempfile` looks


def check(workspace: Path) -> None:
    """Create the job's workspace folder and the run folder, and write to each folder. Raises Failure if one cannot be
    written.
    """
    for folder, field in folders(workspace):
        check_writable(folder, field)


def folders(workspace: Path) -> Iterator[tuple[Path, str]]:
    """Each folder, with the field or the environment variable that sets its location."""
    yield workspace, WORKSPACE
    yield run_dir(), "LUTHIER_RUN_DIR"
    temporary = next((name for name in TEMPORARY if os.environ.get(name)), TEMPORARY[0])
    yield Path(os.environ.get(temporary) or "/tmp"), temporary
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if os.environ.get(name):
            yield Path(os.environ[name]), name


def check_writable(folder: Path, field: str) -> None:
    """Create `folder` if it is missing, and in it create, flush and delete a file. Raises Failure."""
    # The pods of a group do this at the same time, and each of them is process 1, so that the name is drawn at random.
    probe = folder / f".luthier-probe-{os.urandom(8).hex()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("xb", buffering=0) as file:
            try:
                file.write(b"luthier")
                os.fsync(file.fileno())
            finally:
                probe.unlink()
    except OSError as error:
        code = ExitCode.STORAGE_ERROR if error.errno in STORAGE_ERRNOS - {errno.EROFS} else ExitCode.MISCONFIGURED
        remedy = REMEDIES.get(field, "Use a folder that this user or group can write to")
        message = f"{field}: cannot write to {folder}: {error.strerror}. {_rights(folder)}. {remedy}"
        raise Failure(code, message) from error


def _rights(folder: Path) -> str:
    """Owner and mode of the nearest folder that exists, and user and groups of this process."""
    # Not `Path.exists`, which raises if a folder above may not be entered.
    nearest = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    status = nearest.stat()
    groups = ", ".join(map(str, os.getgroups())) or "none"
    return (
        f"{nearest} belongs to {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}; this process"
        f" is {os.getuid()}:{os.getgid()} (groups {groups})"
    )
