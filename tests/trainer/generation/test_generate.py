"""The life of a shard: killed, stopped, resumed, complete; what it reports on the way and at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.generating import generate_run, generate_shards, prepare_by_hand, result_lines
from trainer.small_sdxl import write_small_sdxl

from luthier_api.exitcodes import ExitCode
from luthier_api.metrics import generation_progress, read_samples
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import main as generate
from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.result import shard_manifest
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import heartbeat, run_folder
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.telemetry import PORT_FILE
from luthier_trainer.workspace.prepared import FINGERPRINT

IMAGE = {"width": 32, "height": 32, "steps": 2, "scheduler": "euler-ancestral"}
PROMPTS = [
    {"prompt": f"{thing} in the workshop"}
    for thing in ("a lute", "an oud", "a theorbo", "a cittern", "a viol", "a rebec", "a lyre")
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a process that is started with OMP_NUM_THREADS=1 has it: sums are split over threads, and so rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_run(tmp_path: Path, tiny_model: Path) -> GenerateRun:
    return generate_run(
        tmp_path / "job",
        PROMPTS,
        task="text-generation",
        model={"path": str(tiny_model)},
        text={"maxNewTokens": 4},
        batchSize=2,
    )


def start(run: GenerateRun, tmp_path: Path) -> subprocess.Popen[bytes]:
    """The process that the supervisor would start, for shard 0."""
    config = tmp_path / "run.json"
    config.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    environment = {**os.environ, Variables.RUN: str(config), Variables.NODE_RANK: "0"}
    return subprocess.Popen([sys.executable, "-m", "luthier_trainer.worker", "generate"], env=environment)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers and numpy 2 talk about each other
@pytest.mark.usefixtures("one_thread")
def test_a_shard_killed_on_the_way_makes_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"path": str(write_small_sdxl(tmp_path / "sdxl"))}

    def run_in(name: str) -> GenerateRun:
        return generate_run(
            tmp_path / name, PROMPTS, task="text-to-image", model=model, image=IMAGE | {"perPrompt": 3}, batchSize=2
        )

    run = run_in("killed")
    prepare_by_hand(run)
    journal = WorkspaceFolder(tmp_path / "killed").shards / "shard-00000-of-00001/0001/journal.jsonl"
    process = start(run, tmp_path)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = journal.read_bytes()
    assert 4 <= before.count(b"\n") < 21, "the kill came too late to show anything"
    assert not shard_manifest(WorkspaceFolder(tmp_path / "killed"), 0, 1).exists()

    journal.write_bytes(before + b'20\t{"row": 6, "sample": 2, "pro')  # as a kill between two writes leaves it
    (message,) = generate_shards(run, monkeypatch)
    lines = result_lines(run)
    made = [line.partition(b"\t")[2] for line in before.splitlines()]
    assert {*made} <= {json.dumps(line, ensure_ascii=False).encode() for line in lines}, "lines stay as they were"
    assert [(line["row"], line["sample"]) for line in lines] == [
        (row, sample) for row in range(7) for sample in range(3)
    ]
    assert message.metrics
    assert (message.metrics["rows"], message.metrics["failedRows"]) == (21, 0)
    whole = run_in("whole")
    generate_shards(whole, monkeypatch)
    assert [line["run"] for line in lines] == [lines[0]["run"]] * 21
    assert [line["sha256"] for line in result_lines(whole)] == [line["sha256"] for line in lines]


def test_from_the_users_files_to_the_result(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both phases. `test_quickstart` runs them as processes of the supervisor."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("text,seed\nThe class statement,7\nA function,\nAn import,9\n")
    inputs = {"dataset": {"files": [str(prompts)]}, "columns": {"prompt": "text"}}
    run = GenerateRun.model_validate(
        {
            "name": "lutes",
            "workspace": str(tmp_path / "job"),
            "metricsPort": 0,
            "spec": {
                "task": "text-generation",
                "model": {"path": str(tiny_model)},
                "inputs": inputs,
                "text": {"maxNewTokens": 4},
                "shards": 2,
                "resources": {"gpus": 0},
            },
        }
    )
    messages = [prepare.main(run), *generate_shards(run, monkeypatch, prepare=lambda _: None)]
    assert [(m.code, m.message) for m in messages[::2]] == [(0, ""), (0, "2 outputs")]
    assert (messages[1].phase, messages[1].reason, messages[1].message) == ("run", "Completed", "1 outputs")
    assert set(messages[1].metrics or {}) == {"rows", "failedRows", "seconds", "rowsPerSecond"}
    lines = result_lines(run)
    assert [(line["row"], line["prompt"]) for line in lines] == [
        (0, "The class statement"),
        (1, "A function"),
        (2, "An import"),
    ]
    assert [line["seed"] for line in lines][::2] == [7, 9]
    assert all(line["text"] for line in lines)


def test_a_stop_ends_after_the_batch_and_loses_nothing(text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = iter(range(100))
    flag = run_folder.run_dir() / "stop"

    def beat_and_be_stopped() -> None:
        heartbeat.beat()
        if next(beats) == 1:  # after the second batch
            flag.touch()

    monkeypatch.setattr(generate, "beat", beat_and_be_stopped)
    (message,) = generate_shards(text_run, monkeypatch)
    assert (message.code, message.reason, message.saved) == (75, "Preempted", True)
    assert message.message == "stopped with 4 of 7 outputs written; the rest follows when the job resumes"
    assert not WorkspaceFolder(Path(text_run.workspace)).result.exists()
    flag.unlink()
    (message,) = generate_shards(text_run, monkeypatch)
    assert message.code == 0
    assert [line["row"] for line in result_lines(text_run)] == list(range(7))


def test_a_complete_shard_says_so_without_its_model(text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = generate_shards(text_run, monkeypatch)
    monkeypatch.setattr(TextEngine, "load", lambda *_: pytest.fail("the model was loaded"))
    (again,) = generate_shards(text_run, monkeypatch)
    assert again.metrics == first.metrics


def test_a_shard_without_rows_is_complete(text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = text_run.model_copy(update={"spec": text_run.spec.model_copy(update={"shards": 9})})
    messages = generate_shards(run, monkeypatch)
    assert sorted(m.metrics["rows"] for m in messages if m.metrics) == [0.0] * 2 + [1.0] * 7
    assert all(shard_manifest(WorkspaceFolder(Path(run.workspace)), i, 9).exists() for i in range(9))


def test_metrics_say_how_far_it_is(text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_shards(text_run, monkeypatch)
    port = (run_folder.run_dir() / PORT_FILE).read_text()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1:{port}/metrics"
    ) as answer:
        progress = generation_progress([read_samples(answer.read().decode())])
    assert progress
    assert (run_folder.run_dir() / "heartbeat").exists()
    assert (progress.rows, progress.max_rows, progress.percent, progress.eta_seconds) == (7, 7, 100, 0)


def test_the_log_is_short(
    text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate_shards(text_run, monkeypatch)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("shard 0 of 1: 7 outputs, 0 of them there, on luthier ")
    assert lines[-2].startswith("7 of 7 outputs, ")
    assert lines[-1] == "7 outputs"
    assert "%|" not in err  # a progress bar


def test_a_full_gpu_is_explained(text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(TextEngine, "load", load)
    with pytest.raises(Failure) as failure:
        generate_shards(text_run, monkeypatch)
    assert failure.value.code is ExitCode.CUDA_OUT_OF_MEMORY
    assert "spec.batchSize: the GPU is full: CUDA out of memory" in failure.value.message


def unprepared(run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> GenerateRun:
    return run.model_copy(update={"workspace": run.workspace + "-other"})


def prepared_for_another(run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> GenerateRun:
    (WorkspaceFolder(Path(run.workspace)).prepared / FINGERPRINT).write_text("another")
    return run


def shard_too_many(run: GenerateRun, monkeypatch: pytest.MonkeyPatch) -> GenerateRun:
    monkeypatch.setenv(Variables.NODE_RANK, "1")
    return run


@dataclass(frozen=True)
class Case:
    name: str
    make: Any
    code: ExitCode
    message: str


MISTAKES = [
    Case(
        name="prepare has not run",
        make=unprepared,
        code=ExitCode.MISCONFIGURED,
        message="Run `prepare` first",
    ),
    Case(
        name="prepare ran for another job",
        make=prepared_for_another,
        code=ExitCode.INVALID_SPEC,
        message="was prepared for another version of job 'lutes'",
    ),
    Case(
        name="a shard too many",
        make=shard_too_many,
        code=ExitCode.MISCONFIGURED,
        message="LUTHIER_NODE_RANK: 1 is not one of the 1 shards of spec.shards",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_mistakes(text_run: GenerateRun, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare_by_hand(text_run)
    with pytest.raises(Failure, match=case.message) as failure:
        generate.main(case.make(text_run, monkeypatch))
    assert failure.value.code is case.code


def test_a_fine_tuning_is_not_generated(make_run: Any) -> None:
    run: FineTuneRun = make_run()
    with pytest.raises(Failure, match="`train` runs those"):
        generate.main(run)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, luthier_trainer.generation.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_texts_need_neither_diffusers_nor_peft() -> None:
    code = (
        "import sys, luthier_trainer.generation.engines.text;"
        " print([m for m in ('diffusers', 'peft') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
