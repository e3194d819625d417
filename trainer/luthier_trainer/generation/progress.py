"""The files of an attempt of a shard, below `shards/<shard>/<attempt>/`, and how far it is.

- `journal.jsonl` has a line for each output, written after the output itself was flushed to disk.
- `table.jsonl` has the same lines in the order of the outputs, as far as they are whole segments.
- `index.jsonl` has a line for each segment, written after it, with its size, its SHA-256 and the state after it.
- `start.json` has the settings of the attempt, and how much of the tables of earlier attempts it continues.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier_trainer.generation.kinds import Kind
from luthier_trainer.generation.records import Line
from luthier_trainer.scoring.sums import Numbers

JOURNAL, TABLE, INDEX, START = "journal.jsonl", "table.jsonl", "index.jsonl", "start.json"
SHOWN = 60  # characters of a setting in a notice


@dataclass(frozen=True)
class Piece:
    """What is used of the table of an attempt: its first `outputs` lines, which have `size` bytes."""

    attempt: int
    outputs: int
    size: int


@dataclass(frozen=True)
class State:
    """What is in tables, of all attempts together. JSON holds it in `start.json` and in each line of an index."""

    pieces: tuple[Piece, ...] = ()
    failed: int = 0
    unsafe: int = 0
    first_error: str | None = None
    kind: Kind = field(default_factory=dict)
    """Types of the columns, as far as lines have shown them."""
    sums: dict[str, str] = field(default_factory=dict)
    """Sums over the outputs that were compared with references, as `scoring.sums` writes them."""

    @property
    def outputs(self) -> int:
        """Number of outputs that are in tables: the first ones of the shard."""
        return sum(piece.outputs for piece in self.pieces)

    @classmethod
    def of(cls, data: dict[str, Any]) -> State:
        """Return the state that `asdict` has made `data` of."""
        return cls(**data | {"pieces": tuple(Piece(**piece) for piece in data["pieces"])})


@dataclass(frozen=True)
class Pending:
    """An output that is in the journal."""

    text: bytes
    """Its line."""
    error: str | None
    unsafe: bool
    """Whether it is an image that was found unsafe."""
    numbers: Numbers
    """What comparing it with its reference gives; nothing without one."""


def append_durably(path: Path, text: bytes) -> None:
    """Append `text` to a file, which is flushed to disk on return."""
    with path.open("ab") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def shown(value: Any) -> str:
    """Return a setting for a notice."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def parse(text: bytes) -> Line | None:
    """Return the JSON object in `text`; None if it is incomplete."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def encode(line: Line) -> bytes:
    """Return a line as JSON."""
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
