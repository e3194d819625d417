"""The file of prepared rows: `prepare` writes it once, and each shard reads only its own part of it.

A line is a row: its number, the contents of its roles, its seed, and where there are any its identifier, what it
overrides, its other columns, or why it cannot be read. An index beside it holds the position of every thousandth row,
so that a shard begins to read near its first output. No reader holds all rows in memory.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from luthier_api.task_settings import Settings
from luthier_api.tasks import REFERENCE, TOOLS
from luthier_trainer.generation.samples import Sample, sample_seed
from luthier_trainer.workspace.manifest import fsync, replace_file

Line = dict[str, Any]
"""A line of the file."""
EVERY = 1000  # rows between two entries of the index
MOST_KNOWN = 1000  # settings of rows that are kept for the next row with the same ones
OWN = frozenset({"row", "seed", "id", "settings", "outputs", "input", TOOLS, REFERENCE, "error"})
"""Keys of a line that are nothing the model reads. Tools stand in the prompt."""


def span_of_shard(outputs: int, shards: int, index: int) -> range:
    """Return the numbers of the outputs of a shard.

    Shards have consecutive outputs, and their numbers differ by one at most: so the files of all shards, one after the
    other, have the order of the inputs.
    """
    return range(outputs * index // shards, outputs * (index + 1) // shards)


@dataclass(frozen=True)
class Written:
    """What `write` has counted."""

    rows: int
    outputs: int
    sha256: str


def write(path: Path, lines: Iterable[Line], per_prompt: int) -> Written:
    """Write the file and its index. `per_prompt`: outputs of a row without `outputs`."""
    index: list[tuple[int, int]] = []
    rows = outputs = offset = 0
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for line in lines:
            if rows % EVERY == 0:
                index.append((outputs, offset))
            text = json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            file.write(text)
            digest.update(text)
            rows, outputs, offset = rows + 1, outputs + line.get("outputs", per_prompt), offset + len(text)
    fsync(path)
    replace_file(index_of(path), json.dumps(index).encode())
    return Written(rows, outputs, digest.hexdigest())


def index_of(path: Path) -> Path:
    """Return the path of the index of the file `path`."""
    return path.with_suffix(".index.json")


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of the file, one at a time."""
    with path.open("rb") as file:
        yield from map(json.loads, file)


@dataclass(frozen=True)
class Samples:
    """The samples of the file `path`, without holding them."""

    path: Path
    settings: Settings
    """The task's block of the spec."""
    per_prompt: int
    """Outputs of a row that does not say otherwise."""
    with_overrides: Callable[[Settings, Mapping[str, Any]], Settings]
    """Returns the settings of a row from what it overrides."""

    def between(self, start: int, end: int) -> Iterator[Sample]:
        """Yield the samples with the numbers from `start` to `end`, `end` not included, in their order.

        Of the file, at most `EVERY` rows before the first of them are read.
        """
        index: list[list[int]] = json.loads(index_of(self.path).read_bytes())
        outputs, offset = index[bisect_right(index, start, key=lambda entry: entry[0]) - 1]
        known: dict[str, Settings] = {}
        with self.path.open("rb") as file:
            file.seek(offset)
            for text in file:
                if outputs >= end:
                    return
                line = json.loads(text)
                count = line.get("outputs", self.per_prompt)
                if outputs + count > start:
                    first = max(0, start - outputs)
                    yield from islice(self._of_row(line, outputs, known), first, min(count, end - outputs))
                outputs += count

    def _of_row(self, line: Line, before: int, known: dict[str, Settings]) -> Iterator[Sample]:
        overrides = line.get("settings")
        settings = self.settings
        if overrides:
            text = json.dumps(overrides, sort_keys=True)
            if len(known) >= MOST_KNOWN:
                known.clear()
            if text not in known:
                known[text] = self.with_overrides(self.settings, overrides)
            settings = known[text]
        cells = {role: cell for role, cell in line.items() if role not in OWN}
        for i in range(line.get("outputs", self.per_prompt)):
            yield Sample(
                row=line["row"],
                index=i,
                cells=cells,
                seed=sample_seed(line["seed"], i) if "seed" in line else None,
                settings=settings,
                overrides=overrides,
                number=before + i,
                id=line.get("id"),
                input=line.get("input"),
                reference=line.get(REFERENCE),
                problem=line.get("error"),
            )
