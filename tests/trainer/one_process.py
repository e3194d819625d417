"""`luthier run` in the process of a test, with the phases of its jobs.

A process of the trainer imports its libraries for ten seconds before it works for one. What a user's processes do
beside that work, test_quickstart shows.
"""

from __future__ import annotations

import json
import os
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from luthier_api.run import read_run
from luthier_api.status import Phase
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_cli import runner
from luthier_cli.commands import app
from luthier_cli.local import LocalJob
from luthier_cli.supervised import Supervised
from luthier_trainer import worker
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.commands import MODULES


class Worked:
    """In place of `Supervised`: the work of a process, done when it is made."""

    process = SimpleNamespace(poll=lambda: 0, returncode=0)

    def __init__(self, job: LocalJob, phase: Phase, index: int) -> None:
        step, self.index = job.step(phase, index), index
        log, end = job.log(step), job.end(step)
        for parent in (log.parent, end.parent):
            parent.mkdir(parents=True, exist_ok=True)
        run = read_run(job.run_file.read_bytes())
        notices.forget()
        with (
            log.open("a") as output,
            redirect_stdout(output),
            redirect_stderr(output),
            TemporaryDirectory() as folder,
            # What the work itself sets, such as HF_HUB_OFFLINE, is gone after it, too.
            mock.patch.dict(os.environ, {Variables.RUN_DIR: folder, Variables.NODE_RANK: str(index)}),
        ):
            done = import_module(MODULES[job.workload.verb(phase)]).main(run)
        self._message = worker.with_notices(done)
        end.write_text(json.dumps(self._message.dump()))

    def samples(self) -> dict[str, float]:
        return {}

    def message(self) -> TerminationMessage:
        return self._message


def start(job: LocalJob, phase: Phase, index: int, lock: int) -> Worked | Supervised:
    """The processes of a training in several ones are real."""
    several = phase == "run" and getattr(job.manifest.job.spec.resources, "processes", 1) > 1
    return Supervised(job, phase, index, lock) if several else Worked(job, phase, index)


def luthier_run(folder: Path, *manifests: str) -> list[dict[str, Any]]:
    """The jobs that `luthier run` with these manifests of `folder` ended with, as it prints them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runner, "Supervised", start)
        patch.setenv("OMP_NUM_THREADS", "1")
        done = CliRunner().invoke(app, ["run", *manifests, "--mount", "/data=data", "-o", "json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    jobs: list[dict[str, Any]] = json.loads(done.stdout)["jobs"]
    return jobs
