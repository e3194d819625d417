"""Locks of torch's folder of compiled extensions that nobody holds any more.

torch builds and loads an extension, such as an operator of DeepSpeed, while its folder holds a file `lock`, and deletes
it afterwards. A process that is killed meanwhile leaves it, and every later process would wait for it without end.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from luthier_trainer.runtime.notices import notice


def extensions_folder() -> Path:
    """Where torch keeps compiled extensions; without importing torch."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    caches = (
        Path("~/Library/Caches") if sys.platform == "darwin" else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    )
    return caches.expanduser() / "torch_extensions"


def remove_dead_locks(folder: Path | None = None) -> None:
    """Delete the locks below `folder` that no process of this machine has open: who holds a lock keeps it open.

    `folder`: default: that of torch. A notice names each lock that was deleted.
    """
    locks = sorted((folder or extensions_folder()).resolve().rglob("lock"))
    if not locks:
        return
    held = _open_files()
    for lock in locks:
        if str(lock) not in held:
            lock.unlink(missing_ok=True)
            notice(f"{lock} was deleted: a process that was killed while torch compiled had left it")


def _open_files() -> Sequence[str]:
    files: list[str] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            files += (file.path for file in process.open_files())
    return files
