"""The run phase of a GenerateJob: makes the outputs of one shard of the prepared rows, and puts them into `result/`.

Row r belongs to shard r mod shards. Outputs are stored after each batch, so a shard that was killed continues where it
stopped, and a shard that is already complete ends at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import GENERATE_MAX_ROWS, GENERATE_ROWS, GENERATE_ROWS_PER_SECOND
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.samples import Output, Sample, read_rows
from luthier_trainer.generation.settings import settings
from luthier_trainer.generation.writing import Writer
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.run_folder import stop_requested
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.workspace.prepared import read_prepared

if TYPE_CHECKING:
    from luthier_trainer.generation.engines.base import Engine

# Samples are grouped into batches within a window of this many batches: enough to fill the groups, few enough to
# start soon.
WINDOW_BATCHES = 64
LOG_LINES = 20  # at most, for the whole shard


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Make the missing outputs of this shard, and return the termination message.

    Raises Failure if the shard cannot run, or if no row of the whole job can be made.
    """
    if not isinstance(run, GenerateRun):
        raise Failure(ExitCode.MISCONFIGURED, "generate: the run config is of a FineTuneJob; `train` runs those")
    # Everything is in the workspace. These pods may have no network, and a request to the Hub would wait for a timeout.
    os.environ["HF_HUB_OFFLINE"] = "1"
    started, spec, folder = time.monotonic(), run.spec, WorkspaceFolder(Path(run.workspace))
    record = read_prepared(run)
    index = shard_index(spec.shards)
    rows = list(read_rows(Path(record.dataset_path), spec.per_prompt))
    samples = [s for row in rows if row[0].row % spec.shards == index for s in row]

    from luthier_trainer.generation.hardware import find_hardware

    hardware = find_hardware(spec)
    task = engine_class(spec.task)
    # A job with fewer outputs than the batch size would compute unused rows. The size does not depend on the number of
    # shards.
    batch_size = min(spec.batch_size, sum(map(len, rows)))
    shard = Shard(
        folder,
        index,
        spec.shards,
        task.records,
        settings(run, record, hardware, batch_size),
        hardware.environment,
    )
    left = shard.resume(samples)
    telemetry = Telemetry()
    telemetry.set(GENERATE_MAX_ROWS, len(samples))
    telemetry.set(GENERATE_ROWS, len(shard.done))
    telemetry.serve(run.metrics_port)
    print(
        f"shard {index} of {spec.shards}: {len(samples)} outputs, {len(shard.done)} of them there, on"
        f" {hardware.environment}",
        flush=True,
    )
    # If all outputs of this shard failed, the rows of other shards are tried: the job fails only if no row can be made,
    # independent of how the rows are divided into shards.
    if left or shard.failed == len(samples) > 0:
        shard.open_result()
        with memory_explained():
            engine = task.load(run, record, hardware, batch_size)
            if not make(engine, shard, left, len(samples), telemetry):
                message = (
                    f"stopped with {len(shard.done)} of {len(samples)} outputs written; the rest follows when the job"
                    " resumes"
                )
                return ending(ExitCode.PREEMPTED, message, started, saved=True, step=len(shard.done))
            if shard.failed == len(samples) and all(
                engine.problem(row[0]) for row in rows if row[0].row % spec.shards != index
            ):
                raise Failure(
                    ExitCode.INVALID_DATASET,
                    f"spec.inputs: not one row can be worked on. First of them: {shard.first_error}",
                )
    seconds = time.monotonic() - started
    pace = len(left) / seconds
    metrics = shard.finish(
        {
            "rows": len(samples),
            "failedRows": shard.failed,
            "seconds": round(seconds, 3),
            "rowsPerSecond": round(pace, 4),
        }
    )
    failed = f"; {shard.failed} cannot be made, first: {shard.first_error}" if shard.failed else ""
    return ending(ExitCode.COMPLETED, f"{len(samples) - shard.failed} outputs{failed}", started, metrics=metrics)


def ending(code: ExitCode, message: str, started: float, **facts: Any) -> TerminationMessage:
    """Print `message` and return the termination message. `facts`: further fields of it."""
    print(message, flush=True)
    return TerminationMessage(
        phase="run",
        code=code,
        reason=code.reason,
        message=message,
        seconds=round(time.monotonic() - started, 3),
        **facts,
    )


def shard_index(shards: int) -> int:
    """Return the index of this pod's shard. Raises Failure if the index is not below `shards`."""
    index = int(os.environ.get(Variables.NODE_RANK, "0"))
    if not 0 <= index < shards:
        raise Failure(
            ExitCode.MISCONFIGURED, f"{Variables.NODE_RANK}: {index} is not one of the {shards} shards of spec.shards"
        )
    return index


def make(engine: Engine, shard: Shard, left: list[Sample], total: int, telemetry: Telemetry) -> bool:
    """Make and store the samples in `left`, of `total` in the shard. Returns False if it had to stop before the end."""
    started, before, logged = time.monotonic(), len(shard.done), len(shard.done)
    window = WINDOW_BATCHES * engine.batch_size

    def report(least: float) -> None:
        """Serve what is stored, and print it if there are `least` more outputs than in the last line."""
        nonlocal logged
        pace = (len(shard.done) - before) / (time.monotonic() - started)
        telemetry.set(GENERATE_ROWS, len(shard.done))
        telemetry.set(GENERATE_ROWS_PER_SECOND, pace)
        if len(shard.done) - logged >= least:
            logged = len(shard.done)
            print(f"{logged} of {total} outputs, {pace:.2f} a second", flush=True)

    handed_over = before
    with Writer(shard) as writer:
        for first in range(0, len(left), window):
            if stop_requested():
                return False
            problems = [(s, engine.problem(s)) for s in left[first : first + window]]
            refused = [Output(s, error=problem) for s, problem in problems if problem]
            writer.put(refused)
            handed_over += len(refused)
            for outputs in engine.work([s for s, problem in problems if not problem]):
                writer.put(outputs)
                handed_over += len(outputs)
                beat()
                report(least=total / LOG_LINES)
                if stop_requested() and handed_over < total:
                    return False
    report(least=1)  # the last batch was stored after the last report
    return True


@contextmanager
def memory_explained() -> Iterator[None]:
    """Raise Failure if the GPU runs out of memory. It names the fields that decide how much a batch needs."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Failure(
            ExitCode.CUDA_OUT_OF_MEMORY,
            f"spec.batchSize: the GPU is full: {error}. Lower batchSize, the size of the images (image.width,"
            " image.height) or the length of the texts (text.maxNewTokens), or set precision: bf16",
        ) from None
