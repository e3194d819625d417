"""The formats of dataset files, one row each.

The API's rules, the docs and the trainer's checks are drawn from these rows. What reads a format stands in
`luthier_trainer.data`, and a test there holds that each row has a reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DatasetFormat = Literal["csv", "json", "jsonl", "parquet", "arrow", "text", "imagefolder", "webdataset"]


@dataclass(frozen=True)
class FormatInfo:
    """A format that `dataset.format` can name."""

    suffixes: tuple[str, ...] = ()
    """By which its files are recognised, in small letters; none: only `dataset.format` says that it is one."""
    text: bool = False
    """Whether its files are text, and so have an encoding (`dataset.encoding`)."""
    streamed: bool = True
    """Whether its rows can be read while the model learns (`dataset.streaming`)."""
    read_as: DatasetFormat | None = None
    """The format whose reader reads it, if it has none of its own."""


FORMATS: Mapping[DatasetFormat, FormatInfo] = {
    "csv": FormatInfo(suffixes=(".csv", ".tsv"), text=True),
    "json": FormatInfo(suffixes=(".json",), text=True),
    "jsonl": FormatInfo(suffixes=(".jsonl", ".ndjson"), text=True, read_as="json"),
    "parquet": FormatInfo(suffixes=(".parquet",)),
    "arrow": FormatInfo(suffixes=(".arrow", ".feather")),
    "text": FormatInfo(suffixes=(".txt", ".md", ".rst"), text=True),
    "imagefolder": FormatInfo(streamed=False),
    "webdataset": FormatInfo(suffixes=(".tar",), streamed=False),
}
