"""The processes below another one, for those who have to end all of them: PID 1 of the pods and the command line."""

from __future__ import annotations

import contextlib
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents first. Process groups do not tell: workers are in groups of their own."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    queue = deque(children.get(pid, ()))
    while queue:
        found.append(queue.popleft())
        queue.extend(children.get(found[-1], ()))
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of every process, from /proc; on macOS, which has none, from `ps`."""
    entries = list(Path("/proc").glob("[0-9]*"))
    for entry in entries:
        with contextlib.suppress(OSError, ValueError, IndexError):
            # Field 4 is the parent; the name before it may hold blanks and brackets.
            yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    if entries:
        return
    with contextlib.suppress(FileNotFoundError):
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        for line in listing.splitlines():
            child, parent = map(int, line.split())
            yield child, parent
