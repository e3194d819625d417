"""Which rows of a source a task uses: those that the filters keep, and that it can read."""

from __future__ import annotations

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data.load import Rows
from luthier_trainer.data.selection import Selection
from luthier_trainer.tasks.base import Task


def columns_of(task: Task, spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Return the columns to read: those of the task, and those by which rows are filtered."""
    filters = (spec.dataset.filter and spec.dataset.filter.columns) or []
    return tuple(dict.fromkeys([*task.columns(spec), *(wanted.column for wanted in filters)]))


def usable(rows: Rows, task: Task, spec: FineTuneJobSpec, selection: Selection) -> tuple[Rows, int]:
    """Return (the rows that the filters keep and the task can read, how many it cannot read). Raises Failure."""
    wanted = spec.dataset.filter
    if wanted is not None:
        rows = selection.by_columns(rows, wanted.columns or [], task.columns(spec))
    fitting = task.fitting(rows, spec)
    lost = len(rows.data) - len(fitting.data)
    if wanted is not None:
        fitting = selection.by_characters(fitting, wanted, lambda rows: task.contents(rows, spec))
    return fitting, lost
