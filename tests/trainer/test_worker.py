"""The process of a phase: what it imports, and that every end has a message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from luthier_api.methods import STRATEGIES
from luthier_api.optimizers import OPTIMIZERS
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.status import TrackedRun
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.worker import needs_bitsandbytes, needs_deepspeed
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.prepared import FINGERPRINT, fingerprint, write_prepared


def python(code: str, run: FineTuneRun, folder: Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, with `run` as its run config."""
    (folder / "run.json").write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    variables = {Variables.RUN: str(folder / "run.json"), Variables.RUN_DIR: str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def prepared(run: FineTuneRun, model: Path, config: dict[str, Any], strategy: str = "none") -> FineTuneRun:
    """`run`, as if `prepare` had found a model with this config.json."""
    folder = WorkspaceFolder(Path(run.workspace))
    folder.prepared.mkdir(parents=True)
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (folder.prepared / FINGERPRINT).write_text(fingerprint(run))
    write_prepared(
        run,
        PreparedRecord.model_validate(
            {
                "model": {"source": "m"},
                "dataset": {"source": "d", "rows": 1},
                "plan": {"strategy": strategy, "worldSize": 1},
                "modelPath": str(model),
                "datasetPath": "d",
            }
        ),
    )
    return run


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    expect: bool
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


NEEDS_BITSANDBYTES = [
    Case(
        name="full",
        method="full",
        expect=False,
    ),
    Case(
        name="adapters on plain weights",
        method="lora",
        config={"model_type": "llama"},
        expect=False,
    ),
    Case(
        name="weights that are quantised at loading",
        method="qlora",
        expect=True,
    ),
    Case(
        name="weights that lora has quantised at loading",
        method="lora",
        model={"quantization": {"type": "int8"}},
        expect=True,
    ),
    Case(
        name="weights that came quantised",
        method="lora",
        config={"quantization_config": {"quant_method": "bitsandbytes"}},
        expect=True,
    ),
    *(
        Case(
            name=f"optimizer {name}",
            method="full",
            training={"optimizer": name},
            expect="8bit" in name or "lion" in name,
        )
        for name in OPTIMIZERS
    ),
]


@pytest.mark.parametrize("case", NEEDS_BITSANDBYTES, ids=lambda case: case.name)
def test_what_needs_bitsandbytes(make_run: Any, tmp_path: Path, case: Case) -> None:
    run = make_run(method={"type": case.method}, model={"path": "/m"} | case.model, training=case.training)
    assert needs_bitsandbytes(prepared(run, tmp_path / "model", case.config)) is case.expect


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_needs_deepspeed(make_run: Any, tmp_path: Path, strategy: str) -> None:
    run = prepared(make_run(), tmp_path / "model", {}, strategy=strategy)
    assert needs_deepspeed(run) is strategy.startswith("zero")


@pytest.mark.slow
def test_a_plain_training_imports_nothing_that_it_does_not_use(make_run: Any, tmp_path: Path) -> None:
    """bitsandbytes takes torch's compiler along: together they are a quarter of a training process's start."""
    code = """
import os, sys
from pathlib import Path
from luthier_api.run import read_run
from luthier_trainer import worker
worker.load("train", read_run(Path(os.environ["LUTHIER_RUN"]).read_bytes()))
import gc, peft, torch
from accelerate.utils import extract_model_from_parallel
extract_model_from_parallel(torch.nn.Linear(1, 1))  # as Trainer does at a save
unused = ("bitsandbytes", "torch._inductor.compile_fx", "deepspeed", "scipy", "httpx")
print([name for name in unused if sys.modules.get(name)], gc.isenabled())
import scipy.signal  # for metrics
"""
    run = prepared(make_run(method={"type": "lora"}), tmp_path / "model", {})
    assert python(code, run, tmp_path).stdout.strip() == "[] True"


def test_an_import_that_fails_is_an_end_like_any_other(make_run: Any, tmp_path: Path) -> None:
    code = "import sys; sys.modules['datasets'] = None\nfrom luthier_trainer import worker; worker.main('prepare')"
    ended = python(code, make_run(), tmp_path)
    message = TerminationMessage.read((tmp_path / "result-0.json").read_text())
    assert message is not None
    assert (ended.returncode, message.code, message.phase) == (70, 70, "prepare")
    assert message.message.startswith("ModuleNotFoundError: import of datasets halted")
    assert "Traceback" in ended.stderr


GOOD_END = """
import atexit, threading, time
from luthier_api.exitcodes import ExitCode
from luthier_api.termination import TerminationMessage
from luthier_trainer import worker

def work(run):
    threading.Thread(target=time.sleep, args=(3600,)).start()
    atexit.register(print, "the loaders' workers have ended")
    print("done")
    return TerminationMessage(phase="prepare", code=ExitCode.COMPLETED, reason="Completed", message="", rank=0)

worker.load = lambda verb, run: work
worker.main("prepare")
"""


def test_a_thread_that_a_library_left_behind_does_not_outlive_a_good_end(make_run: Any, tmp_path: Path) -> None:
    """It would hold the interpreter, or abort the process while the interpreter ends, as gloo's threads did once in
    fifteen runs.
    """
    ended = python(GOOD_END, make_run(), tmp_path, timeout=60)
    message = TerminationMessage.read((tmp_path / "result-0.json").read_text())
    assert message is not None
    assert (ended.returncode, message.code) == (0, 0)
    assert ended.stdout.splitlines() == ["done", "the loaders' workers have ended"]


TRACKED = GOOD_END.replace('phase="prepare"', 'phase="run"').replace('main("prepare")', 'main("train")')


def test_the_end_of_a_training_says_where_trackers_show_it(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    folder = WorkspaceFolder(Path(run.workspace)).tracking
    shown = [
        TrackedRun(type="mlflow", url="http://mlflow/#/experiments/1/runs/a", run="a"),
        TrackedRun(type="tensorboard", run="tracking/tensorboard/tune"),
    ]
    for tracked in shown:
        tracked_runs.keep(folder / tracked.type, tracked.type, tracked.run, tracked.url)
    python(TRACKED, run, tmp_path, timeout=60)
    message = TerminationMessage.read((tmp_path / "result-0.json").read_text())
    assert message is not None
    assert message.tracking == shown


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, luthier_trainer.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
