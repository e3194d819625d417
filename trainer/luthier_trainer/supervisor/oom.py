"""Whether the kernel killed a process of this container for its memory.

An exit code cannot tell (137 is any SIGKILL; torch's agent turns it into 1), the cgroup's counter can: cluster-measured
on v1, same field on v2.
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
