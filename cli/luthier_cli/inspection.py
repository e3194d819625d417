"""Shows a dataset: asks the trainer what it is, and writes the answer for people."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier_api.kinds import JobKind
from luthier_cli.asking import ask
from luthier_cli.local import RUN_FILE, LocalJob
from luthier_cli.manifests import Refused

MODULE = "luthier_trainer.prepare.inspection"
COLUMN_WIDTH = 48  # characters, of the report on the rows


def inspect_dataset(jobs: Sequence[LocalJob]) -> dict[str, Any]:
    """Return the description of the dataset of the only FineTuneJob of `jobs`. Raises Refused."""
    found = [job for job in jobs if job.kind is JobKind.FINE_TUNE]
    if len(found) != 1:
        raise Refused([f"inspect describes the dataset of one FineTuneJob, and the file has {len(found)}"])
    (job,) = found
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        run_file = Path(folder) / RUN_FILE
        run_file.write_text(json.dumps(job.run_config(0).dump()))
        return ask(MODULE, str(run_file), folder, environment=job.environment("prepare", 0))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that describe a dataset."""
    for name, split in found["splits"].items():
        counts = [f"{split['rows']:,} rows"]
        counts += [f"{split['bytes']:,} bytes"] if "bytes" in split else []
        if "tokens" in split:
            dropped = split["rows"] - split["encodedRows"]
            counts += [f"{dropped:,} left out"] if dropped else []
            counts += [f"{split['tokens']:,} tokens"]
            counts += [f"{split['labels']:,} of them labels"] if "labels" in split else []
        yield f"{name}: {', '.join(counts)}"
    yield f"columns: {', '.join(f'{name} ({kind})' for name, kind in found['columns'].items())}"
    if "form" in found:
        yield f"form: {found['form']}"
    yield from _aligned(found["reportTable"])
    if "recommendedMaxLength" in found:
        yield f"recommended training.maxLength: {found['recommendedMaxLength']}"
    for notice in found["notices"]:
        yield f"note: {notice}"
    if found.get("firstRow"):
        yield ""
        yield found["firstRow"]


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows of a table as lines with columns of equal width."""
    widths = [min(max(map(len, column)), COLUMN_WIDTH) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
