"""Remembers the signals that ask PID 1 to stop, until the supervisor reads them.

The handlers are set before anything slow is imported: the kernel drops a SIGTERM to a process 1 without a handler.
"""

from __future__ import annotations

import signal
import time

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether SIGTERM or SIGINT has come. After a second SIGINT `now` is set: do not wait for a checkpoint."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.now = False
        for number in NUMBERS:
            signal.signal(number, self._remember)

    def end(self) -> None:
        """Ignore signals from now on: the exit code stands.

        Python takes its own handlers away before it has ended, and a signal after that would be the exit code of a
        process that is not number 1 (`luthier run`).
        """
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: object) -> None:
        self.now = self.now or (self.at is not None and number == signal.SIGINT)
        if self.at is None:
            self.at = time.monotonic()
