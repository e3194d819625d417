"""What PID 1 does with a valid run config: it starts the phase's process, watches for hangs and signals, and judges how
the process ended.

SIGTERM is never forwarded: it becomes a file that all ranks agree on once a step, so that they save the same
checkpoint. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, grace_of, runs_code
from luthier_api.secrets import VARIABLES, variables_of
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_trainer.distributed import launch
from luthier_trainer.runtime.commands import VERBS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE
from luthier_trainer.runtime.run_folder import PROCESS, STACKS, STOP_FILE, processes, run_dir
from luthier_trainer.runtime.undumpable import hide_process
from luthier_trainer.supervisor import oom, preflight, stacks
from luthier_trainer.supervisor.hang import HeartbeatWatch, StepLimit
from luthier_trainer.supervisor.process_tree import Child, with_report
from luthier_trainer.supervisor.signals import Stop
from luthier_trainer.supervisor.verdict import Evidence, judge
from luthier_trainer.workspace import space
from luthier_trainer.workspace.prepared import read_prepared

HUB = "https://huggingface.co"
STALE = (
    STOP_FILE,
    STARTING_FILE,
    HEARTBEAT_FILE,
    "metrics-port",
    "result-*.json",
    "result-*.partial",
    f"{PROCESS}*",
    f"{STACKS}*",
)
TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Settings:
    """What the pod sets beside the run config. The defaults are those of a cluster."""

    run_dir: Path
    node_rank: int
    peer_lost_linger: float
    """Seconds to wait before a lost peer is reported, so that the operator sees the pod that caused it fail first."""
    cgroup: Path

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        def number(name: str, default: float) -> float:
            """The number in a variable. Raises Failure if it is none."""
            try:
                return float(environment.get(name) or default)
            except ValueError:
                raise Failure(ExitCode.MISCONFIGURED, f"{name}: {environment[name]!r} is not a number") from None

        return cls(
            run_dir=run_dir(),
            node_rank=int(number(Variables.NODE_RANK, 0)),
            peer_lost_linger=number("LUTHIER_PEER_LOST_LINGER", 20),
            cgroup=Path(environment.get("LUTHIER_CGROUP") or oom.CGROUP),
        )


def main(verb: str, run: FineTuneRun | GenerateRun, path: Path, stop: Stop) -> TerminationMessage:
    """Check that the phase can start, then supervise it. `path`: the file of the run config. Raises Failure."""
    settings = Settings.of(os.environ)
    if VERBS[verb] == "prepare" and runs_code(run):
        hide_process()  # the other phases have no credentials, or run no code
    preflight.check(verb, run)
    return supervise(verb, run, path, settings, stop)


def command(verb: str, run: FineTuneRun | GenerateRun, node_rank: int) -> list[str]:
    """Arguments of the phase's own process."""
    if verb == "train":
        assert isinstance(run, FineTuneRun)
        return launch.command(run, read_prepared(run), node_rank)
    return [sys.executable, "-m", launch.MODULE, verb]


def environment(verb: str, run: FineTuneRun | GenerateRun, path: Path, settings: Settings) -> dict[str, str]:
    """Environment of the phase's process, with the credentials of its phase alone. Only `prepare` and `publish` may
    connect to the Hub.
    """
    phase = VERBS[verb]
    others = VARIABLES - variables_of(phase)
    given = {name: value for name, value in os.environ.items() if name not in others} | {
        Variables.RUN: str(path),
        Variables.RUN_DIR: str(settings.run_dir),
        Variables.NODE_RANK: str(settings.node_rank),
        "PYTHONUNBUFFERED": "1",  # otherwise the last lines before a SIGKILL would be lost
        "PYTHONFAULTHANDLER": "1",
    }
    if urlsplit(given.get("HF_ENDPOINT") or HUB).hostname != urlsplit(HUB).hostname:
        # Most mirrors do not support Xet; without it the client uploads by LFS, which all of them support.
        given.setdefault("HF_HUB_DISABLE_XET", "1")
    if phase == "run":
        given["HF_HUB_OFFLINE"] = "1"
    if verb == "train":
        assert isinstance(run, FineTuneRun)
        given |= launch.environment(run, read_prepared(run), settings.node_rank)
    return given


def supervise(
    verb: str, run: FineTuneRun | GenerateRun, path: Path, settings: Settings, stop: Stop
) -> TerminationMessage:
    """Run the phase's process and judge its end."""
    for pattern in STALE:
        for file in settings.run_dir.glob(pattern):
            file.unlink()
    memory_kills = oom.oom_kills(settings.cgroup)
    child = Child(command(verb, run, settings.node_rank), environment(verb, run, path.resolve(), settings))
    plan = read_prepared(run).plan if VERBS[verb] == "run" else None
    heartbeat = HeartbeatWatch(settings.run_dir, StepLimit.of(run, plan))
    grace = grace_of(run.spec, plan, run.grace_seconds)
    # Of a short grace period, at least half is for the checkpoint.
    patience = grace - min(space.TEARDOWN_SECONDS, grace / 2)
    killed: Literal["stop", "grace", "hang"] | None = None
    where: list[stacks.Position] = []
    while not child.ended:
        for rank, pid in processes(settings.run_dir).items():
            child.watch(rank, pid)
        child.listen(TICK_SECONDS)
        if stop.at is not None:
            if VERBS[verb] != "run":
                killed = "stop"  # nothing to save: the next start continues where this one stopped
                child.kill()
            elif stop.now or time.monotonic() > stop.at + patience:
                killed = "grace"
                child.kill()
            else:
                (settings.run_dir / STOP_FILE).touch()
        elif VERBS[verb] == "run" and heartbeat.lost():
            killed = "hang"
            where = stacks.positions(child, settings.run_dir)
            child.kill()
    deaths = tuple(child.deaths)
    child.kill()  # what is left of the tree: torch's agent may have been killed, which its ranks do not notice
    child.drain()
    assert child.status is not None
    verdict = judge(
        Evidence(
            phase=VERBS[verb],
            status=child.status,
            messages=read_results(settings.run_dir),
            processes=run.spec.resources.processes if isinstance(run, FineTuneRun) and verb == "train" else 1,
            stopped=stop.at is not None,
            killed=killed,
            silence=heartbeat.silence,
            last_step=heartbeat.step,
            positions=where,
            deaths=with_report(deaths, child.tail.text()),
            memory_limit=run.spec.resources.memory,
            memory_kills=oom.oom_kills(settings.cgroup) - memory_kills,
            gpu_error=child.tail.gpu_error,
        )
    )
    if has_other_pods(run) and (verdict.code == ExitCode.PEER_LOST or is_waiting_for_others(killed, where)):
        until = time.monotonic() + settings.peer_lost_linger
        while time.monotonic() < until:
            if stop.at is not None:
                # The cluster has seen the cause, and is stopping the rest of the group.
                return verdict.model_copy(
                    update={
                        "code": int(ExitCode.PREEMPTED),
                        "reason": ExitCode.PREEMPTED.reason,
                        "saved": False,
                        "last_lines": child.tail.text(),
                    }
                )
            time.sleep(TICK_SECONDS)
    lines = "" if verdict.code == ExitCode.COMPLETED else child.tail.text()
    return verdict.model_copy(update={"last_lines": lines})


def has_other_pods(run: FineTuneRun | GenerateRun) -> bool:
    """Whether pods other than this one are of the same group, one of which may have caused a failure here."""
    return isinstance(run, FineTuneRun) and run.spec.resources.nodes > 1


def is_waiting_for_others(killed: str | None, where: Sequence[stacks.Position]) -> bool:
    """Whether the run hung, and no process of this pod is known to be the one that the others wait for."""
    return killed == "hang" and all(position.answered for position in where)


def read_results(run_dir: Path) -> dict[int, TerminationMessage]:
    """The messages that the ranks of this pod left, by global rank."""
    found = {}
    for file in run_dir.glob("result-*.json"):
        message = TerminationMessage.read(file.read_text(errors="replace"))
        if message is not None:
            found[int(file.stem.removeprefix("result-"))] = message
    return found
