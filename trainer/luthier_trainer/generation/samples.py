"""What a shard has to make, and what it has made: one `Sample` an output asked for, one `Output` each that exists.

A sample is fixed by the inputs alone; neither shard, batch nor attempt changes it. Neighbours: `shard` keeps the
outputs, `text` and `images` are the engines that make them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
    """The other columns of its row, which its line repeats and its output does not depend on."""

    @property
    def key(self) -> tuple[int, int]:
        return self.row, self.index

    def facts(self) -> dict[str, Any]:
        """What its output depends on, and which it is."""
        negative = {} if self.negative_prompt is None else {"negativePrompt": self.negative_prompt}
        return {"row": self.row, "sample": self.index, "prompt": self.prompt, **negative, "seed": self.seed}


@dataclass(frozen=True)
class Output:
    """One output made, or the reason why its sample cannot be made."""

    sample: Sample
    facts: dict[str, Any] = field(default_factory=dict)
    """What the manifest line says beside the sample's own facts."""
    text: str | None = None
    image: bytes | None = None
    suffix: str = ""
    """Of the image's file."""
    error: str | None = None


class Engine(Protocol):
    """Makes outputs in batches of one size."""

    batch_size: int

    def problem(self, sample: Sample) -> str | None:
        """Why this sample can never be made; None when it can. Cheap: the model is not run."""

    def group(self, sample: Sample) -> Hashable:
        """Samples of one group may share a batch: then its shapes do not depend on who else is in it."""

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """The outputs of one to `batch_size` samples of one group, in their order."""


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


def batches(engine: Engine, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Batches of samples of one group, groups in order of their first sample; the last batch of a group may be
    short.
    """
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(engine.group(sample), []).append(sample)
    for members in groups.values():
        for first in range(0, len(members), engine.batch_size):
            yield members[first : first + engine.batch_size]


def padded(samples: Sequence[Sample], size: int) -> list[Sample]:
    """Exactly `size` samples: kernels are chosen by shape, so only batches of one size give the same bits in every
    batch.
    """
    return [*samples, *[samples[0]] * (size - len(samples))]
