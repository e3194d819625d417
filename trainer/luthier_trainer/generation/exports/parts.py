"""Divides outputs over files of about one size, and makes values fit the types of their columns.

Which outputs a file holds follows from the sizes of all outputs alone, so that the files are the same however the
outputs were divided into shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_trainer.generation.exports.base import Outputs
from luthier_trainer.generation.kinds import Kind
from luthier_trainer.generation.records import Line

if TYPE_CHECKING:
    from datasets import Features

PART_BYTES = (
    500_000_000  # of lines and images in a file: the Hub shows files of this size well, and wants no larger ones
)
IMAGE = "image"
"""Column of the images, in place of that of the names of their files."""
FILE_NAME = "file_name"

Item = tuple[Line, Path | None]


def named_parts(outputs: Iterable[Item], counts: list[int], suffix: str) -> Iterator[tuple[str, Iterator[Item]]]:
    """Yield the name of each file, and its outputs, which have to be used up before the next one."""
    left = iter(outputs)
    for i, count in enumerate(counts):
        yield f"train-{i:05d}-of-{len(counts):05d}.{suffix}", islice(left, count)


def counts_of(outputs: Iterable[Item]) -> list[int]:
    """Return the number of outputs of each file."""
    counts, size = [0], 0
    for line, _ in outputs:
        own = len(json.dumps(line)) + (line.get("size") or 0)
        if counts[-1] and size + own > PART_BYTES:
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += own
    return counts


def features_of(outputs: Outputs) -> Features:
    """Return the types of the columns of lines, with the images in place of their names."""
    from datasets import Features, Image

    assert isinstance(outputs.kind, dict), "lines are objects"
    return Features(
        {
            IMAGE if name == FILE_NAME else name: Image() if name == FILE_NAME else feature(kind)
            for name, kind in outputs.kind.items()
        }
    )


def feature(kind: Kind) -> Any:
    """Return the type of a column, or of a part of one."""
    from datasets import List, Value

    if isinstance(kind, dict) and kind:
        return {name: feature(inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return List(feature(kind[0]))
    return Value(kind or "null") if isinstance(kind, str) else Value("null")


def fitted(value: Any, kind: Kind) -> Any:
    """Return a value in the type of its column. Where values are of several types, all are text."""
    if value is None or not kind:
        return None
    if isinstance(kind, dict):
        return {name: fitted(value.get(name), inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [fitted(item, kind[0]) for item in value]
    if kind == "float64":
        return float(value)
    return json.dumps(value, ensure_ascii=False) if kind == "string" and not isinstance(value, str) else value
