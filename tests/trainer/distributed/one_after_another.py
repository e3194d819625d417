"""Several trainings, one after another, in one start of a group of processes: `python -m accelerate.commands.launch ...
--module trainer.distributed.one_after_another`.

A start costs each process seven seconds of imports, a training of a few steps less than one. After one that fails the
next one begins, and the processes end with 1. The variable FOLDERS names
the run folder of each training, with its run.json.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from luthier_api.run import read_run
from luthier_api.variables import Variables
from luthier_trainer import worker
from luthier_trainer.models.saving import write_weights
from luthier_trainer.runtime.run_folder import STOP_FILE, write_result
from luthier_trainer.training import resilience

FOLDERS = "LUTHIER_TEST_RUN_FOLDERS"
STOP_AT = "stop-at"
"""A file in the folder of a run that is told to stop in the step that it names."""
FIXED = "fixed-completions"
"""A file in the folder of a run whose completions follow from their prompts."""
SMALL_FILES, FILE_BYTES = "small-files", 100_000
"""A file in the folder of a run whose result is written in files of so many bytes, as that of a large model is."""


def begins(folder: Path) -> str:
    """The line with which the output of a training begins."""
    return f"training of {folder}\n"


def fix_completions(put: Callable[[Any, str, Any], None]) -> None:
    """Let completions follow from their prompt and their number among those of it. `put`: replaces an attribute."""

    def written(trainer: Any, prompts: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        first, generations = trainer.accelerator.process_index * len(prompts), trainer.num_generations
        numbers = [(first + i) % generations for i in range(len(prompts))]
        return [ids[: 1 + number] for ids, number in zip(prompts, numbers, strict=True)], None

    put(GRPOTrainer, "_generate_single_turn", written)


@contextmanager
def stopping(folder: Path) -> Iterator[None]:
    """Within it, a training whose run folder is `folder` is told to stop where the folder says so."""
    if not (folder / STOP_AT).exists():
        yield
        return
    from luthier_trainer.training import main as train
    from luthier_trainer.training.callbacks import Heartbeat

    last = int((folder / STOP_AT).read_text())

    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == last - 1:
                (folder / STOP_FILE).touch()

    train.Heartbeat = Flag  # type: ignore[misc]
    try:
        yield
    finally:
        train.Heartbeat = Heartbeat  # type: ignore[misc]


def main() -> None:
    """Train each run, and leave its message in its run folder, as the worker does for one."""
    folders = os.environ[FOLDERS].split(os.pathsep)
    runs = {folder: read_run((Path(folder) / "run.json").read_bytes()) for folder in folders}
    # `worker.load` keeps it from being imported by the runs that do not need it, in processes that do nothing else.
    quantises = import_module("bitsandbytes") if any(map(worker.needs_bitsandbytes, runs.values())) else None
    failed = False
    for folder, run in runs.items():
        os.environ[Variables.RUN_DIR] = folder
        print(begins(Path(folder)), end="", flush=True)
        own = GRPOTrainer._generate_single_turn
        if (Path(folder) / FIXED).exists():
            fix_completions(setattr)
        work = worker.load("train", run)
        if (Path(folder) / SMALL_FILES).exists():
            resilience.write_weights = partial(write_weights, file_bytes=FILE_BYTES)
        if quantises:
            sys.modules["bitsandbytes"] = quantises
        try:
            with stopping(Path(folder)):
                write_result(work(run))
        except Exception:
            traceback.print_exc()
            failed = True
        GRPOTrainer._generate_single_turn = own
        resilience.write_weights = write_weights
    worker.leave(int(failed))


if __name__ == "__main__":
    main()
