"""The forms in which the outputs of a GenerateJob are delivered, one row each.

The API's rules and the docs are drawn from these rows. What writes a form stands in
`luthier_trainer.generation.exports`, and a test there holds that each row has a writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OutputFormat = Literal["lines", "parquet", "webdataset", "openai-batch"]
InputForm = Literal["columns", "openai-batch"]
BATCH: InputForm = "openai-batch"
"""Requests of OpenAI's Batch API, and their answers."""


@dataclass(frozen=True)
class OutputFormatInfo:
    """A form that `outputs.format` can name."""

    files: str
    """Pattern of its files, relative to the result."""
    tasks: tuple[str, ...] = ()
    """Those that have it; none: all."""
    form: InputForm | None = None
    """The form of inputs that it belongs to, if it is not for all."""


LINES: OutputFormat = "lines"
"""The lines of the ledger themselves, with images beside them. All others are made of these."""
OUTPUT_FORMATS: Mapping[OutputFormat, OutputFormatInfo] = {
    LINES: OutputFormatInfo(files="shard-*"),
    "parquet": OutputFormatInfo(files="data/*.parquet"),
    "webdataset": OutputFormatInfo(files="data/*.tar", tasks=("text-to-image", "image-to-image")),
    "openai-batch": OutputFormatInfo(files="data/*.jsonl", tasks=("text-generation",), form=BATCH),
}
EXPORT_MANIFEST = "data.MANIFEST.json"
"""The manifest of outputs that are not delivered as lines, in the result."""
EXPORT_FOLDER = "data"
"""Their folder there."""
