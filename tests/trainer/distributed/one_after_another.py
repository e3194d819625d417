"""Several trainings, one after another, in one start of a group of processes: `python -m accelerate.commands.launch ...
--module trainer.distributed.one_after_another`.

A start costs each process seven seconds of imports, a training of a few steps less than one. The variable FOLDERS names
the run folder of each training, with its run.json.
"""

from __future__ import annotations

import os
from pathlib import Path

from luthier_api.run import read_run
from luthier_api.variables import Variables
from luthier_trainer import worker
from luthier_trainer.runtime.run_folder import write_result

FOLDERS = "LUTHIER_TEST_RUN_FOLDERS"


def begins(folder: Path) -> str:
    """The line with which the output of a training begins."""
    return f"training of {folder}\n"


def main() -> None:
    """Train each run, and leave its message in its run folder, as the worker does for one."""
    for folder in os.environ[FOLDERS].split(os.pathsep):
        os.environ[Variables.RUN_DIR] = folder
        run = read_run((Path(folder) / "run.json").read_bytes())
        print(begins(Path(folder)), end="", flush=True)
        write_result(worker.load("train", run)(run))
    worker.leave(0)


if __name__ == "__main__":
    main()
