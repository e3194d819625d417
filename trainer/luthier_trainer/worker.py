"""A process of a phase: `python -m luthier_trainer.worker train`. Its result is a termination message.

PID 1 (`supervisor`) starts it; for training in several processes `accelerate launch` does. The verb's module is
imported here, so that a failed import is reported like any other failure, and each verb imports only what it needs.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from luthier_api.optimizers import OPTIMIZERS
from luthier_api.run import FineTuneRun, GenerateRun, read_run, runs_code
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.distributed.strategy import uses_deepspeed
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.classify import classify
from luthier_trainer.runtime.commands import MODULES, VERBS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import announce, global_rank, run_dir, stacks_file, write_result
from luthier_trainer.runtime.undumpable import hide_process
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.model_files import MODEL_CONFIG
from luthier_trainer.workspace.prepared import read_prepared

Work = Callable[[FineTuneRun | GenerateRun], TerminationMessage]


def main(verb: str) -> NoReturn:
    """Run the verb, write the message for the supervisor, and end the process."""
    announce()
    # The supervisor asks a process that hangs for its stacks. The file stays open: the handler has only its number.
    stacks = stacks_file(run_dir(), global_rank()).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks)
    volume = None
    try:
        run = read_run(Path(os.environ[Variables.RUN]).read_bytes())
        volume = Path(run.workspace)
        if VERBS[verb] == "prepare" and runs_code(run):
            hide_process()
        message = load(verb, run)(run)
    except BaseException as error:
        if not isinstance(error, Failure):
            traceback.print_exc()
        code, text = classify(error, volume)
        failed = TerminationMessage(phase=VERBS[verb], code=code, reason=code.reason, message=text, rank=global_rank())
        write_result(with_tracked_runs(with_notices(failed), volume))
        leave(code)
    write_result(with_tracked_runs(with_notices(message), volume))
    atexit._run_exitfuncs()  # workers of data loaders, temporary folders
    leave(0)


def with_notices(message: TerminationMessage) -> TerminationMessage:
    """`message` with the notices of this process, unless it brings its own."""
    return message if message.notices else message.model_copy(update={"notices": notices.given()})


def with_tracked_runs(message: TerminationMessage, workspace: Path | None) -> TerminationMessage:
    """`message` of a training with where trackers show it. What cannot be read is left out: it must not hide how the
    process ended.
    """
    if message.phase != "run" or workspace is None:
        return message
    try:
        found = tracked_runs.read(WorkspaceFolder(workspace).tracking)
    except (OSError, ValueError) as error:
        print(f"spec.tracking: {type(error).__name__}: {error}", flush=True)
        return message
    return message.model_copy(update={"tracking": found or None})


def leave(code: int) -> NoReturn:
    """End the process, and the threads that libraries left in it, without taking the interpreter down first.

    A thread in a collective that can never finish would keep the interpreter alive. And gloo's threads let go of the
    last collective's tensors a moment after it is done: where the interpreter is ending by then, they abort the process
    (pytorch issue 190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def load(verb: str, run: FineTuneRun | GenerateRun) -> Work:
    """`main` of the verb's module. What libraries would import for no use of this process is hidden from them."""
    if VERBS[verb] == "run":
        hide(*(package for package, used in OPTIONAL.items() if not used(run)))
    hidden = hide("scipy") if verb == "train" else []
    # Nearly all objects that imports create stay alive, so that collecting garbage meanwhile only costs time.
    gc.disable()
    work: Work = import_module(MODULES[verb]).main
    gc.enable()
    gc.freeze()
    for package in hidden:  # metrics of some tasks use it
        del sys.modules[package]
    return work


def hide(*packages: str) -> list[str]:
    """Make `packages` look as if they were not installed, unless they are imported already. Returns the hidden ones."""
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None marks a module that cannot be imported
    return hidden


def needs_bitsandbytes(run: FineTuneRun | GenerateRun) -> bool:
    """Whether the optimizer is one of bitsandbytes, or the base model's weights are, or will be, in fewer bits than
    torch knows types for. Raises Failure.
    """
    if isinstance(run, FineTuneRun) and (
        run.spec.model.quantization or OPTIMIZERS[run.spec.training.optimizer].bitsandbytes
    ):
        return True
    config = Path(read_prepared(run).model_path) / MODEL_CONFIG
    return config.exists() and "quantization_config" in json.loads(config.read_text())


def needs_deepspeed(run: FineTuneRun | GenerateRun) -> bool:
    return isinstance(run, FineTuneRun) and uses_deepspeed(read_prepared(run).plan.strategy)


OPTIONAL: Mapping[str, Callable[[FineTuneRun | GenerateRun], bool]] = {
    "bitsandbytes": needs_bitsandbytes,
    "deepspeed": needs_deepspeed,
}
"""Package → whether a process uses it. PEFT and accelerate import these wherever they are installed; bitsandbytes takes
torch's compiler along. scipy, beside them, is imported by transformers for the losses of models that detect objects.
"""

if __name__ == "__main__":
    main(sys.argv[1])
