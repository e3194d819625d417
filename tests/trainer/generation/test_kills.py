"""A shard that is killed at random moments makes each output once, and at most one batch again for each kill."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from trainer.generating import TEXT, sample

from luthier_api.tasks import REFERENCE
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import ledger
from luthier_trainer.generation.engines.base import Batched
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.main import make
from luthier_trainer.generation.records import TextRecords, line_keys
from luthier_trainer.generation.samples import Output, Sample
from luthier_trainer.runtime.telemetry import Telemetry

OUTPUTS, BATCH, KILLS = 600, 4, 50
SAMPLES = [sample(f"prompt {i}", row=i, number=i, settings=TEXT) for i in range(OUTPUTS)]


class Counting(Batched):
    """An engine that notes what it makes, and puts every third sample into a group."""

    batch_size = BATCH

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def problem(self, sample: Sample) -> str | None:
        return "too long" if sample.row % 50 == 7 else None

    def group(self, sample: Sample) -> int:
        return sample.row % 3

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        with self.notes.open("a") as file:
            file.write("".join(f"{s.row}\n" for s in samples))
        return [Output(s, text=f"text {s.row}") for s in samples]


def shard(folder: Path) -> Shard:
    records = TextRecords(line_keys("prompt", REFERENCE, "text"))
    return Shard(WorkspaceFolder(folder), 0, 1, records, range(OUTPUTS), {"task": "text-generation"}, "here")


def work(folder: Path) -> None:
    """One attempt, to its end."""
    begun = shard(folder)
    begun.resume()
    left = (s for s in SAMPLES[begun.first_left :] if not begun.is_there(s.number))
    make(Counting(folder / "notes"), begun, left, Telemetry(), None)  # type: ignore[arg-type]  # a part of an engine
    begun.finish({"rows": OUTPUTS, "failedRows": begun.failed})


def result(folder: Path) -> bytes:
    return (folder / "result/shard-00000-of-00001.jsonl").read_bytes()


@pytest.mark.slow
def test_each_output_is_made_once_whenever_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SEGMENT", 20)
    draw = random.Random(0)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    begin = time.monotonic()
    work(whole)
    seconds = (time.monotonic() - begin) / 10
    kills = 0
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            work(killed)
            os._exit(0)
        time.sleep(draw.random() * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif (killed / "result").exists():
            break
    work(killed)
    assert result(killed) == result(whole)
    rows = [json.loads(line)["row"] for line in result(killed).splitlines()]
    assert rows == list(range(OUTPUTS))
    made = Counter((killed / "notes").read_text().split())
    again = sum(made.values()) - len(made)
    assert kills > 10, "too few kills to show anything"
    # One batch is stored while the next is computed.
    assert again <= kills * 2 * BATCH
    assert max(made.values()) <= 1 + kills
