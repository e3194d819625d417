"""Computed tokens a real one, by the order of the rows and by packing, on one process and on eight.

`PYTHONPATH=tests python -m perf padding` prints one JSON document. Nothing is timed: orders and bins are those of
the trainer, and a batch costs its rows times its longest row. Several processes wait for the slowest of them. The
lengths are drawn from a log-normal distribution, which is that of chats and paragraphs; a second set are the paragraphs
of Python's language reference, in characters.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import numpy

from luthier_trainer.data.bins import best_fit
from luthier_trainer.data.lengths import by_length

MICRO_BATCH, STEPS, MAX_LENGTH = 8, 300, 2048
PROCESSES = (1, 8)


def computed(lengths: numpy.ndarray, order: numpy.ndarray, processes: int) -> float:
    """Tokens that all processes together could have computed in the time of the slowest, for each real one."""
    rows = order[: len(order) // (MICRO_BATCH * processes) * MICRO_BATCH * processes]
    batches = lengths[rows].reshape(-1, processes, MICRO_BATCH)
    slowest = batches.max(axis=2).max(axis=1) * MICRO_BATCH
    return float(slowest.sum() * processes / batches.sum())


def measure(lengths: numpy.ndarray, processes: int) -> dict[str, float]:
    step = MICRO_BATCH * processes
    bins = numpy.bincount(best_fit(lengths, MAX_LENGTH), weights=lengths).astype(numpy.int64)
    random = numpy.random.default_rng(1)
    return {
        "random": round(computed(lengths, random.permutation(len(lengths)), processes), 3),
        "groupByLength": round(computed(lengths, by_length(lengths, step, 42, 0), processes), 3),
        "packing: isolated": round(computed(bins, random.permutation(len(bins)), processes), 3),
    }


def main() -> dict[str, Any]:
    """The figures of both sets of lengths."""
    rows = STEPS * MICRO_BATCH * max(PROCESSES)
    drawn = numpy.random.default_rng(0).lognormal(5.0, 1.0, rows)
    paragraphs = [len(text) for _, body in sorted(topics.items()) for text in body.split("\n\n")]
    sets = {"log-normal": drawn, "paragraphs": numpy.array(paragraphs)}
    return {
        "microBatchSize": MICRO_BATCH,
        "maxLength": MAX_LENGTH,
        "computed tokens a real one": {
            name: {
                f"{processes} processes": measure(lengths.clip(2, MAX_LENGTH).astype(numpy.int64), processes)
                for processes in PROCESSES
            }
            for name, lengths in sets.items()
        },
    }
