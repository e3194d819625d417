"""Rows a second and memory of the data report, and how many of the nearly equal rows it finds.

`PYTHONPATH=tests python -m perf datareport` prints one JSON document. The rows are made of pieces of Python's language
reference, with the lengths of chats and paragraphs (log-normal, 1,300 characters on average). One row in twenty repeats
another one, one in ten is another one with one or two words changed. Tokenising is not measured.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy
from datasets import Dataset, Features, Value, disable_progress_bars, load_from_disk

from luthier_trainer.data import repeats
from luthier_trainer.data.near_duplicates import ALIKE, shingles, similarity

ROWS = 100_000
PIECE = 8  # words
ROWS_A_SECOND = 1_700  # limit: a million rows in ten minutes
BYTES_A_ROW = 500  # limit: half a gigabyte for a million rows
AT_ONCE = 1_000


def texts(rows: int) -> Iterator[dict[str, str]]:
    """Yield rows; those before a repeated row are kept, to be repeated."""
    random = numpy.random.default_rng(0)
    words = [word for _, body in sorted(topics.items()) for word in body.split()]
    kept: list[list[str]] = []
    for number in range(rows):
        kind = number % 20
        if kind in (7, 13, 19):
            made = list(kept[random.integers(len(kept))])
            changes = 0 if kind == 19 else random.integers(1, 3)
            for place in random.integers(0, len(made), changes):
                made[place] = f"changed{number}"
        else:
            pieces = max(int(random.lognormal(4.9, 0.9)) // PIECE, 2)
            begins = random.integers(0, len(words) - PIECE, pieces)
            made = [word for begin in begins for word in words[begin : begin + PIECE]]
            if len(kept) < 20_000:
                kept.append(made)
        yield {"text": " ".join(made)}


def resident() -> int:
    """Return the anonymous memory of this process, in bytes: files that are mapped can be dropped at any time."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The most memory that the process has had since it began."""

    def __enter__(self) -> Peak:
        self.before = self.most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def recall(data: Dataset, found: repeats.Repeats) -> float:
    """Return the share of the rows that are alike to one of the first 2,000 rows, and are known to be repeats.

    Every pair of these 2,000 rows is compared.
    """
    hashes, rows = shingles([repeats.normalised(text) for text in data[:2_000]["text"]])
    sets = [numpy.unique(part) for part in numpy.split(hashes, numpy.searchsorted(rows, numpy.arange(1, 2_000)))]
    owners: dict[int, list[int]] = {}
    exact = set(found.exact["train"].tolist())
    alike: set[int] = set()
    for row, own in enumerate(sets):
        if row in exact:
            continue
        near = {other for shingle in own.tolist() for other in owners.get(shingle, ())}
        if any(similarity(sets[other], own) >= ALIKE for other in near):
            alike.add(row)
        for shingle in own.tolist():
            owners.setdefault(shingle, []).append(row)
    return len(alike & set(found.near["train"][:, 1].tolist())) / len(alike)


def main() -> dict[str, Any]:
    """The figures, each beside its limit."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        features = Features({"text": Value("string")})
        made = Dataset.from_generator(texts, gen_kwargs={"rows": ROWS}, features=features, cache_dir=folder)
        made.save_to_disk(f"{folder}/rows")
        data = load_from_disk(f"{folder}/rows")
        split = repeats.Split(
            batches=lambda: (batch["text"] for batch in data.iter(AT_ONCE)),
            at=lambda positions: data.select(positions)["text"][:],
        )
        repeats.find(repeats.Split(lambda: iter([data[:100]["text"]]), split.at), None)  # imports and tables
        with Peak() as peak:
            begin = time.perf_counter()
            found = repeats.find(split, None)
            seconds = time.perf_counter() - begin
        return {
            "rows": ROWS,
            "characters a row": round(sum(len(row) for row in data["text"]) / ROWS),
            "rows/s": round(ROWS / seconds),
            "limit / rows/s": round(ROWS_A_SECOND * seconds / ROWS, 3),
            "bytes a row": round((peak.most - peak.before) / ROWS),
            "bytes a row / limit": round((peak.most - peak.before) / ROWS / BYTES_A_ROW, 3),
            "exact duplicates": len(found.exact["train"]),
            "near duplicates": len(found.near["train"]),
            "share of near duplicates found": recall(data, found),
        }
