"""Finds out where the processes of a run that hangs are: asks each of them for the stacks of its threads.

faulthandler writes them also while a thread holds the interpreter's lock. A process that writes none is stopped, or
waits inside the kernel for a disk or a driver; /proc names which.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier_trainer.runtime.run_folder import processes, stacks_file
from luthier_trainer.supervisor.process_tree import Child

ANSWER_SECONDS = 2.0
SETTLE_SECONDS = 0.3  # faulthandler writes a few kilobytes in one go
FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)$')
STATES: Mapping[str, str] = {
    "T": "is stopped (by SIGSTOP or a frozen container)",
    "t": "is stopped by a debugger",
    "D": "waits inside the kernel for a disk or a driver, and does not react to signals",
    "Z": "has ended",
}
NO_ANSWER = "does not react to signals"


@dataclass(frozen=True)
class Position:
    """Where the process of a rank was when the run hung."""

    rank: int
    text: str
    """Predicate of a sentence: `is in all_reduce (distributed_c10d.py:3022)`."""
    answered: bool
    """Whether it could write its stacks. One that could not keeps the others waiting."""


def positions(child: Child, run_dir: Path) -> list[Position]:
    """Where each rank of this pod is, in their order. Writes the stacks of all its processes to the log."""
    ranks = processes(run_dir)
    child.dump_stacks(ranks.values())
    until = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until and not all(_stacks(run_dir, rank) for rank in ranks):
        child.listen(0.1)
    child.listen_for(SETTLE_SECONDS)
    found = [_position(rank, pid, _stacks(run_dir, rank)) for rank, pid in sorted(ranks.items())]
    # Processes that load data share the file of their rank. They are asked only now, so that its own stacks come first.
    child.dump_stacks(pid for pid in child.processes() if pid not in ranks.values())
    child.listen_for(SETTLE_SECONDS)
    for position in found:
        header = f"supervisor: rank {position.rank} (process {ranks[position.rank]}) {position.text}"
        print(header, _stacks(run_dir, position.rank), sep="\n", file=sys.stderr, flush=True)
    return found


def _position(rank: int, pid: int, stacks: str) -> Position:
    if stacks:
        return Position(rank, f"is in {innermost(stacks)}", answered=True)
    return Position(rank, STATES.get(state(pid), NO_ANSWER), answered=False)


def innermost(stacks: str) -> str:
    """The innermost frame of the main thread: `all_reduce (distributed_c10d.py:3022)`.

    faulthandler writes the main thread last.
    """
    main = stacks.rstrip().rsplit("\n\n", 1)[-1]
    for line in main.splitlines():
        if frame := FRAME.match(line):
            return f"{frame['function']} ({Path(frame['file']).name}:{frame['line']})"
    return "code outside Python"


def state(pid: int) -> str:
    """The letter of the state of a process, as in `ps`. Empty when there is none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _stacks(run_dir: Path, rank: int) -> str:
    try:
        return stacks_file(run_dir, rank).read_text(errors="replace")
    except FileNotFoundError:
        return ""
