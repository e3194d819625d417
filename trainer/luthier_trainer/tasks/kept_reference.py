"""Computes what the reference model says of all rows before the training, and keeps it in the workspace.

TRL's own way stops for no signal, keeps nothing before all rows are done, and reads all weights to name its file. Here
an attempt that is stopped leaves what it has computed, and the next one goes on from there.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from luthier_trainer.workspace.manifest import replace_file

if TYPE_CHECKING:
    from datasets import Dataset

KEY = "identity.json"
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # the names in TRL
BATCHES_AT_ONCE = 32  # of each process, between two files

Compute = Callable[[list[dict[str, Any]]], list[list[float]]]
"""Rows of a batch → the values of each row, [rows][columns]."""


class KeptReference:
    """The reference's log-probabilities of the rows, in a folder that belongs to one identity of a run."""

    def __init__(self, folder: Path, loop: Any) -> None:
        """`loop`: the trainer, a `training.resilience.Resilient`."""
        self.folder, self.loop, self.ranks = folder, loop, loop.ranks
        self.ranks.decide(self._begin)

    def _begin(self) -> None:
        key = json.dumps(self.loop.identity, sort_keys=True, default=str).encode()
        if (self.folder / KEY).exists() and (self.folder / KEY).read_bytes() == key:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        replace_file(self.folder / KEY, key)

    def with_reference(self, rows: Dataset, name: str, compute: Compute) -> Dataset:
        """Return `rows` with `COLUMNS`. All processes call this function; each computes a part.

        `name`: of the rows, for files. Raises what the trainer's callbacks raise when the run has to stop.
        """
        values = self.ranks.decide(lambda: self._stored(name))
        if len(values) and self.ranks.first:
            print(f"reference: {len(values):,} of {len(rows):,} rows of {name} are kept from before", flush=True)
        size = self.loop.args.per_device_eval_batch_size
        while len(values) < len(rows):
            begin = len(values)
            end = min(begin + BATCHES_AT_ONCE * size * self.ranks.count, len(rows))
            found = self.ranks.each(lambda begin=begin, end=end: self._part(rows, begin, end, size, compute))
            part = dict(pair for of_rank in found for pair in of_rank)
            values = numpy.concatenate([values, *(part[first] for first in sorted(part))])
            self.ranks.decide(lambda begin=begin, values=values: self._store(name, begin, values[begin:]))
            if self.ranks.first:
                print(f"reference: {end:,} of {len(rows):,} rows of {name}", flush=True)
            self.loop.callback_handler.on_prediction_step(self.loop.args, self.loop.state, self.loop.control)
        for i, column in enumerate(COLUMNS):
            rows = rows.add_column(column, values[:, i])
        return rows

    def _part(self, rows: Dataset, begin: int, end: int, size: int, compute: Compute) -> list[tuple[int, Any]]:
        """Return (first row, values of the batch) of the batches of this process, from row `begin` to row `end`."""
        starts = range(begin + self.ranks.rank * size, end, size * self.ranks.count)
        return [
            (first, numpy.array(compute(rows.select(range(first, min(first + size, end))).to_list()), numpy.float32))
            for first in starts
        ]

    def _stored(self, name: str) -> Any:
        """Return the values of the first rows that are kept, float32 of shape (rows, columns)."""
        parts = [numpy.zeros((0, len(COLUMNS)), numpy.float32)]
        begin = 0
        while (file := self._file(name, begin)).exists():
            parts.append(numpy.load(file))
            begin += len(parts[-1])
        return numpy.concatenate(parts)

    def _store(self, name: str, begin: int, values: Any) -> None:
        content = io.BytesIO()
        numpy.save(content, values)
        replace_file(self._file(name, begin), content.getvalue())

    def _file(self, name: str, begin: int) -> Path:
        return self.folder / f"{name}-{begin:012d}.npy"
