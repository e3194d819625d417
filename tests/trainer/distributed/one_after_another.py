"""Several trainings, one after another, in one start of a group of processes: `python -m accelerate.commands.launch ...
--module trainer.distributed.one_after_another`.

A start costs each process seven seconds of imports, a training of a few steps less than one. After one that fails the
next one begins, and the processes end with 1. The variable FOLDERS names
the run folder of each training, with its run.json.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
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

LOADED = "loaded.safetensors"
"""A file in the folder of a run with ZeRO-3. Its first process writes all weights to it, as they are before a step."""


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


class Loaded(TrainerCallback):
    """Writes the weights of a model that ZeRO-3 has divided among the processes."""

    loop: Any

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        found: dict[str, torch.Tensor] = {}
        for name, weight in self.loop.model.named_parameters():
            assert weight.ds_tensor.numel() == math.ceil(weight.ds_numel / self.loop.args.world_size), name
            with deepspeed.zero.GatheredParameters([weight]):
                found[name] = weight.detach().clone()
        if self.loop.is_world_process_zero():
            save_file(found, self.path)


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
                loaded = Path(folder) / LOADED
                write_result(work(run, [Loaded(loaded)]) if loaded.exists() else work(run))
        except Exception:
            traceback.print_exc()
            failed = True
        GRPOTrainer._generate_single_turn = own
        resilience.write_weights = write_weights
    worker.leave(int(failed))


if __name__ == "__main__":
    main()
