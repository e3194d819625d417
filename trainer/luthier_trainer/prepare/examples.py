"""Reads the rows of a FineTuneJob, chooses those that are used, and divides them into training and held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun
from luthier_trainer.data import files, repeats
from luthier_trainer.data.holdout import hold_out
from luthier_trainer.data.load import Loader, Rows, ranges
from luthier_trainer.data.selection import DEDUPLICATE, FILTER, Selection, deduplicated
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Task

DATASET = "spec.dataset"
FRACTION = f"{DATASET}.evalFraction"


@dataclass(frozen=True)
class Examples:
    """The rows that fit the task, before they are encoded."""

    train: Rows
    eval: Rows | None
    labels: list[str] | None = None
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Split → rows of the source that the task cannot read."""
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split → field of `spec.dataset` → rows that it left out."""

    @property
    def splits(self) -> dict[str, Rows]:
        """Return the rows by the name of their split."""
        return {"train": self.train} | ({"eval": self.eval} if self.eval else {})


def read_examples(task: Task, run: FineTuneRun, cache: Path) -> Examples:
    """Return the rows for training and evaluation, with the columns that the task needs.

    Raises Failure if the data does not suit the task, or if both overlap.
    """
    spec, data = run.spec, run.spec.dataset
    filters = (data.filter and data.filter.columns) or []
    needed = task.columns(spec)
    loader = Loader(
        data,
        DATASET,
        cache,
        columns=tuple(dict.fromkeys([*needed, *(wanted.column for wanted in filters)])),
        others=False,
        documents=spec.training.packing == "concatenate",
    )
    read = {"train": loader.split(data.split, "split")}
    if data.eval_split:
        read["eval"] = loader.split(data.eval_split, "evalSplit")
        refuse_overlap(run, loader)
    elif data.eval_files:
        read["eval"] = loader.files(data.eval_files, "evalFiles")
        files.refuse_shared(read["train"].origins, read["eval"].origins)
    _refuse_selection_of_lines(spec, read["train"])

    unusable, labels, splits = dict[str, int](), None, dict[str, Rows]()
    selections = {"train": Selection("training"), "eval": Selection("held-out")}
    for name, rows in read.items():
        chosen = selections[name].by_columns(rows, filters, needed)
        usable = task.fitting(chosen, spec)
        unusable[name] = len(chosen.data) - len(usable.data)
        if data.filter is not None:
            usable = selections[name].by_characters(usable, data.filter, lambda rows: task.contents(rows, spec))
        if name == "train":
            labels = task.labels(usable, spec)
        else:
            task.label_ids(usable, spec, labels)
        splits[name] = usable
    train, evaluation = splits["train"], splits.get("eval")
    if data.deduplicate is not None:
        train, evaluation = deduplicated(train, evaluation, selections, lambda rows: task.contents(rows, spec))
    if data.eval_fraction is not None and not train.documents:
        train, evaluation = _divided(task, train, spec, labels)
    left_out = {name: selection.left_out for name, selection in selections.items()}
    return Examples(train, evaluation, labels, unusable, left_out)


def _divided(task: Task, rows: Rows, spec: FineTuneJobSpec, labels: list[str] | None) -> tuple[Rows, Rows]:
    """Return (training, held-out) rows by `dataset.evalFraction`. Equal rows are on the same side."""
    fraction = spec.dataset.eval_fraction
    assert fraction is not None
    total = len(rows.data)
    groups = repeats.groups_of(task.contents(rows, spec))
    classes = task.label_ids(rows, spec, labels)
    kept, held = hold_out(total, fraction, spec.training.seed, FRACTION, classes, groups)
    repeated = total - int(groups.max()) - 1
    if repeated:
        print(
            f"{FRACTION}: {repeated} of {total} rows are equal to an earlier row. Equal rows are all learnt or all held"
            " out",
            flush=True,
        )
    wanted = round(total * fraction)
    if len(held) < wanted and repeated:
        notice(
            f"{FRACTION}: {len(held)} rows are held out, and not {wanted}, because equal rows are all learnt or all"
            f" held out, and {repeated} of {total} rows are equal to an earlier row. Set dataset.deduplicate: exact to"
            " use each once"
        )
    return rows.select(kept), rows.select(held)


def _refuse_selection_of_lines(spec: FineTuneJobSpec, rows: Rows) -> None:
    """Raise Failure if rows are to be left out of text files that are read as they were written."""
    asked = [name for name, value in ((FILTER, spec.dataset.filter), (DEDUPLICATE, spec.dataset.deduplicate)) if value]
    if rows.documents and asked:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{asked[0]}: packing concatenate reads text files as whole documents, which have no rows that could be"
            " left out. Remove it, choose another packing, or write the texts as rows of JSON lines",
        )


def refuse_overlap(run: FineTuneRun, loader: Loader) -> None:
    """Raise Failure if rows are used for both training and evaluation, which makes all metrics too good."""
    data = run.spec.dataset
    split, other = data.split.partition("[")[0], str(data.eval_split).partition("[")[0]
    if split != other:
        return
    whole = loader.split(split, "split").data
    learnt, measured = (
        {i for start, end in ranges(whole, s, [split], f"{DATASET}.{f}") for i in range(start, end)}
        for s, f in ((data.split, "split"), (str(data.eval_split), "evalSplit"))
    )
    if both := len(learnt & measured):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{DATASET}.evalSplit: {both} of its rows are in split {data.split} too, and would be learnt and measured"
            f" on. Choose parts that do not overlap, such as {split}[:90%] and {split}[90%:]",
        )
