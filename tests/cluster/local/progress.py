"""Lines on stderr that say what is being done, and for how long: a first start may compile for half an hour."""

import sys
import time

BEGIN = time.monotonic()
SECONDS = 30  # between two lines about the same step


class Progress:
    """One step: a line at its beginning, one now and then, one at its end."""

    def __init__(self, step: str) -> None:
        self.step, self.begin, self.last = step, time.monotonic(), time.monotonic()
        say(f"{step} ...")

    def still(self, how_far: str) -> None:
        """A line, unless there was one a short time ago."""
        if time.monotonic() >= self.last + SECONDS:
            self.last = time.monotonic()
            say(f"{self.step}: {how_far}")

    def done(self, what: str = "") -> None:
        say(f"{self.step}: done in {time.monotonic() - self.begin:.1f} s{what and f', {what}'}")


def say(line: str) -> None:
    """`line` after the minutes and seconds since the start of this command."""
    minutes, seconds = divmod(int(time.monotonic() - BEGIN), 60)
    print(f"[{minutes:2}:{seconds:02}] {line}", file=sys.stderr, flush=True)
