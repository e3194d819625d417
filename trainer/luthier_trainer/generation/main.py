"""The run phase of a GenerateJob: one shard of the rows, from what `prepare` left to outputs in `result/`.

Row r belongs to shard r mod shards. Outputs are kept batch by batch, so a shard that is killed goes on where it
stopped, and one that is complete says so at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import GENERATE_MAX_ROWS, GENERATE_ROWS, GENERATE_ROWS_PER_SECOND
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.samples import Output, Sample, read_rows
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.run_folder import stop_requested
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.workspace.manifest import sha256
from luthier_trainer.workspace.prepared import read_prepared

if TYPE_CHECKING:
    from luthier_trainer.generation.engines.base import Engine
    from luthier_trainer.generation.hardware import Hardware

# Batches are composed within a window of so many: enough to fill the groups, few enough to start soon.
WINDOW_BATCHES = 64
LOG_LINES = 20  # at most, for the whole shard


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Make the outputs of this shard that are missing. Raises Failure."""
    if not isinstance(run, GenerateRun):
        raise Failure(ExitCode.MISCONFIGURED, "generate: the run config is of a FineTuneJob; `train` runs those")
    # Everything is in the workspace; a request to the Hub would only wait for a network that these pods may not have.
    os.environ["HF_HUB_OFFLINE"] = "1"
    started, spec, folder = time.monotonic(), run.spec, WorkspaceFolder(Path(run.workspace))
    record = read_prepared(run)
    index = shard_index(spec.shards)
    rows = list(read_rows(Path(record.dataset_path), spec.per_prompt))
    samples = [s for row in rows if row[0].row % spec.shards == index for s in row]

    from luthier_trainer.generation.hardware import find_hardware

    hardware = find_hardware(spec)
    task = engine_class(spec.task)
    # A job of fewer outputs than a batch holds would compute the rest for nothing; the number does not depend on the
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
    # If all outputs of a shard failed, check whether the rows of other shards can be made: the job fails only if no row
    # can, however the rows are split.
    if left or shard.failed == len(samples) > 0:
        shard.open_result()
        with memory_explained():
            engine = task.load(run, record, hardware, batch_size)
            if not make(engine, shard, left, len(samples), telemetry):
                message = (
                    f"stopped with {len(shard.done)} of {len(samples)} outputs written; the rest follows when the job"
                    " goes on"
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
    """Which shard this pod is. Raises Failure when it is none of them."""
    index = int(os.environ.get(Variables.NODE_RANK, "0"))
    if not 0 <= index < shards:
        raise Failure(
            ExitCode.MISCONFIGURED, f"{Variables.NODE_RANK}: {index} is not one of the {shards} shards of spec.shards"
        )
    return index


def settings(run: GenerateRun, record: PreparedRecord, hardware: Hardware, batch_size: int) -> dict[str, Any]:
    """Everything that outputs depend on beside their row: what it takes to make one again, and what tells a stale
    one.
    """
    spec = run.spec
    adapters = [
        {
            **source.dump(),
            "weight": adapter.weight,
            "sha256": digest(path),
        }
        for source, adapter, path in zip(record.adapters, spec.adapters, record.adapter_paths, strict=True)
    ]
    return {
        "task": spec.task,
        "model": record.model.dump(),
        "adapters": adapters,
        "precision": hardware.precision,
        "batchSize": batch_size,
        **{name: value for name, value in spec.settings.dump().items() if name != "perPrompt"},
    }


def digest(adapter: str) -> str:
    """SHA-256 of an adapter's weights; an adapter trained anew at the same place is another one."""
    if Path(adapter).is_file():
        return sha256(Path(adapter))
    return next((sha256(p) for suffix in ("safetensors", "bin") for p in sorted(Path(adapter).glob(f"*.{suffix}"))), "")


def make(engine: Engine, shard: Shard, left: list[Sample], total: int, telemetry: Telemetry) -> bool:
    """Make and keep the outputs that are left of `total`. Returns False if a stop was requested before the end."""
    started, before, logged = time.monotonic(), len(shard.done), len(shard.done)
    window = WINDOW_BATCHES * engine.batch_size
    for first in range(0, len(left), window):
        problems = [(s, engine.problem(s)) for s in left[first : first + window]]
        shard.append([Output(s, error=problem) for s, problem in problems if problem])
        for batch in batches(engine, [s for s, problem in problems if not problem]):
            if stop_requested():
                return False
            shard.append(engine.make(batch))
            beat()
            pace = (len(shard.done) - before) / (time.monotonic() - started)
            telemetry.set(GENERATE_ROWS, len(shard.done))
            telemetry.set(GENERATE_ROWS_PER_SECOND, pace)
            if len(shard.done) - logged >= total / LOG_LINES:
                logged = len(shard.done)
                print(f"{logged} of {total} outputs, {pace:.2f} a second", flush=True)
    return True


def batches(engine: Engine, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Batches of samples of one group, groups in order of their first sample; the last batch of a group may be
    short.
    """
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(engine.group(sample), []).append(sample)
    for members in groups.values():
        for first in range(0, len(members), engine.batch_size):
            yield members[first : first + engine.batch_size]


@contextmanager
def memory_explained() -> Iterator[None]:
    """A full GPU as a message about the fields that decide how much a batch needs. Raises Failure."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Failure(
            ExitCode.CUDA_OUT_OF_MEMORY,
            f"spec.batchSize: the GPU is full: {error}. Lower batchSize, the size of the images (image.width,"
            " image.height) or the length of the texts (text.maxNewTokens), or set precision: bf16",
        ) from None
