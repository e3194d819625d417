"""A `Sample` is one output that a shard must make, an `Output` is one that it has made.

A sample is fixed by the inputs alone; neither shard, batch nor attempt changes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEEDS = 2**32  # seeds are 32 bits wide, as in the API, so that a line's seed can be given as a row's


@dataclass(frozen=True)
class Sample:
    """One output to make. `index` counts the outputs of its row (`perPrompt`)."""

    row: int
    index: int
    prompt: str
    negative_prompt: str | None
    seed: int
    input: dict[str, Any] | None = field(default=None, hash=False)
    """The other columns of its row. Its line repeats them; its output does not depend on them."""

    @property
    def key(self) -> tuple[int, int]:
        return self.row, self.index

    def facts(self) -> dict[str, Any]:
        """The fields of its line: which output it is, and what the output depends on."""
        negative = {} if self.negative_prompt is None else {"negativePrompt": self.negative_prompt}
        return {"row": self.row, "sample": self.index, "prompt": self.prompt, **negative, "seed": self.seed}


@dataclass(frozen=True)
class Output:
    """One output made, or the reason why its sample cannot be made."""

    sample: Sample
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields of its line, beside those of the sample."""
    text: str | None = None
    file: bytes | None = None
    """Content of the file that holds the output."""
    suffix: str = ""
    """Of that file's name."""
    error: str | None = None


def sample_seed(row_seed: int, index: int) -> int:
    """Seed of a row's output number `index`: the row's seed plus that number, so any of them can be asked for alone."""
    return (row_seed + index) % SEEDS


def read_rows(path: Path, per_prompt: int) -> Iterator[list[Sample]]:
    """The samples of each row of `prepared/rows.jsonl`."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            about = row["prompt"], row.get("negativePrompt")
            yield [
                Sample(row["row"], i, *about, sample_seed(row["seed"], i), row.get("input")) for i in range(per_prompt)
            ]


def padded(samples: Sequence[Sample], size: int) -> list[Sample]:
    """Exactly `size` samples: kernels are chosen by shape, so only batches of one size give the same bits in every
    batch.
    """
    return [*samples, *[samples[0]] * (size - len(samples))]
