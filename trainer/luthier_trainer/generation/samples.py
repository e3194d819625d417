"""`Sample`: an output that a shard has to make. `Output`: an output that it has made.

A sample depends only on the inputs, not on shards, batches or attempts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEEDS = 2**32  # seeds have 32 bits, as in the API, so that the seed of an output can be used as the seed of a row


@dataclass(frozen=True)
class Sample:
    """An output to make. `index` numbers the outputs of its row (`perPrompt`), from 0."""

    row: int
    index: int
    prompt: str
    negative_prompt: str | None
    seed: int
    input: dict[str, Any] | None = field(default=None, hash=False)
    """The other columns of its row, which are copied to its line. The output does not depend on them."""

    @property
    def key(self) -> tuple[int, int]:
        """Row and index, which identify the sample."""
        return self.row, self.index

    def facts(self) -> dict[str, Any]:
        """Return the fields of its line: which output it is, and what the output depends on."""
        negative = {} if self.negative_prompt is None else {"negativePrompt": self.negative_prompt}
        return {"row": self.row, "sample": self.index, "prompt": self.prompt, **negative, "seed": self.seed}


class Unusable(Exception):
    """What the model has made is no output. The text is the error of its line."""


@dataclass(frozen=True)
class Output:
    """An output, or the reason why its sample cannot be made."""

    sample: Sample
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields of its line, besides those of the sample."""
    text: str | None = None
    file: Callable[[], bytes] | None = None
    """Makes the content of the file that holds the output. The writer calls it beside the model. Raises `Unusable` if
    there is no such output after all.
    """
    suffix: str = ""
    """Suffix of the name of that file."""
    error: str | None = None


def sample_seed(row_seed: int, index: int) -> int:
    """Return the seed of output `index` of a row: the row's seed plus `index`. Each output can thus be made alone."""
    return (row_seed + index) % SEEDS


def read_rows(path: Path, per_prompt: int) -> Iterator[list[Sample]]:
    """Yield the samples of each row of the file `path` (`prepared/rows.jsonl`)."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            about = row["prompt"], row.get("negativePrompt")
            yield [
                Sample(row["row"], i, *about, sample_seed(row["seed"], i), row.get("input")) for i in range(per_prompt)
            ]


def padded(samples: Sequence[Sample], size: int) -> list[Sample]:
    """Return exactly `size` samples, filled up with repeated ones.

    Libraries choose kernels by shape, so an output has the same bits in every batch only if all batches have one size.
    """
    return [*samples, *[samples[0]] * (size - len(samples))]
