"""The folders that the phases write to, and whether they can be written: a wrong mount should cost a tenth of a second.

Imports little, because PID 1 looks before it has imported the types of the run config. Neighbours: `gate` before it,
`preflight` after.
"""

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

# In the order in which tempfile looks; to import it costs as much as the whole check
TEMPORARY = (
    "TMPDIR",
    "TEMP",
    "TMP",
)


def check(workspace: Path) -> None:
    """Raises Failure for the first that cannot be written; creates the job's workspace folder and the run folder on the
    way.
    """
    for folder, field in folders(workspace):
        check_writable(folder, field)


def folders(workspace: Path) -> Iterator[tuple[Path, str]]:
    """Each of them, with the name of what decides its place."""
    yield workspace, "spec.workspace"
    yield run_dir(), "LUTHIER_RUN_DIR"
    temporary = next((name for name in TEMPORARY if os.environ.get(name)), TEMPORARY[0])
    yield Path(os.environ.get(temporary) or "/tmp"), temporary
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if os.environ.get(name):
            yield Path(os.environ[name]), name


def check_writable(folder: Path, field: str) -> None:
    """Create `folder` if need be, and in it create, flush and delete a file."""
    # A name of its own: the pods of a group do this at once, and each of them is process 1.
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
        raise Failure(code, f"{field}: cannot write to {folder}: {error.strerror}. {_rights(folder)}") from error


def _rights(folder: Path) -> str:
    """Owner and mode of the nearest folder that exists, against who we are, and what to do about it."""
    # Not `Path.exists`, which raises where a folder above may not be looked into.
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    facts = there.stat()
    return (
        f"{there} belongs to {facts.st_uid}:{facts.st_gid}, mode {stat.S_IMODE(facts.st_mode):04o}; this process is"
        f" {os.getuid()}:{os.getgid()} (groups {', '.join(map(str, os.getgroups())) or 'none'}). Use a volume that"
        " honours fsGroup, or give its folder to that group"
    )
