"""Several trainings, one after another, in one start of a group of processes: `python -m accelerate.commands.launch ...
--module trainer.distributed.one_after_another`.

A start costs each process seven seconds of imports, a training of a few steps less than one. The variable FOLDERS names
the run folder of each training, with its run.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from luthier_api.run import read_run
from luthier_api.variables import Variables
from luthier_trainer import worker
from luthier_trainer.runtime.run_folder import write_result

FOLDERS = "LUTHIER_TEST_RUN_FOLDERS"
FIXED = "fixed-completions"
"""A file in the folder of a run whose completions follow from their prompts."""


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


def main() -> None:
    """Train each run, and leave its message in its run folder, as the worker does for one."""
    folders = os.environ[FOLDERS].split(os.pathsep)
    runs = {folder: read_run((Path(folder) / "run.json").read_bytes()) for folder in folders}
    # `worker.load` keeps it from being imported by the runs that do not need it, in processes that do nothing else.
    quantises = import_module("bitsandbytes") if any(map(worker.needs_bitsandbytes, runs.values())) else None
    for folder, run in runs.items():
        os.environ[Variables.RUN_DIR] = folder
        print(begins(Path(folder)), end="", flush=True)
        own = GRPOTrainer._generate_single_turn
        if (Path(folder) / FIXED).exists():
            fix_completions(setattr)
        work = worker.load("train", run)
        if quantises:
            sys.modules["bitsandbytes"] = quantises
        write_result(work(run))
        GRPOTrainer._generate_single_turn = own
    worker.leave(0)


if __name__ == "__main__":
    main()
