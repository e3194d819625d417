"""Parquet files with typed columns, and images in them as `datasets` has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier_trainer.generation.exports.base import Outputs
from luthier_trainer.generation.exports.parts import (
    FILE_NAME,
    IMAGE,
    Item,
    counts_of,
    features_of,
    fitted,
    named_parts,
)
from luthier_trainer.generation.kinds import Kind

GROUP_ROWS = 1000
GROUP_BYTES = 64_000_000  # of images: no more of them are in memory


def write(outputs: Outputs, folder: Path) -> None:
    """Write the outputs in their order. An output that could not be made has its reason, and no image."""
    schema = features_of(outputs).arrow_schema
    for name, items in named_parts(outputs, counts_of(outputs), "parquet"):
        write_file(folder / name, items, schema, outputs.kind)


def write_file(path: Path, items: Iterable[Item], schema: Any, kind: Kind) -> None:
    """Write a file, a group of rows at a time."""
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    size = 0
    with parquet.ParquetWriter(path, schema) as file:
        for line, image in items:
            row = fitted(line, kind)
            if FILE_NAME in row:
                name = row.pop(FILE_NAME)
                row[IMAGE] = {"bytes": image.read_bytes(), "path": name} if image else None
                size += line.get("size") or 0
            rows.append(row)
            if len(rows) == GROUP_ROWS or size >= GROUP_BYTES:
                file.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            file.write_table(pyarrow.Table.from_pylist(rows, schema))
