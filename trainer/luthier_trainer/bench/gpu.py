"""Speed and memory of LoRA and QLoRA on one GPU, for models of 1 and 8 billion random weights:

    python -m luthier_trainer.bench gpu --seconds 290

It needs no network, and prints a JSON line for each case as soon as it is measured: tokens/s, MFU, HFU, the peak of
memory beside the plan, and the peers. It ends after `--seconds` whatever happens; a last line says what was left out.
`--smoke` tries the command on a CPU, `--case` chooses cases by words in their names, and `--folder` takes the models:
19 GB. While a case is measured, the next one is prepared, on cores that the measured process does not need.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from luthier_api.run import PreparedRecord
from luthier_api.spec import SYSTEM_FOLDERS
from luthier_api.training import Training
from luthier_trainer.bench import rounds
from luthier_trainer.bench.cases import Case, make_model, run_of
from luthier_trainer.bench.comparison import Device, device, measurable, measure, start, surroundings
from luthier_trainer.bench.rounds import Course, Program

COURSE = Course(warmup=4, block=3, rounds=2)
SMOKE = Course(warmup=2, block=1, rounds=2)
CASE_SECONDS = 80  # that a case may take at most, so that one that hangs costs no others
LEAST_SECONDS = 12  # below it no case is begun
PREPARING = 3  # phases of prepare at once


@dataclass(frozen=True)
class Entry:
    """A case of the suite, and the peers that are measured beside it."""

    case: Case
    peers: tuple[str, ...] = ()


def case(model: str, method: str, *, packed: bool, compiled: bool = False) -> Case:
    packing = "isolated" if packed else "none"
    return Case(model, method, packing, compiled, gpus=1, batch_size=4, max_length=2048)


SUITE = (
    Entry(case("llama-1b", "lora", packed=True), ("trl",)),
    Entry(case("llama-8b", "lora", packed=True), ("trl",)),
    Entry(case("llama-8b", "qlora", packed=True)),
    Entry(case("llama-1b", "lora", packed=False), ("plain", "trl")),
    Entry(case("llama-1b", "lora", packed=True, compiled=True)),
    Entry(case("llama-8b", "lora", packed=False), ("plain",)),
    Entry(case("llama-8b", "lora", packed=True, compiled=True)),
    Entry(case("llama-1b", "qlora", packed=True)),
    Entry(case("llama-8b", "qlora", packed=False)),
    Entry(case("llama-1b", "qlora", packed=False)),
    Entry(case("llama-8b", "qlora", packed=True, compiled=True)),
    Entry(case("llama-1b", "qlora", packed=True, compiled=True)),
    Entry(case("llama-1b", "lora", packed=False, compiled=True)),
    Entry(case("llama-8b", "lora", packed=False, compiled=True)),
    Entry(case("llama-1b", "qlora", packed=False, compiled=True)),
    Entry(case("llama-8b", "qlora", packed=False, compiled=True)),
)


def suite(smoke: bool, words: Sequence[str]) -> list[Entry]:
    """Return the cases whose names have all of `words`; with `smoke`, tiny ones for a CPU."""
    compiles = "torch_compile" in Training.model_fields
    chosen = [entry for entry in SUITE if compiles or not entry.case.compiled]
    chosen = [entry for entry in chosen if all(word in entry.case.name.split() for word in words)]
    if not smoke:
        return chosen
    return [
        replace(entry, case=replace(entry.case, model="tiny", gpus=0, batch_size=2, max_length=128))
        for entry in chosen
        if entry.case.model == "llama-1b"
    ]


class Preparations:
    """Makes models and prepares cases in the background."""

    def __init__(self, root: Path, course: Course, found: Device, deadline: float) -> None:
        self._root, self._course, self._deadline = root, course, deadline
        self._gpu = found.gpu
        self._models: dict[str, Future[Path]] = {}
        self._making = ThreadPoolExecutor(1)  # the GPU makes one model at a time
        self._preparing = ThreadPoolExecutor(PREPARING)
        self._starting = ThreadPoolExecutor(1)

    def make(self, entry: Entry) -> None:
        """Begin to make the model of a case, unless that has begun."""
        if entry.case.model not in self._models:
            self._models[entry.case.model] = self._making.submit(self._make, entry.case)

    def _make(self, case: Case) -> Path:
        folder = self._root / case.model
        make_model(case.model, folder, cpu=not case.gpus)
        return folder

    def prepare(self, number: int, entry: Entry) -> Future[PreparedRecord]:
        """Begin to prepare a case."""
        return self._preparing.submit(self._prepare, number, entry.case)

    def folder(self, number: int) -> Path:
        return self._root / f"case-{number}"

    def _prepare(self, number: int, case: Case) -> PreparedRecord:
        model = self._models[case.model].result()
        folder = self.folder(number)
        run = run_of(case, folder, model, self._course.steps, self._gpu)
        return rounds.prepare(measurable(run, self._course.steps), folder, self._deadline)

    def start(self, number: int, entry: Entry, prepared: Future[PreparedRecord]) -> Future[list[Program]]:
        """Begin to start the processes of a case, which then wait."""

        def started() -> list[Program]:
            prepared.result()
            return start(self.folder(number), self._course, entry.peers, cpu=not entry.case.gpus)

        return self._starting.submit(started)

    def close(self) -> None:
        for pool in (self._making, self._preparing, self._starting):
            pool.shutdown(wait=False, cancel_futures=True)


def measured(
    entries: Sequence[Entry], root: Path, course: Course, found: Device, end: float
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each case, or why there are none. `end`: when to stop, by time.monotonic()."""
    preparations = Preparations(root, course, found, end)
    for entry in entries:
        preparations.make(entry)
    prepared = [preparations.prepare(number, entry) for number, entry in enumerate(entries)]
    started: dict[int, Future[list[Program]]] = {}
    left_out = []
    try:
        for number, entry in enumerate(entries):
            if end - time.monotonic() < LEAST_SECONDS:
                left_out.append(entry.case.name)
                continue
            for ahead in range(number, min(number + 2, len(entries))):
                if ahead not in started:
                    started[ahead] = preparations.start(ahead, entries[ahead], prepared[ahead])
            begin = time.monotonic()
            document: dict[str, Any] = {"case": entry.case.name}
            try:
                record = prepared[number].result(timeout=max(0.1, end - time.monotonic()))
                programs = started[number].result(timeout=max(0.1, end - time.monotonic()))
                deadline = min(end, time.monotonic() + CASE_SECONDS)
                document |= measure(programs, record, course, deadline, found)
            except Exception as error:  # the other cases can still be measured
                document["unmeasured"] = f"{type(error).__name__}: {error}"[:1500]
            document["seconds"] = round(time.monotonic() - begin, 1)
            yield document
            shutil.rmtree(preparations.folder(number), ignore_errors=True)
    finally:
        preparations.close()
        for future in started.values():
            if future.done() and not future.exception():
                for program in future.result():
                    program.end()
    if left_out:
        yield {"leftOut": left_out}


def folder_for_models(name: str) -> Path:
    """Return the folder, which is made if need be. Raises ArgumentTypeError for one from which no job reads."""
    folder = Path(name).resolve()
    if any(folder.is_relative_to(f"/{system}") for system in SYSTEM_FOLDERS):
        raise argparse.ArgumentTypeError(f"{folder}: jobs read nothing below /{', /'.join(SYSTEM_FOLDERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(words: Sequence[str]) -> NoReturn:
    """Measure the suite, a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m luthier_trainer.bench gpu")
    parser.add_argument("--seconds", type=float, default=290, help="after which the command has ended")
    parser.add_argument("--smoke", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--folder", type=folder_for_models, help="where models are written")
    parser.add_argument("--case", nargs="*", default=[], help="words in the names of the cases to measure")
    given = parser.parse_args(words)
    end = time.monotonic() + given.seconds - 3  # to end the processes
    found = device(gpu=not given.smoke)
    print(json.dumps(surroundings(found)), flush=True)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", dir=given.folder, ignore_cleanup_errors=True) as folder:
        entries = suite(given.smoke, given.case)
        for line in measured(entries, Path(folder), SMOKE if given.smoke else COURSE, found, end):
            print(json.dumps(line), flush=True)
    sys.stdout.flush()
    os._exit(0)  # whatever a thread still waits for
