"""Runs the programs of a comparison in turns, and makes one document of what they report."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.variables import Variables
from luthier_trainer.workspace.prepared import read_prepared

OURS = "ours"
GO = "go"  # what a process that waits reads when it may go on
LOG_LINES = 15


@dataclass(frozen=True)
class Course:
    """How many steps are measured."""

    warmup: int = 10
    """Steps before the first block: they compile, allocate, and fill caches."""
    block: int = 10
    """Steps of a block."""
    rounds: int = 6
    """Blocks."""

    @property
    def steps(self) -> int:
        """All steps of the training. The last one is only begun, so that a block ends where the next would begin."""
        return self.warmup + self.block * self.rounds + 1


class Unmeasured(Exception):
    """A program could not be measured; the message says why."""


def environment(root: Path, run_file: Path, cpu: bool) -> dict[str, str]:
    """Return the environment of a process that is measured, or that prepares."""
    root.mkdir(parents=True, exist_ok=True)
    own = {
        Variables.RUN: str(run_file),
        Variables.RUN_DIR: str(root),
        Variables.TERMINATION_LOG: str(root / "termination.json"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # One core each: what a second thread gains depends on what else runs.
    return dict(os.environ) | own | ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if cpu else {})


def prepare(run: FineTuneRun | GenerateRun, root: Path, deadline: float) -> PreparedRecord:
    """Run the phase `prepare` as a pod does. Raises Unmeasured."""
    root.mkdir(parents=True, exist_ok=True)
    run_file = root / "run.json"
    run_file.write_text(json.dumps(run.dump()))
    log = root / "prepare.log"
    with log.open("w") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "luthier_trainer.worker", "prepare"],
                env=environment(root / "prepare", run_file, cpu=True),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, deadline - time.monotonic()),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unmeasured("prepare: no time is left") from None
    if done.returncode:
        raise Unmeasured(f"prepare: {last_lines(log)}")
    return read_prepared(run)


@dataclass
class Program:
    """A program that is measured, as a process."""

    name: str
    root: Path
    course: Course
    process: subprocess.Popen[str]
    log: Path
    events: queue.Queue[dict[str, Any]]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, run_file: Path, root: Path, course: Course, cpu: bool) -> Program:
        """Start the process, which imports what it needs and then waits."""
        log = root / f"{name}.log"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "luthier_trainer.bench.contestants",
                name,
                str(run_file),
                json.dumps(asdict(course)),
            ],
            env=environment(root / name, run_file, cpu),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        events: queue.Queue[dict[str, Any]] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                events.put(json.loads(line))
            events.put({"event": "ended"})

        threading.Thread(target=read, daemon=True).start()
        return cls(name, root, course, process, log, events)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{GO}\n")
        self.process.stdin.flush()

    def wait(self, wanted: str, deadline: float) -> dict[str, Any]:
        """Return the next event, which has to be `wanted`. Raises Unmeasured."""
        try:
            event = self.events.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            raise Unmeasured(f"{self.name}: no time is left") from None
        if event["event"] == wanted:
            return event
        raise Unmeasured(f"{self.name}: {event.get('message') or last_lines(self.log)}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def last_lines(log: Path) -> str:
    """Return the end of a log as one line."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:])[-1500:]


def take_turns(programs: Sequence[Program], course: Course, deadline: float) -> dict[str, str]:
    """Measure the programs, whose processes wait, and return why some could not be measured: name → reason.

    Raises Unmeasured if ours could not.
    """
    failed: dict[str, str] = {}
    running = list(programs)

    def attempt(program: Program, *events: str) -> None:
        """Let `program` go on until it has reported each of `events`."""
        try:
            program.go()
            for name in events:
                event = program.wait(name, deadline)
                if name == "block":
                    program.blocks.append(event)
                else:
                    program.memory |= {f"{name}{key}": value for key, value in event.items() if key != "event"}
        except (Unmeasured, BrokenPipeError) as error:
            program.end()
            running.remove(program)
            if program.name == OURS:
                raise Unmeasured(str(error)) from None
            failed[program.name] = str(error)

    try:
        for program in programs:
            attempt(program, "warm")
        for number in range(course.rounds):
            # In the order A B B A: what becomes slower or faster by and by concerns all in the same way.
            for program in (list(running), list(reversed(running)))[number % 2]:
                attempt(program, "block", *(["done"] if number == course.rounds - 1 else []))
    finally:
        for program in programs:
            program.end()
    return failed


def figures(program: Program, course: Course, tokens: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the medians of a program. `tokens`: (real, computed) of each block, the same for all programs."""
    walls = [block["wall"] for block in program.blocks]
    paces = [(real / wall, computed / wall) for (real, computed), wall in zip(tokens, walls, strict=False)]
    found: dict[str, Any] = {
        "secondsPerStep": rounded(statistics.median(walls) / course.block),
        "cpuSecondsPerStep": rounded(statistics.median(block["cpu"] for block in program.blocks) / course.block),
        "tokensPerSecond": rounded(statistics.median(real for real, _ in paces)),
        "computedTokensPerSecond": rounded(statistics.median(computed for _, computed in paces)),
        "peakBytes": program.memory["donepeak"],
        "peakBytesOfLoading": program.memory["warmpeak"],
    }
    if "donereserved" in program.memory:
        found["reservedBytes"] = program.memory["donereserved"]
    return found


def compared(ours: Program, peer: Program) -> dict[str, Any]:
    """Return what ours needs for each second of `peer`: the medians over the rounds, and how far the losses differ."""
    pairs = list(zip(ours.blocks, peer.blocks, strict=False))
    differences = [abs(o - p) for o, p in zip(ours.blocks[-1]["losses"], peer.blocks[-1]["losses"], strict=False)]
    return {
        **{
            title: rounded(statistics.median(o[key] / p[key] for o, p in pairs))
            for title, key in (("secondsRatio", "wall"), ("cpuSecondsRatio", "cpu"))
        },
        "cpuSecondsRatios": [rounded(o["cpu"] / p["cpu"]) for o, p in pairs],
        "largestLossDifference": rounded(max(differences, default=0.0)),
    }


def tokens_of(ours: Program) -> list[tuple[int, int]]:
    """Return (real, computed) tokens of each block: ours counts them, and all programs have the same rows."""
    return [(block["tokens"], block["computed"]) for block in ours.blocks]


def rounded(value: float) -> float:
    return float(f"{value:.5g}")
