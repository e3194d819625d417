"""Memory and time of the rows of a GenerateJob, from `prepare` to the result, with an engine that takes no time.

`PYTHONPATH=tests python -m perf rows` prints one JSON document, for 10,000 and 200,000 rows; `LUTHIER_ROWS` names other
numbers. Each stage is a process: `prepare` reads a file of rows and writes them with their seeds; `run` makes
nine tenths of the outputs and is killed; `resume` finds what is there and makes the first output that is left; `rest`
makes the others; `finish` writes the result. What counts is the growth of a process's memory after its imports, and the
time of the larger number of rows as a multiple of that of the smaller one, by row.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from luthier_api.variables import Variables

ROWS = (10_000, 200_000)
BATCH = 64
TEXT = "a text of some words, as a small model might write it, " * 4  # 220 characters
STAGES = ("prepare", "run", "resume", "rest", "finish")
MEMORY_LIMIT = 64e6  # bytes that a stage may take beside its imports, whatever the number of rows is
BYTES_A_ROW = 40  # and for each row: hashes by which equal rows are found
TIME_LIMIT = 1.5  # of a row among many, as a multiple of one among few


class Free:
    """An engine that takes no time."""

    batch_size = BATCH
    window_rows = 0

    def expect(self, samples: Sequence[Any]) -> None:
        pass

    def problem(self, sample: Any) -> None:
        return None

    def work(self, samples: Sequence[Any]) -> Iterator[list[Any]]:
        from luthier_trainer.generation.engines.base import batches

        for batch in batches(samples, lambda sample: sample.row % 3, BATCH):
            yield self.make(batch)

    def make(self, samples: Sequence[Any]) -> list[Any]:
        from luthier_trainer.generation.samples import Output

        facts = {"finishReason": "stop", "promptTokens": 9, "newTokens": 40}
        return [Output(sample, facts, text=TEXT) for sample in samples]


def stage(name: str, folder: Path) -> dict[str, float]:
    """Run one stage in this process, and return its seconds and its bytes beside the imports."""
    from luthier_api.run import GenerateRun
    from luthier_api.workspace import WorkspaceFolder
    from luthier_trainer.generation import main as generation
    from luthier_trainer.generation.ledger import Shard
    from luthier_trainer.generation.overrides import with_overrides
    from luthier_trainer.generation.records import TextRecords, keys_of
    from luthier_trainer.generation.rows import Samples
    from luthier_trainer.prepare.generation_rows import read_inputs, write_rows
    from luthier_trainer.runtime.telemetry import Telemetry

    spec = {
        "task": "text-generation",
        "model": {"path": "/m"},
        "inputs": {"dataset": {"files": [str(folder / "rows.jsonl")]}},
        "batchSize": BATCH,
    }
    run = GenerateRun.model_validate({"name": "perf", "workspace": str(folder), "spec": spec})
    count = json.loads((folder / "count").read_text())
    prepared = folder / "prepared.jsonl"

    def shard() -> Shard:
        records = TextRecords(keys_of("text-generation", ("text",), ("finishReason", "promptTokens", "newTokens")))
        return Shard(WorkspaceFolder(folder), 0, 1, records, range(count), {"task": "text-generation"}, "here")

    def left(of: Shard, end: int = count) -> Iterator[Any]:
        samples = Samples(prepared, run.spec.settings, 1, with_overrides)
        return (s for s in samples.between(of.first_left, end) if not of.is_there(s.number))

    def prepare() -> None:
        found, _, _ = read_inputs(run, folder / "cache")
        write_rows(run, found, prepared, lambda line: line)

    def make() -> None:
        begun = shard()
        begun.resume()
        generation.make(Free(), begun, left(begun, count * 9 // 10), Telemetry(), None)

    def resume() -> None:
        begun = shard()
        begun.resume()
        begun.append(Free().make(list(islice(left(begun), 1))))

    def rest() -> None:
        begun = shard()
        begun.resume()
        generation.make(Free(), begun, left(begun), Telemetry(), None)

    def finish() -> None:
        begun = shard()
        begun.resume()
        begun.finish({"rows": count, "failedRows": 0})

    work: dict[str, Callable[[], None]] = dict(zip(STAGES, (prepare, make, resume, rest, finish), strict=True))
    importlib.import_module("luthier_trainer.generation.engines.base")  # imports torch
    if name == "prepare":
        import datasets
        import numpy

        datasets.disable_progress_bars()
        assert numpy
    before, begin = peak(), time.process_time()
    work[name]()
    return {"CPU seconds": time.process_time() - begin, "bytes": peak() - before}


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(rows: int) -> dict[str, dict[str, float]]:
    """Return what each stage takes for so many rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "count").write_text(str(rows))
        with (folder / "rows.jsonl").open("w") as file:
            for i in range(rows):
                file.write(
                    json.dumps({"prompt": f"Tell me of lute {i}, of its bowl, its neck and its strings", "n": i})
                )
                file.write("\n")
        return {stage: _process(stage, folder) for stage in STAGES}


def _process(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "perf.rows", name, str(folder)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {Variables.RUN_DIR: str(folder), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if name == "run" and done.returncode == -signal.SIGKILL:
        return dict(json.loads((folder / "run.json").read_text()))
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> dict[str, Any]:
    """The figures, each beside its limit."""
    counts = [int(n) for n in os.environ.get("LUTHIER_ROWS", "").split(",") if n] or list(ROWS)
    found = {rows: measure(rows) for rows in counts}
    few, many = min(counts), max(counts)
    return {
        "rows": {
            f"{rows}": {
                name: {"MB": round(figures["bytes"] / 1e6, 1), "CPU seconds": round(figures["CPU seconds"], 2)}
                for name, figures in stages.items()
            }
            for rows, stages in found.items()
        },
        "memory / limit": {
            name: round(figures["bytes"] / (MEMORY_LIMIT + BYTES_A_ROW * many), 2)
            for name, figures in found[many].items()
        },
        "time by row, many / few / limit": {
            name: round(
                found[many][name]["CPU seconds"] / many / (found[few][name]["CPU seconds"] / few) / TIME_LIMIT, 2
            )
            for name in STAGES
        },
    }


if __name__ == "__main__":
    figures = stage(sys.argv[1], Path(sys.argv[2]))
    if sys.argv[1] == "run":
        (Path(sys.argv[2]) / "run.json").write_text(json.dumps(figures))
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps(figures))
