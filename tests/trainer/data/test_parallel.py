"""Rows that several processes convert are those of one process, with the same notices and the same lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from luthier_api.run import FineTuneRun
from luthier_api.spec import PrepareResources
from luthier_trainer.data import full_lengths, parallel
from luthier_trainer.data.tokens import mapped
from luthier_trainer.prepare.examples import read_examples
from luthier_trainer.runtime import cores, notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.table import task_of

MakeRun = Callable[..., FineTuneRun]
PROCESSES = 3


@pytest.fixture(autouse=True)
def _few_rows_a_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel, "ROWS_A_PROCESS", 1)
    yield
    parallel.use(None)


def rows_of(kind: str, paragraphs: list[str]) -> list[dict[str, Any]]:
    """Rows of which some are cut, some say what is reported of them, and one is left out."""
    made: list[dict[str, Any]] = []
    for i, text in enumerate(paragraphs[:60]):
        words = text.split()
        half = len(words) // 2
        if kind == "text":
            made.append({"text": text + (" <|endoftext|>" if i % 7 == 0 else "")})
        elif kind == "label":
            made.append({"text": text, "label": f"class {i % 3}"})
        elif kind in ("pair", "score"):
            answers = {"chosen": " ".join(words[half:]), "rejected": " ".join(words[:0:-1])}
            made.append({"prompt": words[0] if i % 3 else text} | answers)
        elif kind == "rating":
            made.append({"prompt": " ".join(words[:2]), "completion": " ".join(words[2:]), "label": i % 3 > 0})
        elif kind == "prompt":
            made.append({"prompt": " ".join(words[:half]), "completion": " ".join(words[half:])})
        else:
            turns = [{"role": "user", "content": " ".join(words[:half])}]
            if i != 40:
                turns.append({"role": "assistant", "content": " ".join(words[half:])})
            made.append({"messages": turns})
    return made


SPECS: dict[str, dict[str, Any]] = {
    "text": {},
    "label": {"task": "text-classification"},
    "prompt": {},
    "messages": {"dataset": {"chatTemplate": {"name": "zephyr"}}},
    "pair": {"task": "preference"},
    "rating": {"task": "preference", "preference": {"lossType": "kto"}},
    "score": {"task": "reward"},
}
SAID = {"score": "are left out; the reward is read at the end of an answer"}  # an answer is not cut there


@pytest.mark.parametrize("kind", SPECS)
def test_several_processes_make_the_same(
    kind: str, paragraphs: list[str], make_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, paragraphs)))
    spec = {"task": "causal-lm"} | SPECS[kind]
    run = make_run(**spec | {"dataset": {"files": [str(path)]} | spec.get("dataset", {})})
    made = []
    for processes in (1, PROCESSES):
        parallel.use(processes)
        notices.forget()
        task_object = task_of(run.spec)
        examples = read_examples(task_object, run, tmp_path / f"cache-{processes}")
        tokenizer = task_object.read_processor(tiny_model, "spec.model")
        data = task_object.encode(examples.train, tokenizer, run.spec, examples.labels, "training")
        assert (len(data.cache_files) >= PROCESSES) == (processes > 1), "a file a process, and perhaps one of indices"
        made.append((data.to_dict(), data.features, notices.given(), full_lengths.take("training").tolist()))
    assert made[0] == made[1]
    assert any(SAID.get(kind, "are cut") in text for text in made[0][2])


def test_a_process_that_is_killed_is_reported(tmp_path: Path) -> None:
    def killed(batch: dict[str, list[int]], indices: list[int]) -> dict[str, list[int]]:
        import os
        import signal

        if 0 not in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    parallel.use(2)
    data = Dataset.from_dict({"n": range(10)})
    with pytest.raises(Failure, match=r"^spec\.prepare\.numProc: one of 2 processes that convert rows was killed"):
        mapped(data, killed, data.features, parallel=True, with_indices=True)


def test_the_cores_are_those_of_the_control_group(tmp_path: Path) -> None:
    every = cores.available(tmp_path / "none")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.available(tmp_path) == every
    for quota, expect in ((50_000, 1), (100_000, 1), (150_000, 2), (10_000_000, every)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert cores.available(tmp_path) == min(expect, every)
    older = tmp_path / "older" / "cpu"
    older.mkdir(parents=True)
    (older / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expect in ((-1, every), (100_000, 1)):
        (older / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cores.available(tmp_path / "older") == expect


def test_few_rows_are_converted_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ROWS_A_PROCESS", 2_000)
    monkeypatch.setattr(cores, "available", lambda: 100)
    assert [parallel.processes(rows) for rows in (1, 3_999, 4_000, 10**6)] == [1, 1, 2, parallel.MOST]
    for resources, expect in (({"numProc": 64}, 64), ({"cpu": "2500m"}, 3), ({"numProc": 1, "cpu": 8}, 1), ({}, 32)):
        parallel.use(parallel.asked(PrepareResources.model_validate(resources)))
        assert parallel.processes(10**6) == expect
