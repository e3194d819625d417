"""What a writer of outputs gets: all outputs of a job in the order of the inputs, without holding them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier_api.run import GenerateRun
from luthier_trainer.generation.kinds import Kind
from luthier_trainer.generation.records import Line, RecordForm
from luthier_trainer.generation.result import shard_name
from luthier_trainer.runtime.heartbeat import beat

EVERY = 1000  # outputs between two heartbeats


@dataclass(frozen=True)
class Outputs:
    """The outputs of all shards, whose results are complete."""

    run: GenerateRun
    result: Path
    """Folder of the result."""
    records: RecordForm
    kind: Kind
    """Types of the columns of all lines."""
    model: str
    """Name of the model, as a card shows it."""

    def __iter__(self) -> Iterator[tuple[Line, Path | None]]:
        """Yield each line, with the path of its file, if it has one."""
        for index in range(self.run.spec.shards):
            name = shard_name(index, self.run.spec.shards)
            with (self.result / self.records.table(name)).open("rb") as table:
                for number, text in enumerate(table):
                    if number % EVERY == 0:
                        beat()
                    line: dict[str, Any] = json.loads(text)
                    file = self.records.file(line)
                    yield line, self.result / name / file if file else None


class Writer(Protocol):
    """Writes outputs in one form."""

    def __call__(self, outputs: Outputs, folder: Path) -> None:
        """Write all files into `folder`, which is empty. The same outputs give the same bytes."""
