"""How many processes `prepare` uses to convert rows (`prepare.numProc`).

It is a property of the process, like the number of threads of torch: it changes no row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from luthier_api.quantity import amount
from luthier_api.spec import PrepareResources
from luthier_trainer.runtime import cores

ROWS_A_PROCESS = 2_000  # fewer rows are not worth the start of a process, which takes about 0.2 s
# Unless the job asks for more: a pod without limits may use hundreds of cores, and has little memory for each.
MOST = 32

_asked: int | None = None


def asked(resources: PrepareResources | None) -> int | None:
    """Return how many processes a job asks for, if it does: by their number, or by the cores of the pod."""
    if resources is None:
        return None
    if resources.num_proc is not None:
        return resources.num_proc
    return max(1, math.ceil(amount(resources.cpu))) if resources.cpu else None


def use(processes: int | None) -> None:
    """Set how many processes are used; None: as many as there are cores, and `MOST` at most."""
    global _asked
    _asked = processes


def processes(rows: int) -> int:
    """Return how many processes convert so many rows."""
    most = min(cores.available(), MOST) if _asked is None else _asked
    return max(1, min(most, rows // ROWS_A_PROCESS))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep the tokenizers of several processes from using threads of their own, of which there would be too many."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
