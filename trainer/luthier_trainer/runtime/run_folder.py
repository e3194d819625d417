"""The run folder of a pod: the stop flag, the heartbeat, the processes of the ranks and their results.

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
PROCESS, STACKS = "process-", "stacks-"  # with a global rank behind


def run_dir() -> Path:
    """Writable folder of this pod: stop flag, heartbeat, results of the ranks."""
    return Path(os.environ.get(Variables.RUN_DIR) or "/run/luthier")


def stop_requested() -> bool:
    """Whether the supervisor wants this pod's work to end at the next step or batch."""
    return (run_dir() / STOP_FILE).exists()


def result_file(rank: int) -> Path:
    return run_dir() / f"result-{rank}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    """Where the process of a rank writes the stacks of its threads when the supervisor asks for them."""
    return folder / f"{STACKS}{rank}"


def announce() -> None:
    """Write the id of this process for the supervisor, which watches how it ends."""
    path = run_dir() / f"{PROCESS}{global_rank()}"
    partial = path.with_suffix(".partial")
    partial.write_text(str(os.getpid()))
    partial.replace(path)


def processes(folder: Path) -> dict[int, int]:
    """Global rank → id of its process, of the ranks of this pod that have started."""
    found = {}
    for file in folder.glob(f"{PROCESS}*[0-9]"):
        found[int(file.name.removeprefix(PROCESS))] = int(file.read_text())
    return found


def global_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def write_result(message: TerminationMessage, rank: int | None = None) -> None:
    """Write the message for the supervisor, whole or not at all."""
    path = result_file(global_rank() if rank is None else rank)
    partial = path.with_suffix(".partial")
    partial.write_bytes(message.encode())
    partial.replace(path)
