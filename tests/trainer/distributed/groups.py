"""Runs that several processes train one after another, after one start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prepared_workspace import pod
from trainer.distributed import one_after_another

from luthier_api.run import FineTuneRun
from luthier_api.termination import TerminationMessage
from luthier_trainer.distributed import launch
from luthier_trainer.distributed.strategy import deepspeed_config
from luthier_trainer.supervisor.dead_locks import remove_dead_locks

TIMEOUT = 600  # of one start, on a machine that has other things to do
BUILD_SECONDS = 900


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def divided(strategy: str, *settings: Any) -> dict[str, Any]:
    """DeepSpeed's configuration, with which it treats small models as large ones.

    ZeRO-3 would keep weights of less than 100,000 numbers whole, and any that are used again within 1e9 numbers.
    """
    config = deepspeed_config(strategy, *settings)
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    config["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}
    return config


@dataclass(frozen=True)
class Group:
    """Runs that two processes train one after another. Each has a run folder of its name."""

    folder: Path
    runs: dict[str, FineTuneRun]

    def train(self, timeout: float = TIMEOUT) -> int:
        """Start the processes once, wait for their end, and return their exit code: 0 if no training has failed."""
        for name, run in self.runs.items():
            (self.folder / name / "run.json").write_text(json.dumps(run.dump()))
        variables = {
            one_after_another.FOLDERS: os.pathsep.join(str(self.folder / name) for name in self.runs),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "MODULE", one_after_another.__name__)
            patch.setattr(launch, "deepspeed_config", divided)
            with pod(next(iter(self.runs.values())), self.folder / "pod", **variables) as process:
                return process.wait(timeout)

    def train_all(self) -> None:
        """The same, and none may fail."""
        code = self.train()
        log = (self.folder / "pod/log").read_text()
        assert code == 0, f"in a training that begins in this log: {log[log.find('Traceback') - 1000 :][:5000]}"

    def ends(self, name: str) -> list[TerminationMessage]:
        """The messages of both ranks."""
        files = sorted((self.folder / name).glob("result-*.json"))
        return [TerminationMessage.model_validate_json(file.read_bytes()) for file in files]

    def log(self, name: str) -> str:
        """What both ranks wrote from the beginning of this run to that of the next."""
        text = (self.folder / "pod/log").read_text()
        begin = text.index(one_after_another.begins(self.folder / name))
        others = [text.find(one_after_another.begins(self.folder / other)) for other in self.runs if other != name]
        return text[begin : min((at for at in others if at > begin), default=len(text))]


def compile_operator(name: str) -> None:
    """Compile an operator of DeepSpeed for CPU, where torch has not kept it from an earlier time."""
    load = f"from deepspeed.ops.op_builder.cpu import {name}Builder; {name}Builder().load()"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    remove_dead_locks()
    subprocess.run(
        [sys.executable, "-c", load],
        env=os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu"},
        check=True,
        capture_output=True,
        timeout=BUILD_SECONDS,
    )
