"""The tables of tasks, methods and quantisations: one row for each member of an enum, and rows that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import pytest

from luthier_api.formats import FORMATS, DatasetFormat
from luthier_api.methods import METHODS, QUANTIZATIONS, STRATEGIES, MethodType, QuantizationType, Strategy
from luthier_api.optimizers import OPTIMIZERS, OptimizerName
from luthier_api.schedules import EVAL_INTERVALS, SAVE_INTERVALS, SCHEDULES, Interval, ScheduleName
from luthier_api.tasks import (
    BEST_METRICS,
    EVAL_LOSS,
    GENERATION_TASKS,
    TASKS,
    TRAINING_TASKS,
    FineTuneTask,
    GenerateTask,
)


@dataclass(frozen=True)
class Table:
    name: str
    members: Any
    rows: Any


TABLES = [
    Table(name="FineTuneTask", members=FineTuneTask, rows=TRAINING_TASKS),
    Table(name="GenerateTask", members=GenerateTask, rows=GENERATION_TASKS),
    Table(name="DatasetFormat", members=DatasetFormat, rows=FORMATS),
    Table(name="MethodType", members=MethodType, rows=METHODS),
    Table(name="QuantizationType", members=QuantizationType, rows=QUANTIZATIONS),
    Table(name="OptimizerName", members=OptimizerName, rows=OPTIMIZERS),
    Table(name="ScheduleName", members=ScheduleName, rows=SCHEDULES),
    Table(name="Interval, of evaluations", members=Interval, rows=EVAL_INTERVALS),
    Table(name="Interval, of checkpoints", members=Interval, rows=SAVE_INTERVALS),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_each_member_has_a_row_and_each_row_a_member(table: Table) -> None:
    assert list(table.rows) == list(get_args(table.members))


def test_checkpoints_can_be_compared_by_each_metric_that_rates_a_model() -> None:
    rating = {metric.name for task in TRAINING_TASKS.values() for metric in task.metrics if metric.better}
    assert set(BEST_METRICS) == rating | {EVAL_LOSS}


def test_each_task_trains_or_generates() -> None:
    assert [name for name, task in TASKS.items() if not (task.training or task.generation)] == []


@pytest.mark.parametrize("name", TRAINING_TASKS)
def test_a_training_task_names_what_exists(name: str) -> None:
    task = TRAINING_TASKS[name]
    assert task.columns or "dataset.form" in task.options
    assert set(task.methods) <= set(METHODS)
    assert set(task.quantizations) <= set(QUANTIZATIONS)
    assert set(task.formats) <= set(get_args(DatasetFormat))
    assert task.columns.keys() & task.optional_columns.keys() == set()


@pytest.mark.parametrize("name", TRAINING_TASKS)
def test_a_task_suits_a_method_only_with_its_quantisation(name: str) -> None:
    task = TRAINING_TASKS[name]
    implied = {METHODS[method].quantization for method in task.methods} - {None}
    assert implied <= set(task.quantizations)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_what_exists(name: MethodType) -> None:
    method = METHODS[name]
    assert set(method.strategies) <= set(STRATEGIES) == set(get_args(Strategy))
    assert set(method.quantizations) <= set(QUANTIZATIONS)
    assert method.quantization is None or method.quantization in method.quantizations


@pytest.mark.parametrize("name", METHODS)
def test_only_frozen_weights_are_quantised_and_only_adapters_are_merged(name: MethodType) -> None:
    method = METHODS[name]
    if not method.adapter:
        assert (method.mergeable, method.weighted, method.quantizations) == (False, False, ())
