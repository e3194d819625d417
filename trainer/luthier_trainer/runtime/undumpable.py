"""Hides a process's environment and memory from other processes of the same user, which code of a job may start.

Without this, they could read credentials in /proc/PID/environ. GPU libraries may need the opposite: processes of a
training look into each other.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_DUMPABLE = 4  # prctl(2)


def hide_process() -> None:
    """Make this process one that only root may look into. A new program that it starts is not. Only Linux has this.

    Raises OSError if the kernel refuses it.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
