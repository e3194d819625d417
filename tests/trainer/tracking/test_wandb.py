"""Weights & Biases in its offline mode: what `wandb sync` would upload, read from the files of its own format."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from luthier_api.tracking import Tracker
from luthier_trainer.runtime import notices
from luthier_trainer.tracking.base import Report, TrackedTraining
from luthier_trainer.tracking.channel import Channel
from luthier_trainer.tracking.wandb import WeightsAndBiases
from luthier_trainer.workspace import tracked_runs

pytest.importorskip("wandb", reason="needs the optional package wandb")
from wandb.proto import wandb_internal_pb2 as protocol

FILE_HEADER, RECORD_HEADER, BLOCK = 7, 7, 32768  # of LevelDB's log, in which wandb keeps its records
DOCUMENTS: dict[str, Any] = {"spec": {"task": "causal-lm", "training": {"maxSteps": 8}}, "provenance": {"luthier": "1"}}
KEY = "planted-key-of-a-tracker-planted-key-of-"


def records(file: Path) -> list[Any]:
    """The records of a file of wandb."""
    data, found, whole = file.read_bytes(), [], b""
    at = FILE_HEADER
    while at + RECORD_HEADER <= len(data):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # the rest of a block is too small for a header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + RECORD_HEADER])
        whole += data[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind in (1, 4):  # whole, or its last part
            record = protocol.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def attempt(folder: Path, steps: range, complete: bool, **fields: Any) -> None:
    spec = Tracker.model_validate({"type": "wandb", "tags": {"team": "a"}, **fields})
    tracker = WeightsAndBiases(spec, TrackedTraining("job", "lab", folder / "tracking/wandb", 0, DOCUMENTS))
    channel = Channel("W&B", tracker)
    for step in steps:
        channel.put(Report(step, {"loss": 1 / (1 + step)}))
    channel.close(complete, 120)


def test_two_attempts_are_one_run(tmp_path: Path) -> None:
    """The second one repeats steps of the first, as after a checkpoint. No random number of the training is drawn."""
    state = random.getstate()
    attempt(tmp_path, range(1, 5), complete=False)
    attempt(tmp_path, range(3, 8), complete=True)
    assert notices.given() == []
    assert random.getstate() == state
    files = sorted((tmp_path / "tracking/wandb").rglob("*.wandb"))
    read = [record for file in files for record in records(file)]
    runs = [record.run for record in read if record.WhichOneof("record_type") == "run"]
    assert {(run.project, run.display_name, run.run_id, *run.tags) for run in runs} == {
        ("lab", "job", runs[0].run_id, "team:a")
    }
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["task"], config["training"], config["luthier"]) == ("causal-lm", {"maxSteps": 8}, {"luthier": "1"})
    history = [record.history for record in read if record.WhichOneof("record_type") == "history"]
    values = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item} for line in history]
    assert [(line["_step"], line["loss"]) for line in values] == [(step, 1 / (1 + step)) for step in range(1, 8)]
    (shown,) = tracked_runs.read(tmp_path / "tracking")
    assert (shown.type, shown.url, shown.run) == ("wandb", None, "tracking/wandb/wandb")


def test_a_server_that_is_away_leaves_no_key_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    secret = {"name": "wandb", "keys": {"apiKey": "key"}}
    monkeypatch.setattr("luthier_trainer.tracking.wandb.INIT_SECONDS", 1.0)
    attempt(tmp_path, range(1, 3), complete=True, url="http://127.0.0.1:9", secretRef=secret)
    (text,) = notices.given()
    assert text.startswith("spec.tracking: W&B lacks 2 of 2 reports of the training: ")
    assert KEY not in text
    assert [str(f) for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()] == []
