"""Runs the phases of a job on this machine: starts their processes, watches, stops and resumes them.

Steps that have succeeded are not run again: each leaves its termination message in the folder of the job.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from luthier_api.exitcodes import ERROR_RANK, ExitCode
from luthier_api.status import Phase, Prepared, Progress, TrackedRun
from luthier_api.termination import TerminationMessage
from luthier_cli.local import LocalJob
from luthier_cli.manifests import Refused
from luthier_cli.supervised import Supervised

POLL_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
PEER_SECONDS = 20  # after a node has failed, the others wait in a collective; this long they may report it themselves
LOCK = ".lock"


class Watcher(Protocol):
    """What is notified while a job runs."""

    def began(self, phase: Phase, detail: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def ended(self, phase: Phase, message: TerminationMessage) -> None: ...
    def stopping(self, hard: bool) -> None: ...


@dataclass
class Outcome:
    """How one job ended."""

    job: LocalJob
    state: str = "Pending"
    """Complete, Planned, Suspended, Stopped, Failed or NotRun."""
    message: TerminationMessage | None = None
    """Of the step that ended the job, unless it succeeded."""
    prepared: Prepared | None = None
    metrics: dict[str, float] | None = None
    hub: dict[str, object] | None = None
    tracking: list[TrackedRun] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """Of all phases that have ended, each notice once."""
    finished_before: bool = False
    """Whether an earlier call has finished the job, so that nothing was run now."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase → how long it took in this call."""

    @property
    def code(self) -> int:
        return int(self.message.code) if self.message else 0

    @property
    def finished(self) -> bool:
        return self.state in ("Complete", "Planned", "Suspended")

    def _reason(self) -> str | None:
        if self.message:
            return self.message.reason
        return ExitCode.COMPLETED.reason if self.state == "Complete" else None

    def document(self) -> dict[str, Any]:
        """The entry of this job in the output of `-o json`."""
        end = self.message
        return {
            "name": self.job.name,
            "kind": self.job.kind.value,
            "file": self.job.manifest.file,
            "state": self.state,
            "code": self.code,
            "reason": self._reason(),
            "message": end.message if end else None,
            "lastLines": end.last_lines if end else None,
            "folder": str(self.job.folder.root),
            "result": str(self.job.folder.result) if self.state == "Complete" else None,
            "finishedBefore": self.finished_before,
            "prepared": self.prepared.dump() if self.prepared else None,
            "metrics": self.metrics,
            "hub": self.hub,
            "tracking": [run.dump() for run in self.tracking],
            "notices": self.notices,
            "seconds": {phase: round(took, 2) for phase, took in self.seconds.items()},
            "logs": [str(p) for p in sorted(self.job.log("x").parent.glob("*.log"))],
        }


class Stop:
    """Counts Ctrl-C and SIGTERM: the first stops the job after a checkpoint, the second stops it at once."""

    def __init__(self) -> None:
        self.count = 0

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        before = {number: signal.signal(number, self._count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def only_one(job: LocalJob) -> Iterator[int]:
    """Lock the folder of `job`. The supervisors inherit the lock, so it is free only when the last of them has ended.

    Raises Refused if the folder cannot be used, or is locked.
    """
    root = job.folder.root
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o664)
    except OSError as error:
        raise Refused(
            [f"--workspace: {root} cannot be used as a folder: {error.strerror}; choose another one"],
            ExitCode.MISCONFIGURED,
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                [
                    f"{job.manifest.file}: another luthier process is working in {root}; wait for it, or use another"
                    " --workspace"
                ],
                ExitCode.STORAGE_ERROR,
            ) from None
        yield handle
    finally:
        os.close(handle)


def run_job(job: LocalJob, watcher: Watcher, stop: Stop, *, plan_only: bool = False, fresh: bool = False) -> Outcome:
    """Run the phases of `job` until one does not succeed. Raises Refused if nothing could be started."""
    with only_one(job) as lock:
        if fresh:
            _empty(job)
        job.write_run()
        outcome = Outcome(
            job, finished_before=all(_done(job, phase, group) for phase in job.phases for group in _groups(job, phase))
        )
        spec = job.manifest.job.spec
        if spec.suspend and not plan_only:
            outcome.state = "Suspended"
            return outcome
        for phase in job.phases:
            started = time.monotonic()
            end = _run_phase(job, phase, watcher, stop, lock)
            outcome.seconds[phase] = time.monotonic() - started
            outcome.notices += [text for text in end.notices if text not in outcome.notices]
            outcome.prepared = end.prepared or outcome.prepared
            outcome.metrics = end.metrics or outcome.metrics
            outcome.tracking = end.tracking or outcome.tracking
            outcome.hub = end.hub.dump() if end.hub else outcome.hub
            if end.code != ExitCode.COMPLETED:
                outcome.message = end
                outcome.state = "Stopped" if end.code == ExitCode.PREEMPTED else "Failed"
                return outcome
            if phase == "prepare" and (plan_only or spec.plan_only):
                outcome.state = "Planned"
                return outcome
        outcome.state = "Complete"
        return outcome


def _groups(job: LocalJob, phase: Phase) -> list[list[int]]:
    return job.workload.groups if phase == "run" else [[0]]


def _run_phase(job: LocalJob, phase: Phase, watcher: Watcher, stop: Stop, lock: int) -> TerminationMessage:
    groups = _groups(job, phase)
    ends: list[TerminationMessage] = []
    for number, group in enumerate(groups, 1):
        if done := _done(job, phase, group):
            ends.append(done)
            continue
        if stop.count:
            return _stopped(phase, "stopped before it started")
        detail = ""
        if len(groups) > 1:
            detail = f"shard {number} of {len(groups)}"
        elif len(group) > 1:
            detail = f"{len(group)} nodes"
        watcher.began(phase, detail)
        end = _run_group(job, phase, group, watcher, stop, lock)
        watcher.ended(phase, end)
        if end.code != ExitCode.COMPLETED:
            return end
        ends.append(end)
    if len(ends) == 1:
        return ends[0]
    notices = list(dict.fromkeys(text for end in ends for text in end.notices))
    by_shard = {group[0]: end.metrics or {} for group, end in zip(groups, ends, strict=True)}
    metrics = job.workload.final_metrics(by_shard)
    return ends[-1].model_copy(update={"metrics": metrics, "notices": notices})


def _run_group(
    job: LocalJob, phase: Phase, group: Sequence[int], watcher: Watcher, stop: Stop, lock: int
) -> TerminationMessage:
    """Run the processes of a group until the last one has ended. Returns the message that explains how it ended."""
    members = [Supervised(job, phase, index, lock) for index in group]
    ended: list[Supervised] = []
    asked = seen = 0
    looked, failed_at = 0.0, None
    while len(ended) < len(members):
        for member in members:
            if member not in ended and member.process.poll() is not None:
                ended.append(member)
                if member.process.returncode != 0:
                    failed_at = failed_at or time.monotonic()
        if stop.count != seen:
            seen = stop.count
            watcher.stopping(hard=seen > 1)
        late = failed_at is not None and time.monotonic() > failed_at + PEER_SECONDS
        if (seen or late) and not asked:
            asked = 1
            for member in members:
                member.stop()
        if seen > 1 or (failed_at is not None and time.monotonic() > failed_at + 2 * PEER_SECONDS):
            for member in members:
                if member.process.poll() is None:
                    member.kill()
        if phase == "run" and time.monotonic() > looked + PROGRESS_SECONDS:
            looked = time.monotonic()
            samples = {member.index: member.samples() for member in members if member not in ended}
            progress = job.workload.progress(samples, None)
            if progress:
                watcher.progress(progress)
        time.sleep(POLL_SECONDS)
    messages = [member.message() for member in ended]
    if stop.count > 1:
        return _stopped(phase, "stopped without saving a checkpoint; the same command resumes from the newest one")
    bad = [m for m in messages if m.code != ExitCode.COMPLETED]
    if bad:
        return min(bad, key=cause_rank)  # a node that lost its failed peer may have ended before the peer
    return next((m for m in messages if m.metrics or m.prepared or m.hub), messages[0])


def cause_rank(message: TerminationMessage) -> int:
    """`ExitCode.cause_rank` of a process."""
    code = message.exit_code
    return ERROR_RANK if code is None else code.cause_rank


def _done(job: LocalJob, phase: Phase, group: Sequence[int]) -> TerminationMessage | None:
    """The message of a group that has succeeded in an earlier call. None if it has to run."""
    files = [job.end(job.step(phase, index)) for index in group]
    messages = [TerminationMessage.read(f.read_text(errors="replace")) if f.exists() else None for f in files]
    if any(m is None or m.code != ExitCode.COMPLETED for m in messages):
        return None
    if phase == "prepare" and not job.folder.prepared_record.exists():
        return None
    if phase == "run" and not job.folder.result.exists():
        return None
    return next((m for m in messages if m and (m.metrics or m.prepared or m.hub)), messages[0])


def _stopped(phase: Phase, message: str) -> TerminationMessage:
    code = ExitCode.PREEMPTED
    return TerminationMessage(phase=phase, code=code, reason=code.reason, message=message)


def _empty(job: LocalJob) -> None:
    """Delete the files of earlier runs, except the lock. Raises Refused if luthier did not create the folder."""
    entries = [path for path in job.folder.root.iterdir() if path.name != LOCK]
    if entries and not job.run_file.exists():
        raise Refused(
            [
                f"--fresh: {job.folder.root} holds files but no {job.run_file.name}: luthier did not create it. Choose"
                " another --workspace"
            ]
        )
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
