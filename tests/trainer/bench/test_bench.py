"""What `luthier bench` measures, on the process that a pod starts, and what it computes of the measurements."""

from __future__ import annotations

import json
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from prepared_workspace import prepared_run

from luthier_api.run import FineTuneRun
from luthier_api.status import Memory, Plan
from luthier_trainer.bench import comparison, gpu, rounds
from luthier_trainer.bench.cases import SEED, Case, run_of, words
from luthier_trainer.bench.comparison import Device, beside_plan, figures, measurable, peers_of
from luthier_trainer.bench.rounds import Course, Program, Unmeasured, compared, take_turns
from luthier_trainer.workspace.flops import Flops

LENGTH, ROWS, BATCH = 20, 40, 4


def reported(name: str, blocks: list[dict[str, Any]], **memory: int) -> Program:
    """A program whose process has reported `blocks`."""
    return Program(name, Path(), Course(), None, Path(), None, blocks, memory)  # type: ignore[arg-type]


def block(wall: float, cpu: float, *losses: float, tokens: int = 0, computed: int = 0) -> dict[str, Any]:
    return {"wall": wall, "cpu": cpu, "losses": list(losses), "tokens": tokens, "computed": computed}


@pytest.mark.slow
def test_the_process_of_a_pod_is_measured_block_by_block(llama: Path, tmp_path: Path) -> None:
    rows = {"input_ids": [[5 + n % 7] * LENGTH for n in range(ROWS)], "length": [LENGTH] * ROWS}
    course = Course(warmup=1, block=2, rounds=2)
    run = prepared_run(
        tmp_path / "job",
        llama,
        DatasetDict(train=Dataset.from_dict(rows)),
        method={"type": "lora", "rank": 4},
        training={"maxSteps": course.steps, "batchSize": BATCH, "logSteps": 3},
    )
    (tmp_path / "run.json").write_text(json.dumps(run.dump()))
    deadline = time.monotonic() + 120
    (ours,) = comparison.start(tmp_path, course, peers=(), cpu=True)
    ours.wait("ready", deadline)

    assert take_turns([ours], course, deadline) == {}

    assert rounds.tokens_of(ours) == [(2 * BATCH * LENGTH, 2 * BATCH * LENGTH)] * course.rounds
    assert all(measured["cpu"] > 0 and measured["wall"] > 0 for measured in ours.blocks)
    assert [len(measured["losses"]) for measured in ours.blocks] == [2, 2]  # after steps 1 and 3
    assert 50e6 < ours.memory["warmpeak"] <= ours.memory["donepeak"] < 5e9
    assert not (tmp_path / "job/result").exists()


def test_a_program_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    program = Program.start("plain", tmp_path / "run.json", tmp_path, Course(), cpu=True)
    with pytest.raises(Unmeasured, match=r"plain: .*InvalidDocument"):
        program.wait("ready", time.monotonic() + 60)
    program.end()


def test_figures_are_medians_and_parts_of_the_peak() -> None:
    course = Course(block=10, rounds=3)
    ours = reported("ours", [block(1, 2), block(2, 4), block(9, 8)], donepeak=7, warmpeak=5, donereserved=8)
    tokens = [(1000, 1500)] * 3
    device = Device("a GPU", 80, peak_flops=1e6)
    assert figures(ours, course, tokens, Flops(model=100.0, hardware=120.0), device) == {
        "secondsPerStep": 0.2,
        "cpuSecondsPerStep": 0.4,
        "tokensPerSecond": 500,
        "computedTokensPerSecond": 750,
        "peakBytes": 7,
        "peakBytesOfLoading": 5,
        "reservedBytes": 8,
        "modelFlopsPerSecond": 50_000,
        "hardwareFlopsPerSecond": 90_000,
        "mfu": 0.05,
        "hfu": 0.09,
    }


def test_the_plan_is_beside_the_peak() -> None:
    ours = reported("ours", [], donepeak=60)
    memory = Memory(gpu={"weights": 50, "context": 7, "fragments": 3}, gpu_bytes=60, host_bytes=120)
    plan = Plan(strategy="none", steps=10, seconds=5, memory=memory)
    assert beside_plan(ours, plan) == {"plannedSecondsPerStep": 0.5, "plannedPeakBytes": 50, "peakOfPlanned": 1.2}
    on_cpu = Plan(strategy="none", memory=Memory(host_bytes=120))
    assert beside_plan(ours, on_cpu) == {"plannedPeakBytes": 120, "peakOfPlanned": 0.5}


def test_programs_are_compared_round_by_round() -> None:
    # A neighbour took half of the machine in round 2: the ratios do not notice it, medians of each would.
    ours = reported("ours", [block(1, 1, 5.0), block(2, 2, 5.0, 4.0), block(1, 1, 5.0, 4.0, 3.0)])
    peer = reported("trl", [block(2, 2, 5.0), block(4, 4, 5.0, 4.5), block(2, 4, 5.0, 4.5, 3.0)])
    assert compared(ours, peer) == {
        "secondsRatio": 0.5,
        "cpuSecondsRatio": 0.5,
        "cpuSecondsRatios": [0.5, 0.5, 0.25],
        "largestLossDifference": 0.5,
    }


@dataclass(frozen=True)
class Peers:
    name: str
    spec: dict[str, Any]
    left_out: list[str]


PEERS = [
    Peers("rows that are padded", {}, []),
    Peers("rows that are packed", {"training": {"packing": "isolated"}}, ["plain"]),
    Peers("a task that the peers are not written for", {"task": "reward"}, ["plain", "trl"]),
]


def run(tmp_path: Path, **spec: Any) -> FineTuneRun:
    base = {"task": "causal-lm", "model": {"path": "/data/m"}, "dataset": {"files": ["/data/r.jsonl"]}}
    return FineTuneRun.model_validate({"name": "a", "workspace": str(tmp_path), "spec": base | spec})


@pytest.mark.parametrize("case", PEERS, ids=lambda case: case.name)
def test_peers_that_cannot_do_the_same_are_left_out_with_a_reason(case: Peers, tmp_path: Path) -> None:
    chosen, left_out = peers_of(run(tmp_path, **case.spec), ("plain", "trl"))
    assert sorted(left_out) == case.left_out
    assert sorted([*chosen, *left_out]) == ["plain", "trl"]


def test_a_job_is_measured_without_checkpoints_and_evaluations(tmp_path: Path) -> None:
    training = {"epochs": 3, "warmupSteps": 500, "evalSteps": 10, "loadBestModel": True, "learningRate": 3e-4}
    dataset = {"files": ["/data/r.jsonl"], "evalFraction": 0.1}
    found = measurable(run(tmp_path, training=training, dataset=dataset, resources={"gpusPerNode": 0}), 30).spec
    kept = found.training
    assert (kept.max_steps, kept.warmup_steps, kept.eval_steps, kept.load_best_model) == (30, 29, None, False)
    assert (kept.learning_rate, found.dataset.eval_fraction) == (3e-4, None)
    assert (kept.save_steps or 0) > 30


def test_a_job_of_several_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unmeasured, match=r"spec.resources: the job trains in 8 processes"):
        measurable(run(tmp_path, resources={"gpusPerNode": 8}), 30)


def test_rows_are_random_words_that_a_seed_decides(tmp_path: Path) -> None:
    import numpy

    made = run_of(Case(max_length=64, batch_size=4), tmp_path, Path("/data/model"), steps=5)
    rows = [json.loads(line)["text"] for line in Path(made.spec.dataset.files[0]).read_text().splitlines()]
    assert len(rows) == 20
    assert all(4 <= len(row.split()) <= 48 for row in rows)
    assert words(numpy.random.default_rng(SEED), 9) == words(numpy.random.default_rng(SEED), 9)
    many = words(numpy.random.default_rng(SEED), 20_000).split()
    assert 1000 < len(set(many)) <= 2000


def test_the_suite_for_gpus_has_every_combination_once() -> None:
    cases = {entry.case for entry in gpu.SUITE}
    assert len(cases) == len(gpu.SUITE) == 16
    assert {(case.model, case.method, case.packing, case.compiled) for case in cases} == {
        (model, method, packing, compiled)
        for model in ("llama-1b", "llama-8b")
        for method in ("lora", "qlora")
        for packing in ("none", "isolated")
        for compiled in (False, True)
    }
    assert all(entry.case.model == "tiny" and not entry.case.gpus for entry in gpu.suite(True, []))
    assert {entry.case.name for entry in gpu.suite(False, ["8b", "qlora"])} == set()
    assert {entry.case.model for entry in gpu.suite(False, ["llama-8b", "qlora"])} == {"llama-8b"}


def test_models_are_not_written_where_no_job_reads_them(tmp_path: Path) -> None:
    assert gpu.folder_for_models(str(tmp_path / "new")).is_dir()
    with pytest.raises(ArgumentTypeError, match="jobs read nothing below /dev"):
        gpu.folder_for_models("/dev/shm/models")
