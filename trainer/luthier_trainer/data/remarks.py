"""Gathers the notices about the windows of a stream, which are the same for many windows but for their numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

NUMBER = re.compile(r"\d[\d,.]*")
KINDS = 50  # of which the first is kept; the log of a training of months must not grow with its rows


@dataclass
class Remarks:
    """The first notice of each kind, and in how many windows there was one."""

    first: dict[str, str] = field(default_factory=dict)
    windows: Counter[str] = field(default_factory=Counter)

    def add(self, texts: list[str], origin: str) -> list[str]:
        """Count the notices about a window of the file `origin`. Return those of a new kind."""
        added = []
        for text in texts:
            kind = NUMBER.sub("0", text.replace(origin, ""))
            if kind not in self.windows and len(self.first) < KINDS:
                self.first[kind] = text
                added.append(text)
            self.windows[kind] += 1
        return added

    def texts(self) -> list[str]:
        """Return the first notice of each kind, with the number of windows that had others like it."""
        return [
            text
            if self.windows[kind] == 1
            else f"{text} (and others in {self.windows[kind] - 1} later windows of rows)"
            for kind, text in self.first.items()
        ]
