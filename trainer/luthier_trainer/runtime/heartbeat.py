"""The heartbeat of a phase: files in the run folder that the supervisor watches to notice a process that hangs.

transformers, safetensors and DeepSpeed write a whole file in one call, which can take longer than a training step may.
`beating_while_growing` therefore beats for as long as the files grow. A write that makes no progress gives no
heartbeat, so that a volume that hangs is still noticed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier_trainer.runtime.run_folder import run_dir

STARTING_FILE, HEARTBEAT_FILE = "starting", "heartbeat"
LOOK_SECONDS = 5.0


def beat(step: int | None = None) -> None:
    """Tell the supervisor that the work makes progress: once a step or batch, and while files are written or read.

    `step`: of the training, where it is one. It stays until the next one.
    """
    file = run_dir() / HEARTBEAT_FILE
    if step is None:
        file.touch()
    else:
        file.write_text(str(step))


def age() -> float:
    """Seconds since the last heartbeat. NaN before the first one."""
    try:
        return max(0.0, time.time() - (run_dir() / HEARTBEAT_FILE).stat().st_mtime)
    except FileNotFoundError:
        return math.nan


def beat_before_first_step() -> None:
    """The same before the first step or output, which may still be slow to come: the model is loaded and compiled."""
    (run_dir() / STARTING_FILE).touch()


@contextmanager
def beating_while_growing(folder: Path, every: float = LOOK_SECONDS) -> Iterator[None]:
    """Send a heartbeat every `every` seconds in which the files below `folder` have become more, or larger."""
    over = threading.Event()

    def watch() -> None:
        before = (0, 0)
        while not over.wait(every):
            now = extent(folder)
            if now != before:
                before = now
                beat()

    watcher = threading.Thread(target=watch, name="growth", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def extent(folder: Path) -> tuple[int, int]:
    """Number of files below `folder`, and their bytes. Files that are renamed meanwhile are left out."""
    sizes = []
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)
