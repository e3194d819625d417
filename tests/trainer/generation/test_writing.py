"""The writer of outputs: one batch behind the model, in order, durable, and with its errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import pytest

from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.samples import Output, Sample, Unusable
from luthier_trainer.generation.writing import Writer, at_the_same_time
from trainer import generating

SETTINGS = {"task": "text-to-image"}


def sample(row: int) -> Sample:
    return generating.sample(f"lute {row}", row=row, seed=row, number=row, settings=generating.IMAGE)


class Gated:
    """Stores a batch when it is let."""

    def __init__(self) -> None:
        self.begun, self.open = Event(), Event()
        self.stored: list[list[int]] = []

    def append(self, outputs: Sequence[Output]) -> None:
        self.begun.set()
        assert self.open.wait(10)
        self.stored.append([output.sample.row for output in outputs])


def test_a_batch_is_stored_while_the_next_is_made_and_no_third_one_begins() -> None:
    store = Gated()
    with ThreadPoolExecutor(1) as model, Writer(store) as writer:
        writer.put([Output(sample(0))])
        assert store.begun.wait(10), "the first batch is not stored beside the model"
        second = model.submit(writer.put, [Output(sample(1))])
        with pytest.raises(TimeoutError):
            second.result(timeout=0.05)
        store.open.set()
        second.result(timeout=10)
    assert store.stored == [[0], [1]]


class Full:
    def append(self, outputs: Sequence[Output]) -> None:
        raise OSError(28, "No space left on device")


def test_an_error_of_storing_ends_the_work() -> None:
    def work() -> None:
        with Writer(Full()) as writer:
            writer.put([Output(sample(0))])

    with pytest.raises(OSError, match="No space left"):
        work()


def test_what_was_made_before_the_model_failed_is_stored() -> None:
    store = Gated()
    store.open.set()

    def fail() -> None:
        with Writer(store) as writer:
            writer.put([Output(sample(0))])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert store.stored == [[0]]


def test_results_are_in_order_and_the_first_error_is_raised() -> None:
    assert at_the_same_time(lambda number: number * 2, [3, 1, 2]) == [6, 2, 4]
    with pytest.raises(ZeroDivisionError):
        at_the_same_time(lambda number: 1 // number, [1, 0, 2])


def opened(tmp_path: Path) -> Shard:
    records = engine_class("text-to-image").records
    shard = Shard(WorkspaceFolder(tmp_path), 0, 1, records, range(4), SETTINGS, "here")
    shard.resume()
    return shard


def test_files_are_durable_before_their_folder_and_the_folder_before_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fsync for each file, one for their folder, one for the ledger: six for four images, where ten were."""
    shard, order, lock = opened(tmp_path), list[str](), Lock()
    sync = os.fsync

    def note(handle: int) -> None:
        with lock:
            order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    shard.append([Output(sample(row), file=lambda: b"image", suffix="png") for row in range(4)])
    assert sorted(order[:4]) == [f".{row:06d}-00.png.partial" for row in range(4)]
    assert order[4:] == ["0000", "journal.jsonl"]


def test_an_output_that_is_none_after_all_is_an_error_of_its_row(tmp_path: Path) -> None:
    def file() -> bytes:
        raise Unusable("the image is not finite")

    shard = opened(tmp_path)
    shard.append([Output(sample(0), file=lambda: b"image", suffix="png"), Output(sample(1), file=file, suffix="png")])
    assert (shard.done, shard.failed, shard.first_error) == (2, 1, "row 1: the image is not finite")
