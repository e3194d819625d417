"""A sign of life while a library writes large files: the supervisor is told for as long as they grow.

transformers, safetensors and DeepSpeed write a whole file in one call, which can take longer than a step may. A write
that stands still gives no sign, so that a volume that hangs is still found.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier_trainer.ending import beat

LOOK_SECONDS = 5.0


@contextmanager
def beating_while_growing(folder: Path, every: float = LOOK_SECONDS) -> Iterator[None]:
    """Beat whenever the files below `folder` have become more, or larger, since `every` seconds ago."""
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
    """Files below `folder`, and their bytes. What is renamed meanwhile is left out."""
    sizes = []
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)
