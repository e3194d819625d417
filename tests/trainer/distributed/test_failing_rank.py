"""A rank of a real training under `accelerate launch` that is killed or stopped: PID 1 names it, and not its peer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import DatasetDict
from prepared_workspace import prepared_run

from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_trainer.runtime.run_folder import processes

TIMEOUT = 240  # of one start, on a machine that has other things to do


@dataclass(frozen=True)
class Case:
    name: str
    number: signal.Signals
    code: int
    message: str
    output: str


CASES = [
    Case(
        name="killed",
        number=signal.SIGKILL,
        code=71,
        message="rank 1 was killed by SIGKILL",
        output="run ended with 71",
    ),
    Case(
        name="stopped",
        number=signal.SIGSTOP,
        code=80,
        message=": rank 1 is stopped (by SIGSTOP or a frozen container), rank 0 is in ",
        output="most recent call first",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rank_that_failed_is_named(case: Case, tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    run = prepared_run(
        tmp_path / "job",
        llama,
        prose_data,
        port=port,
        training={"maxSteps": 10_000, "logSteps": 1},
        resources={"processesPerNode": 2},
    )
    run = run.model_copy(update={"step_timeout_seconds": 10})
    (tmp_path / "run.json").write_text(json.dumps(run.dump()))
    folder = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        pod = subprocess.Popen(
            [sys.executable, "-m", "luthier_trainer", "train", "--run", str(tmp_path / "run.json")],
            env=os.environ | {"LUTHIER_PEER_LOST_LINGER": str(TIMEOUT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + TIMEOUT
            while "step 3/" not in (tmp_path / "log").read_text():
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                assert pod.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            os.kill(processes(folder)[1], case.number)
            assert pod.wait(TIMEOUT) == case.code, (tmp_path / "log").read_text()
        finally:
            pod.terminate()
            pod.wait(TIMEOUT)
    ended = TerminationMessage.read(Path(os.environ[Variables.TERMINATION_LOG]).read_text())
    assert ended is not None
    assert (ended.rank, case.message in ended.message) == (1, True), ended.message
    assert case.output in (tmp_path / "log").read_text()
