"""One supervisor as a process of this machine: what the kubelet is to a pod.

Its run folder is a temporary one, its output goes to a log, its termination message to a file. Neighbours:
`luthier_trainer.supervisor` is what runs, `runner` starts and stops it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import read_samples
from luthier_api.status import Phase
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_cli.local import LocalJob

PORT_FILE = "metrics-port"
TAIL_LINES = 15


class Supervised:
    """A running `python -m luthier_trainer VERB`."""

    def __init__(self, job: LocalJob, phase: Phase, index: int, lock: int) -> None:
        step, verb = job.step(phase, index), job.workload.verb(phase)
        self.index = index
        self.phase, self.log, self.end = phase, job.log(step), job.end(step)
        self.folder = tempfile.TemporaryDirectory(prefix="luthier-", ignore_cleanup_errors=True)
        for parent in (self.log.parent, self.end.parent):
            parent.mkdir(parents=True, exist_ok=True)
        self.end.unlink(missing_ok=True)
        own = {
            Variables.RUN_DIR: self.folder.name,
            Variables.TERMINATION_LOG: str(self.end),
            Variables.NODE_RANK: str(index),
        }
        with self.log.open("ab") as output:
            self.log_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "luthier_trainer", verb, "--run", str(job.run_file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=job.environment(phase, index) | own,
                # A session of its own: Ctrl-C must reach the supervisor once, from us, and not its workers too.
                start_new_session=True,
                pass_fds=(lock,),
            )

    def samples(self) -> dict[str, float]:
        """Its metrics. Empty while it serves none."""
        try:
            port = int((Path(self.folder.name) / PORT_FILE).read_text())
            answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=2, trust_env=False)
            return read_samples(answer.text)
        except (OSError, ValueError, httpx.HTTPError):
            return {}

    def stop(self) -> None:
        """Ask for a checkpoint and an end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything below it at once."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def message(self) -> TerminationMessage:
        """Its last word. One that died without any gets a message of our own."""
        code = self.process.wait()
        self.folder.cleanup()
        said = TerminationMessage.read(self.end.read_text(errors="replace") if self.end.exists() else None)
        if said is not None:
            return said
        killed = code < 0 or code > 128
        ours = ExitCode.of(code) or (ExitCode.INFRASTRUCTURE_ERROR if killed else ExitCode.TRAINING_ERROR)
        how = f"was killed by signal {-code if code < 0 else code - 128}" if killed else f"ended with {code}"
        message = f"the supervisor {how} and left no message; see {self.log}"
        return TerminationMessage(
            phase=self.phase, code=ours, reason=ours.reason, message=message, last_lines=self.tail()
        )

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of what this process wrote."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            text = file.read().decode(errors="replace")
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, deepest first. The supervisor puts its workers into groups of their own, so a group is not
    enough.
    """
    try:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)

    def below(parent: int) -> list[int]:
        return [p for child in children.get(parent, []) for p in (*below(child), child)]

    return below(pid)
