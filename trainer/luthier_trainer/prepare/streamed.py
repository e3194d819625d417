"""`prepare` of rows that are read while the model learns (`dataset.streaming`).

It finds the files, reads the first rows and the held-out ones, and writes no others. What it says of the rows is said
of the first ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import FineTuneRun, Origin
from luthier_trainer.data import remote
from luthier_trainer.data.filerows import Part
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.data.remarks import Remarks
from luthier_trainer.data.selection import Selection
from luthier_trainer.data.shards import Shards
from luthier_trainer.data.stores import refuse_unused
from luthier_trainer.data.streaming import DATASET, STREAMING, RowStream, Source, find
from luthier_trainer.prepare.examples import Examples
from luthier_trainer.runtime.failure import Failure, NothingLeft
from luthier_trainer.runtime.notices import collecting, notice
from luthier_trainer.tasks.base import Task
from luthier_trainer.tasks.rows import columns_of, usable
from luthier_trainer.workspace import provenance

SLICE = re.compile(r"([-._a-zA-Z0-9]+)(?:\[(\d*):(\d*)\])?")
MOST_HELD_OUT = 100_000  # rows, which are in memory together


def read_examples(task: Task, run: FineTuneRun, cache: Path) -> Examples:
    """Return the first rows for training, all held-out rows, and where `run` reads the others.

    Raises Failure if these rows do not suit the task, or if training and held-out rows overlap.
    """
    spec, data = run.spec, run.spec.dataset
    refuse_unused(spec.stores, data)
    split, begin, _ = _slice(data.split)
    source = find(data, split, "split", cache)
    selections = {"train": Selection("training"), "eval": Selection("held-out")}
    stream = _rows(source, task, spec, cache)
    place = (0, 0)
    if begin:
        found = stream.place_of(begin)
        if found is None:
            raise Failure(ExitCode.INVALID_DATASET, f"{DATASET}.split: {data.split} is empty: there are fewer rows")
        place = found
        begins = stream.stream.model_copy(update={"begin_file": place[0], "begin_row": place[1]})
        stream = replace(stream, stream=begins)
    head = _first(stream, task, spec, selections["train"])
    assert head.form is not None, "`fitting` has told the form"
    form = head.form.name
    pinned = pinned_to(spec, form)
    held_out = _held_out(source, split, begin, task, pinned, selections["eval"], cache)
    head = replace(head, origins=_origins(source), revision=source.revision)
    read = int(head.numbers[-1]) + 1 if head.numbers is not None else len(head.data)
    notice(
        f"{STREAMING}: `prepare` has looked at the first {read - place[1]} training rows only. A later row that cannot"
        " be read ends the training with its file and number; rows that are left out or cut are counted there"
    )
    return Examples(
        head,
        held_out,
        None,
        {},
        {name: selection.left_out for name, selection in selections.items()},
        stream=stream.stream.model_copy(update={"form": form}),
    )


def rows_learnt(spec: FineTuneJobSpec) -> int:
    """Return how many encoded rows a training learns from, with those that it sees several times."""
    assert spec.training.max_steps is not None, "the rules of the API want it"
    return spec.training.max_steps * spec.training.batch_size


def pinned_to(spec: FineTuneJobSpec, form: str) -> FineTuneJobSpec:
    """Return `spec` with the form of rows that the first ones tell."""
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"form": form})})


def _slice(instruction: str) -> tuple[str, int, int | None]:
    """Return (split, first row, row after the last one, or None). The rules of the API have checked its form."""
    found = SLICE.fullmatch(instruction)
    assert found, instruction
    return found[1], int(found[2] or 0), int(found[3]) if found[3] else None


def _rows(source: Source, task: Task, spec: FineTuneJobSpec, cache: Path) -> RowStream:
    shards = Shards(source.files, source.field, cache / "stream" / source.field)
    return RowStream(source.stream(), shards, columns_of(task, spec))


def _first(stream: RowStream, task: Task, spec: FineTuneJobSpec, selection: Selection) -> Rows:
    """Return the usable rows of the first window that has some. Raises Failure if there is none."""
    nothing: NothingLeft | None = None
    with closing(stream.first_lap()) as windows:
        for rows in windows:
            try:
                return usable(rows, task, spec, selection)[0]
            except NothingLeft as failure:
                nothing = failure
    assert nothing is not None, "a stream without rows is refused"
    raise nothing


def _held_out(
    source: Source, split: str, begin: int, task: Task, spec: FineTuneJobSpec, selection: Selection, cache: Path
) -> Rows | None:
    """Return all usable held-out rows; None if the job asks for none. Raises Failure if they would be learnt, too."""
    data = spec.dataset
    if data.eval_files:
        loader = Loader(data, DATASET, cache, columns=columns_of(task, spec), others=False, stores=spec.stores)
        found = loader.files(data.eval_files, "evalFiles")
        _refuse_shared(source, found)
        return usable(found, task, spec, selection)[0]
    if not data.eval_split:
        return None
    name, _, limit = _slice(data.eval_split)
    measured = source if name == split else find(data, name, "evalSplit", cache)
    if name == split and (limit is None or limit > begin):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{DATASET}.evalSplit: its rows are in split {data.split} too, and would be learnt and measured on."
            f" Write split: {split}[{limit or 1000}:] and evalSplit: {split}[:{limit or 1000}]",
        )
    rows = _joined(_limited(_rows(measured, task, spec, cache), limit), task, spec, selection)
    return replace(rows, origins=_origins(measured), revision=measured.revision)


def _limited(stream: RowStream, limit: int | None) -> Iterator[Rows]:
    """Yield the first `limit` rows of a stream, in windows; all if it is None. Raises Failure if these are too many."""
    left = MOST_HELD_OUT if limit is None else limit
    for rows in stream.first_lap():
        if limit is None and len(rows.data) > left:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{DATASET}.evalSplit: with streaming, held-out rows are kept in memory, and these are more than"
                f" {MOST_HELD_OUT}. Name fewer, for example evalSplit: test[:1000]",
            )
        yield rows if len(rows.data) <= left else rows.select(numpy.arange(left))
        left -= len(rows.data)
        if left <= 0:
            return


def _joined(windows: Iterator[Rows], task: Task, spec: FineTuneJobSpec, selection: Selection) -> Rows:
    """Return the usable rows of all windows. Raises Failure if there are none."""
    from datasets import concatenate_datasets

    found, numbers, parts = list[Rows](), list[numpy.ndarray](), list[Part]()
    nothing: NothingLeft | None = None
    remarks = Remarks()
    for window in windows:
        part = window.parts[0]
        if parts and parts[-1].path == part.path:
            parts.pop()
        before = sum(known.rows for known in parts)
        parts.append(part)
        with collecting() as texts:
            try:
                rows = usable(window, task, spec, selection)[0]
            except NothingLeft as failure:
                nothing = failure
                continue
        remarks.add(texts, window.origin)
        assert rows.numbers is not None
        found.append(rows)
        numbers.append(rows.numbers + before)
    if not found:
        raise nothing or Failure(ExitCode.INVALID_DATASET, f"{DATASET}: there are no held-out rows")
    for text in remarks.texts():
        notice(text)
    first = found[0]
    names = [name for name in first.data.column_names if all(name in rows.data.column_names for rows in found)]
    data = concatenate_datasets([rows.data.select_columns(names) for rows in found])
    origin = first.origin if len(parts) == 1 else f"{len(parts)} files ({parts[0].path.name}, ...)"
    return replace(first, data=data, numbers=numpy.concatenate(numbers), parts=tuple(parts), origin=origin)


def _origins(source: Source) -> tuple[Origin, ...]:
    """Return the provenance of files on volumes. What lies at an address is known when it has been read."""
    paths = [Path(name) for name in source.files if not remote.is_remote(name)]
    return tuple(provenance.of_streamed(path, source.field) for path in paths)


def _refuse_shared(source: Source, measured: Rows) -> None:
    """Raise Failure if a file of held-out rows is also a training file on a volume."""
    learnt = {origin.digest: origin.path for origin in _origins(source)}
    for part in measured.parts:
        if same := learnt.get(provenance.edges(part.path)):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{DATASET}.evalFiles: {part.path} holds the same as {same} of {source.field}, and would be learnt and"
                " measured on. Name other files",
            )
