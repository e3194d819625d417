"""The way of reports to a tracker: a bounded buffer, and a thread that empties it.

The thread that trains only appends to the buffer. So a tracker that is slow, away or broken neither slows nor stops a
training; what is lost is counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from luthier_trainer.runtime.notices import notice
from luthier_trainer.tracking.base import Report, Tracker

BUFFERED_REPORTS = 10_000  # about 5 MB; with a report every ten seconds, more than a day
RETRY_SECONDS = 10.0
END_SECONDS = 30.0  # to send the last reports of a whole training
STOP_SECONDS = 5.0  # the grace period of a pod is short, and the next attempt reports the steps after the checkpoint
AWAY_SECONDS = 60.0  # of an interruption that the status mentions although nothing was lost
CHARACTERS = 160  # of an exception in a notice


class Channel:
    """Sends reports to one tracker, in their order, in a thread of its own."""

    def __init__(
        self, name: str, tracker: Tracker, limit: int = BUFFERED_REPORTS, retry: float = RETRY_SECONDS
    ) -> None:
        """`name`: type of the tracker. `limit`: reports that wait at most. `retry`: seconds after a failure."""
        self.name = name
        self._tracker, self._limit, self._retry = tracker, limit, retry
        self._waiting: deque[Report] = deque()
        self._changed = threading.Condition()
        self._closing = self._complete = False
        self._put = self._dropped = 0
        self._error = ""
        self._away_since: float | None = None
        self._away = 0.0
        """Seconds, of the longest time in which every request failed."""
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, report: Report) -> None:
        """Pass on `report`, without waiting. It is dropped if too many wait already."""
        with self._changed:
            self._put += 1
            if len(self._waiting) >= self._limit:
                self._dropped += 1
                return
            self._waiting.append(report)
            self._changed.notify()

    def close(self, complete: bool, seconds: float | None = None) -> None:
        """Wait at most `seconds` for the reports that are on their way. Give notice if some were lost.

        `complete`: whether the training has come to its end.
        """
        if seconds is None:
            seconds = END_SECONDS if complete else STOP_SECONDS
        with self._changed:
            self._complete = complete
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            lost = self._dropped + len(self._waiting)
            reason = self._error or f"it did not take them within {seconds:g} s"
            if not self._waiting:
                reason = "too many reports waited for it"
        if lost:
            notice(f"spec.tracking: {self.name} lacks {lost} of {self._put} reports of the training: {reason}")
        elif self._away >= AWAY_SECONDS:
            notice(
                f"spec.tracking: {self.name} took no reports for {self._away:.0f} s, and has all of them now:"
                f" {self._error}"
            )

    def _work(self) -> None:
        while (report := self._next()) is not None:
            try:
                self._tracker.send(report)
            except Exception as error:
                if not self._again(error):
                    return
            else:
                self._answered()
        try:
            self._tracker.close(self._complete)
        except Exception as error:
            print(f"spec.tracking: {self.name}: {described(error)}", flush=True)

    def _answered(self) -> None:
        """The oldest report was taken."""
        with self._changed:
            self._waiting.popleft()
            if self._away_since is None:
                return
            seconds = time.monotonic() - self._away_since
            self._away, self._away_since = max(self._away, seconds), None
        print(f"spec.tracking: {self.name} takes reports again after {seconds:.0f} s", flush=True)

    def _next(self) -> Report | None:
        """Return the oldest report, as soon as there is one; None when all are sent and none will follow."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting[0] if self._waiting else None

    def _again(self, error: Exception) -> bool:
        """Wait after a failure. Return whether the report is to be sent again: not while the channel closes."""
        with self._changed:
            first, self._error = self._away_since is None, described(error)
            if first:
                self._away_since = time.monotonic()
            if self._closing:
                return False
        if first:
            print(f"spec.tracking: {self.name}: {self._error}. Reports wait; the training goes on", flush=True)
        until = time.monotonic() + self._retry
        with self._changed:
            while not self._closing and (rest := until - time.monotonic()) > 0:
                self._changed.wait(rest)
        return True


def described(error: Exception) -> str:
    """Return the type and the beginning of the text of an exception, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:CHARACTERS]
