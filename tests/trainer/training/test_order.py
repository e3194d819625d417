"""Rows of similar lengths share a step: the same rows for any number of processes, and after any resumption."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import numpy
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.lengths import by_length, computed_tokens, longest_first, notice_padding
from luthier_trainer.tasks.text_to_image import TextToImage
from luthier_trainer.training.order import ByLength, InGroups
from luthier_trainer.workspace.plan import plan_training

LENGTHS = numpy.random.default_rng(0).geometric(1 / 60, 1003).clip(2, 512)
STEP = 16  # rows


def micro_batches(processes: int, micro: int, epoch: int, skipped: int = 0) -> list[list[list[int]]]:
    """The micro-batches of each process, as accelerate deals them out."""
    found = []
    for rank in range(processes):
        sampler = ByLength(LENGTHS.tolist(), STEP, seed=1)
        sampler.epoch = epoch
        shard = BatchSamplerShard(BatchSampler(sampler, micro, False), processes, rank, even_batches=False)
        found.append(list(SkipBatchSampler(shard, skipped)))
    return found


def steps(batches: list[list[list[int]]], micro: int) -> list[list[int]]:
    """The rows of each step, sorted."""
    accumulated = STEP // (micro * len(batches))
    most = max(map(len, batches))
    return [
        sorted(row for process in batches for batch in process[begin : begin + accumulated] for row in batch)
        for begin in range(0, most, accumulated)
    ]


@dataclass(frozen=True)
class Layout:
    processes: int
    micro: int


LAYOUTS = [Layout(1, 16), Layout(1, 4), Layout(2, 8), Layout(2, 1), Layout(8, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.processes} x {layout.micro}")
def test_a_step_has_the_same_rows_on_any_number_of_processes(layout: Layout) -> None:
    expect = [
        sorted(rows.tolist()) for rows in numpy.array_split(by_length(LENGTHS, STEP, 1, 3), range(STEP, 1003, STEP))
    ]
    assert steps(micro_batches(layout.processes, layout.micro, 3), layout.micro) == expect
    assert sorted(row for rows in expect for row in rows) == list(range(len(LENGTHS)))


def test_epochs_differ_and_can_be_entered_anywhere() -> None:
    assert micro_batches(2, 8, epoch=1, skipped=5) == [process[5:] for process in micro_batches(2, 8, epoch=1)]
    assert micro_batches(2, 8, epoch=1) != micro_batches(2, 8, epoch=2)


def test_steps_are_in_random_order_after_the_longest() -> None:
    order = by_length(LENGTHS, STEP, 1, 0)
    assert LENGTHS[order[0]] == LENGTHS.max()
    means = [LENGTHS[order[begin : begin + STEP]].mean() for begin in range(STEP, 992, STEP)]
    assert abs(numpy.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_there_is_little_padding() -> None:
    """At random, more than two tokens are computed for each real one."""
    grouped = by_length(LENGTHS, STEP, 1, 0)
    assert computed_tokens(LENGTHS, grouped, 8) < 1.1
    assert computed_tokens(LENGTHS, numpy.random.default_rng(1).permutation(len(LENGTHS)), 8) > 2


def test_computed_tokens() -> None:
    assert computed_tokens(numpy.array([4, 2, 3]), numpy.array([1, 0, 2]), 2) == (4 + 4 + 3) / 9


def test_much_padding_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    notice_padding([50, 52] * 500, STEP, 8, can_pack=True)
    assert capsys.readouterr().out == ""
    notice_padding([10, 50] * 500, STEP, 8, can_pack=True)
    assert capsys.readouterr().out == (
        "spec.training.groupByLength: rows are padded to the longest of 8, so that about 1.7 tokens are computed for"
        " each real one. Set it to true for about 1.0, or packing: isolated for hardly any padding\n"
    )
    notice_padding([10, 50] * 500, STEP, 8, can_pack=True, can_group=False)
    assert capsys.readouterr().out == (
        "spec.training.packing: rows are padded to the longest of 8, so that about 1.7 tokens are computed for each"
        " real one. Set it to isolated for hardly any padding\n"
    )


def test_few_rows() -> None:
    """Fewer than a step has."""
    assert sorted(by_length(LENGTHS[:5], STEP, 1, 0).tolist()) == list(range(5))


def test_an_evaluation_begins_with_the_longest() -> None:
    assert longest_first([3, 9, 5]) == [1, 2, 0]


GROUPS = [0] * 5 + [1] * 8 + [2] + [3] * 27
random.Random(1).shuffle(GROUPS)


def dealt(processes: int, micro: int, epoch: int, skipped: int = 0) -> list[list[list[int]]]:
    """The micro-batches of each process, as accelerate deals them out."""
    found = []
    for rank in range(processes):
        sampler = InGroups(GROUPS, micro, seed=1)
        sampler.epoch = epoch
        shard = BatchSamplerShard(BatchSampler(sampler, micro, False), processes, rank, even_batches=False)
        found.append(list(SkipBatchSampler(shard, skipped)))
    return found


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(1, 4), Layout(3, 4), Layout(4, 1)], ids=str)
def test_a_micro_batch_has_rows_of_one_group(layout: Layout) -> None:
    """Each row comes once in an epoch, if repetitions within a micro-batch are left out."""
    processes = dealt(layout.processes, layout.micro, epoch=1)
    batches = [batch for process in processes for batch in process]
    assert all(len({GROUPS[row] for row in batch}) == 1 for batch in batches)
    assert sorted(row for batch in batches for row in set(batch)) == list(range(len(GROUPS)))
    short = sum(len(set(batch)) < layout.micro for batch in batches)
    assert short == sum(GROUPS.count(group) % layout.micro > 0 for group in range(4))


def test_the_same_batches_for_any_number_of_processes() -> None:
    (alone,) = dealt(1, 4, epoch=1)
    both = dealt(2, 4, epoch=1)
    assert [batch for of_both in itertools.zip_longest(*both) for batch in of_both if batch] == alone


def test_an_epoch_of_groups_can_be_entered_anywhere() -> None:
    assert dealt(2, 4, epoch=1, skipped=2) == [process[2:] for process in dealt(2, 4, epoch=1)]
    assert dealt(1, 4, epoch=1) != dealt(1, 4, epoch=2)


@pytest.mark.parametrize(("processes", "micro", "accumulated"), [(1, 4, 1), (1, 4, 2), (2, 4, 2), (3, 1, 2)])
def test_steps_of_groups_are_those_planned(processes: int, micro: int, accumulated: int) -> None:
    spec = FineTuneJobSpec.model_validate(
        {
            "task": "text-to-image",
            "model": {"id": "a/b"},
            "dataset": {"id": "a/c"},
            "image": {"bucketStep": 64},
            "method": {"type": "lora"},
            "training": {"epochs": 3, "batchSize": processes * micro * accumulated, "microBatchSize": micro},
            "resources": {"gpusPerNode": processes},
        }
    )
    sizes = [GROUPS.count(group) for group in range(4)]
    plan = plan_training(spec, TextToImage().epoch_rows(spec, len(GROUPS), sizes), None)
    batches = sum(math.ceil(size / micro) for size in sizes)
    assert plan.steps == 3 * math.ceil(batches / (processes * accumulated))
    assert len(InGroups(GROUPS, micro, seed=1)) == batches * micro
