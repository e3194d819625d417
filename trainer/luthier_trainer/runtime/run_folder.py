"""The run folder of a pod: the stop flag, the heartbeat and the results of the ranks.

A process writes `result-<rank>.json` there. After success, and after an agreed stop, it exits with 0 whatever the
message's code is: a worker that exits with another code makes torch's agent kill its siblings, and every code becomes
1. The supervisor turns the messages of all ranks into the exit code of the pod.
"""

from __future__ import annotations

import os
from pathlib import Path

from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables

STOP_FILE = "stop"  # written by PID 1


def run_dir() -> Path:
    """Writable folder of this pod: stop flag, heartbeat, results of the ranks."""
    return Path(os.environ.get(Variables.RUN_DIR) or "/run/luthier")


def stop_requested() -> bool:
    """Whether the supervisor wants this pod's work to end at the next step or batch."""
    return (run_dir() / STOP_FILE).exists()


def result_file(rank: int) -> Path:
    return run_dir() / f"result-{rank}.json"


def global_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def write_result(message: TerminationMessage, rank: int | None = None) -> None:
    """Write the message for the supervisor, whole or not at all."""
    path = result_file(global_rank() if rank is None else rank)
    partial = path.with_suffix(".partial")
    partial.write_bytes(message.encode())
    partial.replace(path)
