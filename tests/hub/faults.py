"""Faults on demand, so that a test can take the Hub away for a while; and the log of what was asked of it.

PUT /_control {"status": 503, "for_seconds": 20}                     everything, for a time, instead of earlier faults
POST /_control {"status": 500, "count": 2, "path": "/commit/"}       also the next two requests whose path has this in
it POST /_control {"delay_seconds": 30, "method": "PUT", "count": 1}    also one upload that hangs, then goes on POST
/_control {"status": 504, "lost": true, "path": "/commit/"}     also a commit that is made, and the client never knows
GET /_control                                                        {"faults": [...], "requests": [...]} DELETE
/_control                                                     no faults, empty log
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

LOG_LENGTH = 10_000


@dataclass
class Fault:
    status: int | None = None  # None: only the delay
    for_seconds: float | None = None
    count: int | None = None
    path: str = ""
    method: str = ""
    delay_seconds: float = 0.0
    message: str = "Fault on demand"
    lost: bool = False  # the request is done first: only its answer is another
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.count == 0 or (self.for_seconds is not None and time.monotonic() - self.began > self.for_seconds)

    def matches(self, method: str, path: str) -> bool:
        return not self.over and self.path in path and self.method in ("", method)


class Control:
    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []

    def clear(self) -> None:
        self.faults.clear()
        self.requests.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The first fault that this request meets; it counts as used."""
        for fault in self.faults:
            if fault.matches(method, path):
                if fault.count is not None:
                    fault.count -= 1
                return fault
        return None

    def log(self, method: str, path: str, status: int, role: str) -> None:
        """The role and never the token: the log is read by anybody."""
        self.requests.append({"time": time.time(), "method": method, "path": path, "status": status, "role": role})
        del self.requests[:-LOG_LENGTH]

    def view(self) -> dict[str, Any]:
        return {"faults": [asdict(fault) for fault in self.faults if not fault.over], "requests": self.requests}
