"""A run that is stopped goes on to the last bit, with each way to share the work and wherever it is stopped.

The attempt that goes on has processes of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import losses, packed_data, prepared_run, prose, without_the_machine
from safetensors.torch import load_file
from trainer.distributed.groups import Group, free_port
from trainer.distributed.one_after_another import STOP_AT
from transformers import AutoTokenizer

from luthier_api.run import FineTuneRun

STRATEGIES = ("none", "ddp", "zero2", "zero3", "fsdp")
WHOLE, AGAIN = "whole", "again"
STEPS = 8  # an epoch of nine rows has three, the last one of one row


@dataclass(frozen=True)
class Case:
    name: str
    stop: int
    """The step in which the run is told to stop."""
    packed: bool = False
    micro_batch: int = 2
    """Of four rows in a step."""

    @property
    def course(self) -> str:
        """The name of the run that is not stopped. Cases with the same settings share one."""
        return f"{WHOLE}-{self.packed}-{self.micro_batch}"


CASES = [
    Case(name="inside the first epoch", stop=2),
    Case(name="at the end of an epoch", stop=3),
    Case(name="inside the second epoch", stop=5),
    Case(name="packed", stop=4, packed=True),
    Case(name="with accumulation", stop=5, micro_batch=1),
]


@dataclass(frozen=True)
class Courses:
    """The runs of a strategy: those that nobody stops, and the others in both of their attempts.

    Among the second attempts is the course of the first case, from its beginning, by processes that know nothing of it.
    """

    first: Group
    second: Group


Rows = Callable[[bool], DatasetDict]


@pytest.fixture(scope="module")
def rows(llama: Path, prose_data: DatasetDict, paragraphs: list[str]) -> Rows:
    """Nine rows, packed or not, and as many to evaluate on."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    packed = packed_data(tokenizer, prose(paragraphs), 9)
    plain = DatasetDict({name: some.select(range(9)) for name, some in prose_data.items()})
    return lambda is_packed: packed if is_packed else plain


@pytest.fixture(scope="module")
def trained(
    llama: Path, rows: Rows, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Courses]:
    @functools.cache
    def of(strategy: str) -> Courses:
        if strategy.startswith("zero"):
            request.getfixturevalue("deepspeed_operators")
        first, second = (Group(tmp_path_factory.mktemp(name), {}) for name in ("first", "second"))
        for case in CASES:
            for name, stop in ((case.course, None), (case.name, case.stop)):
                if name not in first.runs:
                    first.runs[name] = make(first.folder / name, llama, rows(case.packed), strategy, case.micro_batch)
                if stop is not None:
                    (first.folder / name / STOP_AT).write_text(str(stop))
            second.runs[case.name] = first.runs[case.name]
            (second.folder / case.name).mkdir()
        again = make(second.folder / AGAIN, llama, rows(CASES[0].packed), strategy, CASES[0].micro_batch)
        second.runs[AGAIN] = again
        first.train_all()
        second.train_all()
        return Courses(first, second)

    return of


def make(root: Path, model: Path, data: DatasetDict, strategy: str, micro_batch: int) -> FineTuneRun:
    alone = strategy == "none"
    training: dict[str, Any] = {"batchSize": 4, "microBatchSize": micro_batch, "maxSteps": STEPS, "learningRate": 1e-2}
    if "seq_lengths" in data["train"].features:
        training["packing"] = "isolated"
    return prepared_run(
        root / "job",
        model,
        data,
        port=free_port(),
        method={"type": "lora", "rank": 4, "dropout": 0.1},
        strategy="auto" if alone else strategy,
        training=training,
        resources={"processesPerNode": 1 if alone else 2},
    )


def result(run: FineTuneRun) -> dict[str, torch.Tensor]:
    return load_file(Path(run.workspace) / "result/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_goes_on_to_the_last_bit(case: Case, strategy: str, trained: Callable[[str], Courses]) -> None:
    courses = trained(strategy)
    whole, resumed = courses.first.runs[case.course], courses.second.runs[case.name]
    assert {(m.code, m.step, m.saved) for m in courses.first.ends(case.name)} == {(75, case.stop, True)}
    assert {(m.code, m.step) for m in courses.second.ends(case.name)} == {(0, STEPS)}
    assert f"resuming from checkpoint-{case.stop}" in courses.second.log(case.name)
    assert len(losses(whole)) == STEPS
    assert losses(resumed) == losses(whole)
    weights = result(resumed)
    assert weights
    assert all(torch.equal(weights[name], weight) for name, weight in result(whole).items())
    found, expect = (
        without_the_machine(group.ends(name)[0].metrics or {})
        for group, name in ((courses.second, case.name), (courses.first, case.course))
    )
    assert found == expect


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_bits(strategy: str, trained: Callable[[str], Courses]) -> None:
    courses = trained(strategy)
    once, again = courses.first.runs[CASES[0].course], courses.second.runs[AGAIN]
    assert losses(again) == losses(once)
    weights = result(once)
    assert all(torch.equal(weights[name], weight) for name, weight in result(again).items())
