"""One supervisor (`luthier_trainer`) as a process of this machine. Does what the kubelet does for a pod.

The process gets a temporary run folder, writes its output to a log and its termination message to a file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from luthier_api.exitcodes import SIGNALED, ending
from luthier_api.metrics import read_samples
from luthier_api.processes import descendants
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
                # In a session of its own: Ctrl-C must reach the supervisor only through `stop`, and never its workers.
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
        """Ask the process to save a checkpoint and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process and everything below it."""
        for pid in [*reversed(descendants(self.process.pid)), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def message(self) -> TerminationMessage:
        """Its termination message, once it has ended. A process that left none gets one from here."""
        code = self.process.wait()
        self.folder.cleanup()
        text = self.end.read_text(errors="replace") if self.end.exists() else None
        message = TerminationMessage.read(text)
        if message is not None:
            return message

        status = SIGNALED - code if code < 0 else code
        ended = ending(status)
        return TerminationMessage(
            phase=self.phase,
            code=ended.code,
            reason=ended.code.reason,
            message=f"the supervisor left no message: {ended.text} (exit code {status}); see {self.log}",
            last_lines=self.tail(),
        )

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines that this process wrote to its log."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            text = file.read().decode(errors="replace")
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])
