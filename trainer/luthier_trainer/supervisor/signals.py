"""The signals that ask PID 1 to end, remembered until somebody looks.

Set up before anything slow is imported: a process 1 without a handler loses a SIGTERM.
"""

from __future__ import annotations

import signal
import time


class Stop:
    """SIGTERM and SIGINT, remembered. A second SIGINT is an impatient user: `now` says not to wait for a checkpoint."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.now = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.now = self.now or (self.at is not None and number == signal.SIGINT)
        if self.at is None:
            self.at = time.monotonic()
