"""The rows of a GenerateJob: read from the spec or a dataset, and written to `rows.jsonl` with their seeds.

Rows pass twice through a file, and are never held together. First those that are worked on are made of those that were
read (`sweeps`), so that the model can be checked against them; then they are written as the shards read them. A row
that cannot be worked on keeps its place, with the reason. A row without a seed gets one that follows from the job's
seed and from the row: its identifier, or else its contents, and of equal rows which of them it is. So neither other
rows nor their order change an output.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from luthier_api.outputs import BATCH
from luthier_api.run import GenerateRun, Origin
from luthier_api.status import ResolvedDataset
from luthier_api.tasks import GENERATION_TASKS, REFERENCE
from luthier_trainer.data import chats, columns
from luthier_trainer.data.load import Loader
from luthier_trainer.data.remote import without_query
from luthier_trainer.data.stores import refuse_unused
from luthier_trainer.generation import rows as prepared_rows
from luthier_trainer.generation.overrides import problem_of
from luthier_trainer.generation.rows import Line, Written
from luthier_trainer.generation.samples import derive_seed
from luthier_trainer.prepare import batch_requests, other_job, sweeps
from luthier_trainer.prepare.bad_rows import BadRow
from luthier_trainer.prepare.generation_cells import (
    INPUTS,
    TEXTS,
    cells,
    inline,
    is_chat,
    named,
    required_roles,
    some_text,
)
from luthier_trainer.prepare.sweeps import Point, Template
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import provenance


@dataclass(frozen=True)
class ReadRows:
    """The rows as they were read, in a file. They can be read several times."""

    path: Path
    hashes: array[int]
    """What identifies each row of the inputs."""
    points: int
    """Rows that a sweep has made of each of them, one after the other."""

    def __iter__(self) -> Iterator[Line]:
        return prepared_rows.read(self.path)

    def __len__(self) -> int:
        return len(self.hashes) * self.points


def read_inputs(run: GenerateRun, cache: Path) -> tuple[ReadRows, ResolvedDataset, tuple[Origin, ...]]:
    """Read the rows of a job into a file below `cache`. Returns them, the resolved dataset, and the provenance of its
    files. Raises Failure if no rows can be read, or none of them can be worked on.
    """
    spec, inputs = run.spec, run.spec.inputs
    refuse_unused(spec.stores, inputs.dataset)
    if inputs.dataset:
        needed = batch_requests.COLUMNS if inputs.form == BATCH else needed_columns(run)
        loader = Loader(inputs.dataset, f"{INPUTS}.dataset", cache, columns=needed, stores=spec.stores)
        rows = loader.split(inputs.dataset.split, "split")
        source = inputs.dataset.id or ", ".join(map(without_query, inputs.dataset.files or []))
    elif inputs.job:
        rows, source = other_job.rows(run, inputs.job, cache), f"GenerateJob {inputs.job}"
    else:
        found = kept(inline(run), run, cache)
        return found, ResolvedDataset(source="inline", rows=len(found)), ()
    revision = provenance.combined(origin.digest for origin in rows.origins) if rows.origins else rows.revision
    read = batch_requests.lines if inputs.form == BATCH else cells
    found = kept(read(rows, run), run, cache)
    return found, ResolvedDataset(source=source[:300], revision=revision, rows=len(found)), rows.origins


def needed_columns(run: GenerateRun) -> tuple[str, ...]:
    """Return the columns that must be in all files of a dataset, or in none."""
    roles = named(run)
    return tuple(roles[role] for role in (*required_roles(run), REFERENCE) if role in roles)


def kept(lines: Iterable[Line], run: GenerateRun, cache: Path) -> ReadRows:
    """Write the rows that are worked on into a file, with their numbers. A notice says how many of them cannot be.

    Raises Failure if none can.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path, hashes = cache / "rows.jsonl", array("Q")
    made = sweeps.points(run.spec.inputs, GENERATION_TASKS[run.spec.task].settings)
    make = Maker(run)
    row, bad, first = 0, 0, ""
    with path.open("wb") as file:
        for line in lines:
            hashes.append(identity(line))
            for point in made:
                whole = make.row(line, point)
                if "error" in whole:
                    bad, first = bad + 1, first or f"row {row}: {whole['error']}"
                text = json.dumps({"row": row} | whole, ensure_ascii=False)
                file.write(text.encode("utf-8", "surrogatepass") + b"\n")
                row += 1
    if bad == row:
        raise columns.invalid(f"{INPUTS}: not one row can be worked on. First of them: {first}")
    if bad:
        notice(f"{INPUTS}: {bad} of {row} rows cannot be worked on; their outputs are errors. First: {first}")
    return ReadRows(path, hashes, len(made))


class Maker:
    """Makes the rows that are worked on, of rows that were read and points of the sweep."""

    def __init__(self, run: GenerateRun) -> None:
        self.run, self.block = run, GENERATION_TASKS[run.spec.task].settings
        self.template = Template.of(run.spec.inputs.template) if run.spec.inputs.template else None
        self.problems: dict[str, str | None] = {}
        """What rows override, as JSON → why it does not go together with the settings of the job, if so."""

    def row(self, line: Line, point: Point) -> Line:
        """Return the row, with its prompt, what it overrides, and its number of outputs if it overrides that."""
        whole = {name: value for name, value in line.items() if name != TEXTS}
        if point.fields:
            whole["input"] = {**whole.get("input", {}), **point.fields}
        if point.seed is not None:
            whole["seed"] = point.seed
        if "error" in whole:
            return whole
        try:
            if self.template:
                whole["prompt"] = self.prompt({**line.get(TEXTS, {}), **point.fields})
            if overrides := {**line.get("settings", {}), **point.settings}:
                self.check(overrides, whole)
                outputs = overrides.pop("perPrompt", None)
                whole |= {"outputs": outputs} if outputs is not None else {}
                whole["settings"] = overrides
        except BadRow as problem:
            whole["error"] = str(problem)
        return {name: value for name, value in whole.items() if name != "settings" or value}

    def prompt(self, texts: dict[str, str]) -> str | list[chats.Message]:
        """Return what the template writes. Raises BadRow if the row lacks a text."""
        assert self.template is not None, "only called with a template"
        try:
            text = some_text(self.template.write(texts))
        except KeyError as error:
            raise BadRow(f"template: the row has no {error.args[0]}; it has {columns.some(texts) or 'none'}") from None
        return [{"role": "user", "content": text}] if is_chat(self.run) else text

    def check(self, overrides: dict[str, Any], line: Line) -> None:
        """Raise BadRow if what a row overrides does not go together with the settings of the job, or with the row."""
        text = json.dumps(overrides, sort_keys=True)
        if text not in self.problems:
            if len(self.problems) >= prepared_rows.MOST_KNOWN:
                self.problems.clear()
            self.problems[text] = problem_of(self.block, self.run.spec.settings, overrides)
        if self.problems[text]:
            raise BadRow(str(self.problems[text]))
        if "negativePrompt" in line and overrides.get("guidance", 2) <= 1:
            raise BadRow(
                "negativePrompt: has no effect with image.guidance up to 1; remove it, or set guidance above 1"
            )


def identity(line: Line) -> int:
    """Return 64 bits that identify a row: by its identifier, or else by all that its output depends on."""
    own = {name: value for name, value in line.items() if name not in ("input", REFERENCE)}
    own = {"id": line["id"]} if "id" in line else own
    text = json.dumps(own, sort_keys=True).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def repeats(found: ReadRows) -> Any:
    """Return which of the rows with the same identity each row is, from 0: an array of integers."""
    import numpy

    hashes = numpy.frombuffer(found.hashes, dtype=numpy.uint64)
    order = numpy.argsort(hashes, kind="stable")
    starts = numpy.flatnonzero(numpy.diff(hashes[order], prepend=~hashes[order[:1]]))
    counts = numpy.empty(len(hashes), dtype=numpy.int64)
    counts[order] = numpy.arange(len(hashes)) - numpy.repeat(starts, numpy.diff(starts, append=len(hashes)))
    return counts


def write_rows(run: GenerateRun, found: ReadRows, path: Path, render: Callable[[Line], Line]) -> Written:
    """Write the rows as the shards read them. `render`: writes the prompt of a row, and raises BadRow if it cannot.

    Raises Failure if more rows cannot be worked on than the job allows.
    """
    copies = repeats(found)
    report_repeats(found, copies)
    failed: list[str] = []
    count = 0

    def finished() -> Iterator[Line]:
        nonlocal count
        for line in found:
            whole, source = rendered(line, render), line["row"] // found.points
            if "seed" not in whole and draws(run):
                number = [str(copies[source])] if copies[source] else []
                whole["seed"] = derive_seed(run.spec.seed, f"{found.hashes[source]:016x}", *number)
            if "error" in whole:
                count += 1
                failed[:] = failed or [f"row {whole['row']}: {whole['error']}"]
            yield whole

    written = prepared_rows.write(path, finished(), run.spec.per_prompt)
    limit = run.spec.max_failed_rows
    if count == written.rows:
        raise columns.invalid(f"{INPUTS}: not one row can be worked on. First of them: {failed[0]}")
    if limit is not None and count > limit:
        raise columns.invalid(
            f"spec.maxFailedRows: {count} of {written.rows} rows cannot be worked on, and {limit} are allowed. First of"
            f" them: {failed[0]}. Correct the rows, or raise maxFailedRows"
        )
    return written


def draws(run: GenerateRun) -> bool:
    """Return whether outputs of the job's task depend on a seed."""
    return "seed" in GENERATION_TASKS[run.spec.task].optional_columns


def rendered(line: Line, render: Callable[[Line], Line]) -> Line:
    """Return the line with its prompt as the model reads it, or with one output, an error, if it has none."""
    if "error" not in line:
        try:
            return render(line)
        except BadRow as error:
            line = line | {"error": str(error)}
    roles = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in line.items() if is_role(name)}
    return line | roles | {"outputs": 1}


def is_role(name: str) -> bool:
    """Return whether a key of a line is a role of the task."""
    return name not in prepared_rows.OWN


def report_repeats(found: ReadRows, copies: Any) -> None:
    """Give a notice of rows that repeat others."""
    again = int((copies > 0).sum())
    if again:
        first = int((copies > 0).argmax())
        with_id = next(line for line in found if line["row"] == first * found.points).get("id")
        what = "have the id of an earlier one" if with_id is not None else "are the same as an earlier one"
        shown = f" ({with_id})" if with_id is not None else ""
        notice(
            f"{INPUTS}: {again} of {len(copies)} rows {what}; each gets outputs and a seed of its own. The first is row"
            f" {first}{shown}"
        )
