"""Our packing against TRL's: the time to pack rows, and how full the bins are. `perf training` trains on such bins.

`PYTHONPATH=tests python -m perf packing` prints one JSON document. Both pack the same 200,000 rows, whose lengths are
those of chats and paragraphs, and of which some are longer than a bin.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy
from datasets import Dataset, disable_caching, disable_progress_bars
from trl import pack_dataset

from luthier_trainer.data import bins

ROWS, MAX_LENGTH, VOCABULARY = 200_000, 2048, 2048


def rows_of(lengths: numpy.ndarray, folder: str) -> Dataset:
    """Rows of random tokens, as `prepare` keeps them: in a file, which is mapped into memory."""
    tokens = numpy.random.default_rng(1).integers(2, VOCABULARY, lengths.sum(), dtype=numpy.int32)
    parts = numpy.split(tokens, numpy.cumsum(lengths)[:-1])
    Dataset.from_dict({"input_ids": parts, "length": lengths.astype(numpy.int32)}).save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def timed(pack: Callable[[], Dataset], tokens: int) -> dict[str, float]:
    """CPU seconds, and what became of `tokens` tokens."""
    begin = time.process_time()
    packed = pack()
    seconds = time.process_time() - begin
    kept = int(numpy.sum([numpy.sum(lengths) for lengths in packed["seq_lengths"][:]]))
    return {
        "seconds": round(seconds, 2),
        "bins": len(packed),
        "fill": round(kept / (len(packed) * MAX_LENGTH), 5),
        "tokens lost": round(1 - kept / tokens, 5),
    }


def bins_of(folder: str) -> dict[str, Any]:
    """Both packings of the same rows."""
    lengths = numpy.random.default_rng(0).lognormal(5.0, 1.2, ROWS).clip(2, 4 * MAX_LENGTH).astype(numpy.int64)
    rows, tokens = rows_of(lengths, folder), int(lengths.sum())
    ids = rows.select_columns(["input_ids"])
    found = {
        "ours": timed(lambda: bins.packed(rows, MAX_LENGTH, "training"), tokens),
        "TRL bfd_split": timed(lambda: pack_dataset(ids, MAX_LENGTH, "bfd_split"), tokens),
        "TRL bfd": timed(lambda: pack_dataset(ids, MAX_LENGTH, "bfd"), tokens),
    }
    ours, theirs = found["ours"], found["TRL bfd_split"]
    return {
        "rows": ROWS,
        "tokens": tokens,
        "longer than a bin": int((lengths > MAX_LENGTH).sum()),
        **found,
        "seconds, ours / TRL bfd_split": round(ours["seconds"] / theirs["seconds"], 3),
        "bins, ours / TRL bfd_split": round(ours["bins"] / theirs["bins"], 4),
    }


def main() -> dict[str, Any]:
    """The figures of the bins."""
    disable_progress_bars()
    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        return bins_of(f"{folder}/rows")
