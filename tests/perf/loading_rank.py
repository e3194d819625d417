"""A process of `perf.loading`: a training that notes when it has loaded its model, has trained, and has saved."""

from __future__ import annotations

import ctypes
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from perf.loading import FILE_BYTES, MARKS, held
from transformers import TrainerCallback

from luthier_api.run import read_run
from luthier_api.variables import Variables
from luthier_trainer import worker
from luthier_trainer.models.saving import write_weights
from luthier_trainer.runtime.run_folder import global_rank, run_dir
from luthier_trainer.training import main as training
from luthier_trainer.training import resilience


class Marks(TrainerCallback):
    """Phase → when it ended, by the clock of the machine."""

    def __init__(self) -> None:
        self.ended: dict[str, float] = {}
        self.loaded = 0
        """Bytes that the process needs once the model is loaded."""
        self.loop: Any = None

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self.ended["loading"] = time.monotonic()
        # What torch has freed, and the C library keeps for later, is given back first.
        ctypes.CDLL(None).malloc_trim(0)
        self.loaded = held(os.getpid())[0]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended["beginning"] = time.monotonic()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended["training"] = time.monotonic()


def main() -> None:
    run = read_run(Path(os.environ[Variables.RUN]).read_bytes())
    worker.load("train", run)
    vars(resilience)["write_weights"] = partial(write_weights, file_bytes=FILE_BYTES)
    marks = Marks()
    training.main(run, [marks])
    marks.ended["saving"] = time.monotonic()
    path = run_dir() / MARKS.format(rank=global_rank())
    path.write_text(json.dumps({"pid": os.getpid(), "ended": marks.ended, "loaded": marks.loaded}))
    worker.leave(0)


if __name__ == "__main__":
    main()
