"""The phase's process and everything below it: started in a session of its own, listened to, reaped and killed.

One thread and one loop: output is passed on as it comes, and its last lines are kept. Workers of torch's agent live in
sessions of their own, which a signal to the process group does not reach; the tree is therefore read from /proc.
torch's agent reaps them as well, and passes on an exit code of 1 whatever ended them; their ends are therefore read
before that, at the moment in which the kernel reports them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from luthier_api.processes import descendants
from luthier_trainer.runtime import gpu_errors
from luthier_trainer.supervisor.redaction import OutputRedaction, redact

KEPT_LINES = 20
KEPT_LINE_BYTES = 400
PR_SET_CHILD_SUBREAPER = 36
EXIT_CODE_FIELD = 52 - 3  # of /proc/PID/stat, behind the name of the command (proc_pid_stat(5))


class Tail:
    """The last lines of an output. A line that a carriage return overwrote, as progress bars do, is not kept."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._open = b""
        self._rank = len(gpu_errors.PATTERNS)
        self.gpu_error = ""
        """The most specific error of CUDA or NCCL: the stack frames after it may push it out of the last lines."""

    def feed(self, data: bytes) -> None:
        *whole, self._open = (self._open + data).split(b"\n")
        # A program that never ends its line must not fill the memory of PID 1.
        self._open = self._open[-64 * 1024 :]
        for line in whole:
            self._keep(line)

    def _keep(self, line: bytes) -> None:
        visible = line.rstrip(b"\r").rsplit(b"\r", 1)[-1]
        if visible.strip():
            text = redact(visible.decode(errors="replace"))
            self._lines.append(text[:KEPT_LINE_BYTES])
            found = None if "Warning" in text else gpu_errors.rank(text)  # the program continues after a warning
            if found is not None and found < self._rank:
                self._rank, self.gpu_error = found, text[:KEPT_LINE_BYTES]

    def text(self) -> str:
        if self._open:
            self._keep(self._open)
            self._open = b""
        return "\n".join(self._lines)


@dataclass(frozen=True)
class Death:
    """How the process of a rank ended."""

    rank: int
    status: int | None
    """Exit code, or the negative number of the signal that ended it; None where it was reaped before it was read."""
    at: float
    """By the monotonic clock, in seconds."""


AGENT_REPORT = re.compile(r"rank\s*: (?P<rank>\d+) \(local_rank: \d+\)\n\s*exitcode\s*: (?P<status>-?\d+) ")
"""In the output of torch's agent (torch 2.13, distributed/elastic/multiprocessing), for each rank that failed."""


def with_report(deaths: Iterable[Death], output: str) -> list[Death]:
    """`deaths`, with the statuses that torch's agent reports in `output` of processes that it reaped before PID 1 read
    them: on a busy node it may be sooner.
    """
    reported = {int(found["rank"]): int(found["status"]) for found in AGENT_REPORT.finditer(output)}
    return [d if d.status is not None else replace(d, status=reported.get(d.rank)) for d in deaths]


@dataclass(frozen=True)
class _Rank:
    """The process of a rank, while it is watched."""

    rank: int
    pid: int


@dataclass(frozen=True)
class _Output:
    sink: BinaryIO
    redaction: OutputRedaction


class Child:
    """A running phase. Call `listen` until `ended`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        _adopt_orphans()
        self.tail = Tail()
        self.status: int | None = None
        """Exit code, or the negative number of the signal that ended it; None while it runs."""
        self.deaths: list[Death] = []
        """Of the watched processes, in their order."""
        self._watched: set[int] = set()
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._selector = selectors.DefaultSelector()
        self._open_pipes = 0
        for pipe, sink in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Output(sink.buffer, OutputRedaction()))
            self._open_pipes += 1

    @property
    def ended(self) -> bool:
        return self.status is not None

    def watch(self, rank: int, pid: int) -> None:
        """Record in `deaths` how the process `pid` of a rank ends. It may be watched already."""
        if pid in self._watched:
            return
        self._watched.add(pid)
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self.deaths.append(Death(rank, None, time.monotonic()))
        else:
            self._selector.register(handle, selectors.EVENT_READ, _Rank(rank, pid))

    def listen(self, seconds: float) -> None:
        """Pass on output and reap ended processes for up to `seconds`; returns early when something happened."""
        self._wait(seconds)
        self._reap()

    def listen_for(self, seconds: float) -> None:
        """The same for all of `seconds`."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.listen(left)

    def _wait(self, seconds: float) -> bool:
        """Wait for output and for ends of watched processes. Returns whether there was any."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return False
        events = [key for key, _ in self._selector.select(seconds)]
        # Ends first: who is their parent reaps them within 0.1 s.
        for key in events:
            if isinstance(key.data, _Rank):
                self.deaths.append(Death(key.data.rank, _exit_status(key.data.pid), time.monotonic()))
                self._selector.unregister(key.fd)
                os.close(key.fd)
        for key in events:
            if isinstance(key.data, _Output):
                self._pass_on(key, key.data)
        return bool(events)

    def _pass_on(self, key: selectors.SelectorKey, output: _Output) -> None:
        data = os.read(key.fd, 1 << 16)
        if data:
            self.tail.feed(data)
        else:
            self._selector.unregister(key.fileobj)
            self._open_pipes -= 1
        with contextlib.suppress(BrokenPipeError, ValueError):
            output.sink.write(output.redaction.feed(data) if data else output.redaction.rest())
            output.sink.flush()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._process.pid:
                self.status = self._process.returncode = os.waitstatus_to_exitcode(status)

    def drain(self, seconds: float = 1.0) -> None:
        """Pass on what is left in the pipes after the end, for up to `seconds`: an orphan may hold them open."""
        until = time.monotonic() + seconds
        while self._open_pipes and time.monotonic() < until and self._wait(0.05):
            pass

    def processes(self) -> list[int]:
        """The ids of all processes of the phase."""
        return descendants(os.getpid())

    def dump_stacks(self, processes: Iterable[int]) -> None:
        """Send SIGUSR1 to each process that catches it, as faulthandler does; it would kill the others."""
        for pid in processes:
            if _catches(pid, signal.SIGUSR1):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGUSR1)

    def kill(self, seconds: float = 5.0) -> None:
        """Send SIGKILL to the whole tree until nothing of it is left, for up to `seconds`."""
        until = time.monotonic() + seconds
        while True:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not self.ended:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self.listen(0.05)
            if (self.ended and not self.processes()) or time.monotonic() > until:
                return


def _exit_status(pid: int) -> int | None:
    """How a process has ended that its parent has not reaped yet. None where it has.

    Exit code, or the negative number of the signal that ended it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return os.waitstatus_to_exitcode(int(fields[EXIT_CODE_FIELD]))
    except (OSError, ValueError, IndexError):
        return None


def _catches(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _adopt_orphans() -> None:
    """Become the parent of orphans, so that none is left behind on a laptop. PID 1 of a pod is their parent anyway."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
