"""The first outputs of a GenerateJob, as its card and its contact sheet show them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from luthier_api.run import GenerateRun
from luthier_api.tasks import TASKS
from luthier_trainer.generation.records import ImageRecords, Line, RecordForm, TextRecords
from luthier_trainer.generation.result import shard_name

CHARACTERS = 400  # of a text


def makes_images(run: GenerateRun) -> bool:
    """Return whether the outputs of the job are images."""
    return TASKS[run.spec.task].library == "diffusers"


def first_outputs(run: GenerateRun, result: Path, count: int) -> list[tuple[Line, Path | None]]:
    """Return the lines of the first outputs, with the paths of their images.

    Raises FileNotFoundError if the lines are not there.
    """
    return list(islice(_outputs(run, result), count))


def _outputs(run: GenerateRun, result: Path) -> Iterator[tuple[Line, Path | None]]:
    records: RecordForm = ImageRecords(keys=()) if makes_images(run) else TextRecords(keys=())
    for index in range(run.spec.shards):
        name = shard_name(index, run.spec.shards)
        with (result / records.table(name)).open("rb") as table:
            for text in table:
                line: Line = json.loads(text)
                file = records.file(line)
                yield line, result / name / file if file else None


def shortened(text: str) -> str:
    """Return the beginning of a text, without halves of UTF-16's pairs, which UTF-8 cannot express."""
    whole = text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= CHARACTERS else f"{whole[:CHARACTERS]}…"
