"""Whether the kernel killed a process of this container for its memory.

The exit code does not show it: 137 is any SIGKILL, and torch's agent turns it into 1. The cgroup's counter does.
Measured in pods with cgroup v1; v2 has the same field.
"""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
COUNTERS = ("memory.events", "memory/memory.oom_control")  # v2, v1


def oom_kills(cgroup: Path = CGROUP) -> int:
    """Processes killed in this cgroup so far; 0 where there is no counter."""
    for name in COUNTERS:
        try:
            lines = (cgroup / name).read_text().splitlines()
        except OSError:
            continue
        for key, _, value in (line.partition(" ") for line in lines):
            if key == "oom_kill":
                return int(value)
    return 0
