"""The run phase of a GenerateJob: makes the outputs of one shard of the prepared rows, and puts them into `result/`.

A shard has consecutive outputs (`rows.span_of_shard`). They are stored after each batch, so a shard that was killed
continues where it stopped, and a shard that is already complete ends at once. Rows are read as they are needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import (
    GENERATE_FAILED_ROWS,
    GENERATE_MAX_ROWS,
    GENERATE_ROWS,
    GENERATE_ROWS_PER_SECOND,
    GENERATE_SCORE,
    GENERATE_SCORED_ROWS,
    GENERATE_UNSAFE_ROWS,
)
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.exports.table import deliver
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.overrides import with_overrides
from luthier_trainer.generation.poison import Poisoned
from luthier_trainer.generation.result import UNSAFE_ROWS, counted, failed_outputs, total_sums
from luthier_trainer.generation.rows import Samples, span_of_shard
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.generation.scores import ROWS, SCORED, metrics_of
from luthier_trainer.generation.settings import settings
from luthier_trainer.generation.writing import Writer
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.notices import notice
from luthier_trainer.runtime.run_folder import stop_requested
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.scoring.sums import Sums
from luthier_trainer.workspace.prepared import read_prepared

if TYPE_CHECKING:
    from luthier_trainer.generation.engines.base import Engine
    from luthier_trainer.generation.hardware import Hardware

# Samples are grouped into batches within a window of this many batches: enough to fill the groups, few enough to
# start soon.
WINDOW_BATCHES = 64
LOG_LINES = 20  # at most, for the whole shard


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Make the missing outputs of this shard, and return the termination message.

    Raises Failure if the shard cannot run, if too many rows cannot be worked on, or not one of the whole job.
    """
    if not isinstance(run, GenerateRun):
        raise Failure(ExitCode.MISCONFIGURED, "generate: the run config is of a FineTuneJob; `train` runs those")
    # Everything is in the workspace. These pods may have no network, and a request to the Hub would wait for a timeout.
    os.environ["HF_HUB_OFFLINE"] = "1"
    started, spec, folder = time.monotonic(), run.spec, WorkspaceFolder(Path(run.workspace))
    record = read_prepared(run)
    index, outputs = shard_index(spec.shards), record.dataset.outputs or 0
    span = span_of_shard(outputs, spec.shards, index)
    samples = Samples(Path(record.dataset_path), spec.settings, spec.per_prompt, with_overrides)

    from luthier_trainer.generation.hardware import find_hardware

    hardware = find_hardware(spec)
    task = engine_class(spec.task)
    # A job with fewer outputs than the batch size would compute unused rows. The size does not depend on the number of
    # shards.
    batch_size = min(spec.batch_size, outputs)
    shard = Shard(
        folder,
        index,
        spec.shards,
        task.records,
        span,
        {"inputs": record.rows_sha256, **settings(run, record, hardware, batch_size)},
        hardware.environment,
    )
    telemetry = Telemetry()
    telemetry.set(GENERATE_MAX_ROWS, len(span))
    telemetry.serve(run.metrics_port)
    metrics = shard.result.metrics(span, shard.settings)
    if metrics is None:
        shard.resume()
        report(telemetry, shard)
        print(
            f"shard {index} of {spec.shards}: {len(span)} outputs, {shard.done} of them there, on"
            f" {hardware.environment}",
            flush=True,
        )
        shard.result.open()
        before = shard.done
        with memory_explained():
            if not work(run, record, hardware, batch_size, shard, samples, telemetry):
                message = (
                    f"stopped with {shard.done} of {len(span)} outputs written; the rest follows when the job resumes"
                )
                return ending(ExitCode.PREEMPTED, message, started, saved=True, step=shard.done)
        seconds = time.monotonic() - started
        metrics = {
            "rows": len(span),
            "failedRows": shard.failed,
            "seconds": round(seconds, 3),
            "rowsPerSecond": round((len(span) - before) / seconds, 4),
        }
        if spec.image and spec.image.safety:
            metrics[UNSAFE_ROWS] = shard.unsafe
        if scored := shard.sums.get(ROWS):
            metrics[SCORED] = int(scored)
        shard.finish(metrics)
    failed = int(metrics["failedRows"])
    telemetry.set(GENERATE_ROWS, len(span))
    telemetry.set(GENERATE_FAILED_ROWS, failed)
    refuse_too_many(spec.max_failed_rows, failed_outputs(folder, spec.shards), shard.first_error)
    told = f"; {failed} cannot be made, first: {shard.first_error}" if shard.first_error else ""
    total = total_sums(folder, spec.shards, shard.settings)
    if total is not None:  # all shards are complete
        report_unsafe(run, folder, outputs)
        refuse_nothing(failed_outputs(folder, spec.shards), outputs, shard.first_error)
        deliver(run, record, folder, index)
        metrics = {**metrics, **scores(run, folder, total, outputs)}
    return ending(ExitCode.COMPLETED, f"{len(span) - failed} outputs{told}", started, metrics=metrics)


def scores(run: GenerateRun, folder: WorkspaceFolder, total: Sums, outputs: int) -> dict[str, float]:
    """Return the metrics of the whole job, all of whose shards are complete; a notice says what they leave out.

    `total`: the sums of all shards. If several shards end at the same time, each of them reports the same metrics.
    """
    if not total:
        return {}
    failed, scored = failed_outputs(folder, run.spec.shards), int(total[ROWS])
    if scored < outputs:
        notice(
            f"status.metrics: of {outputs} outputs, {scored} are compared with their references; {failed} cannot be"
            f" made, and {outputs - scored - failed} have no reference. Neither counts in the metrics"
        )
    found = metrics_of(run.spec.task, total)
    print(f"metrics over {scored} outputs: {', '.join(f'{name} {value:.6g}' for name, value in found.items())}")
    return found


def report_unsafe(run: GenerateRun, folder: WorkspaceFolder, outputs: int) -> None:
    """Give a notice of the images of the whole job that are unsafe, all of whose shards are complete.

    Raises Failure if all images that could be made are withheld.
    """
    safety = run.spec.image.safety if run.spec.image else None
    unsafe = counted(folder, run.spec.shards, UNSAFE_ROWS) if safety else 0
    if not safety or not unsafe:
        return
    if safety.policy == "withhold" and failed_outputs(folder, run.spec.shards) == outputs:
        raise Failure(
            ExitCode.INVALID_DATASET,
            f"spec.image.safety: no image is left: {unsafe} of {outputs} are withheld, and no other can be made. Look"
            " at unsafeScore in their lines; raise threshold, or set policy: flag",
        )
    what = {"flag": "kept, with unsafe: true in their lines", "withhold": "withheld, and count as failed rows"}
    notice(f"spec.image.safety: {unsafe} of {outputs} images are unsafe; they are {what[safety.policy]}")


def withheld(run: GenerateRun, shard: Shard) -> int:
    """Return the number of images of a shard that were made, and count as failed because they are unsafe."""
    safety = run.spec.image.safety if run.spec.image else None
    return shard.unsafe if safety and safety.policy == "withhold" else 0


def work(
    run: GenerateRun,
    record: PreparedRecord,
    hardware: Hardware,
    batch_size: int,
    shard: Shard,
    samples: Samples,
    telemetry: Telemetry,
) -> bool:
    """Make the outputs of a shard that are left. Returns False if it had to stop before the end.

    Raises Failure if too many rows cannot be worked on, or not one row of the whole job.
    """
    # If all outputs of this shard failed, the rows of other shards are tried: the job fails only if no row can be made,
    # independent of how the rows are divided into shards.
    if not shard.span or (shard.done == len(shard.span) and shard.failed - withheld(run, shard) < shard.done):
        return True
    engine = engine_class(run.spec.task).load(run, record, hardware, batch_size)
    left = (s for s in samples.between(shard.first_left, shard.span.stop) if not shard.is_there(s.number))
    if not make(engine, shard, left, telemetry, run.spec.max_failed_rows):
        return False
    if shard.failed - withheld(run, shard) == len(shard.span):
        outputs = record.dataset.outputs or 0
        others = (range(shard.span.start), range(shard.span.stop, outputs))
        found = (problem_of(engine, s) for other in others for s in samples.between(other.start, other.stop))
        if all(problem is not None for problem in found):
            refuse_nothing(outputs, outputs, shard.first_error)
    return True


def refuse_nothing(failed: int, outputs: int, first: str | None) -> None:
    """Raise Failure if all outputs of the job have failed. `first`: why the first of them did, if it is known."""
    if failed == outputs:
        shown = f" First of them: {first}" if first else ""
        raise Failure(ExitCode.INVALID_DATASET, f"spec.inputs: not one row can be worked on.{shown}")


def refuse_too_many(limit: int | None, failed: int, first: str | None) -> None:
    """Raise Failure if more outputs cannot be made than the job allows. What was made stays in the workspace."""
    if limit is not None and failed > limit:
        shown = f" First of them: {first}" if first else ""
        raise Failure(
            ExitCode.INVALID_DATASET,
            f"spec.maxFailedRows: {failed} outputs cannot be made, and {limit} are allowed. All others stay in the"
            f" workspace, and their rows are not worked on again if the limit is raised.{shown}",
        )


def report(telemetry: Telemetry, shard: Shard) -> None:
    """Set the metrics of how far the shard is."""
    telemetry.set(GENERATE_ROWS, shard.done)
    telemetry.set(GENERATE_FAILED_ROWS, shard.failed)
    if shard.settings.get("safety"):
        telemetry.set(GENERATE_UNSAFE_ROWS, shard.unsafe)
    sums = shard.sums
    if ROWS in sums:
        telemetry.set(GENERATE_SCORED_ROWS, int(sums[ROWS]))
        for name, value in metrics_of(shard.settings["task"], sums).items():
            telemetry.set(GENERATE_SCORE, value, name)


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


def make(engine: Engine, shard: Shard, left: Iterator[Sample], telemetry: Telemetry, limit: int | None) -> bool:
    """Make and store the samples in `left`. Returns False if it had to stop before the end.

    `limit`: outputs that may fail. Raises Failure if more do.
    """
    started, before, logged = time.monotonic(), shard.done, shard.done
    total = len(shard.span)

    def tell(least: float) -> None:
        """Serve what is stored, and print it if there are `least` more outputs than in the last line."""
        nonlocal logged
        pace = (shard.done - before) / (time.monotonic() - started)
        report(telemetry, shard)
        telemetry.set(GENERATE_ROWS_PER_SECOND, pace)
        if shard.done - logged >= least:
            logged = shard.done
            print(f"{logged} of {total} outputs, {pace:.2f} a second", flush=True)

    handed_over, poisoned = before, Poisoned()
    with Writer(shard) as writer:
        while window := list(islice(left, max(WINDOW_BATCHES * engine.batch_size, engine.window_rows))):
            if stop_requested():
                return False
            engine.expect([sample for sample in window if sample.problem is None])
            problems = [(s, problem_of(engine, s)) for s in window]
            refused = [Output(s, error=problem) for s, problem in problems if problem is not None]
            writer.put(refused)
            writer.wait()
            handed_over += len(refused)
            refuse_too_many(limit, shard.failed, shard.first_error)
            for outputs in poisoned.worked(engine, [s for s, problem in problems if problem is None]):
                writer.put(outputs)
                handed_over += len(outputs)
                beat()
                tell(least=total / LOG_LINES)
                refuse_too_many(limit, shard.failed, shard.first_error)
                if stop_requested() and handed_over < total:
                    return False
    tell(least=1)  # the last batch was stored after the last report
    return True


def problem_of(engine: Engine, sample: Sample) -> str | None:
    """Return why a sample can never be made; None if it can."""
    return sample.problem if sample.problem is not None else engine.problem(sample)


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
