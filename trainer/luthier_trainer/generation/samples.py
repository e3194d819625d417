"""`Sample`: an output that a shard has to make. `Output`: an output that it has made.

A sample depends only on the inputs, not on shards, batches or attempts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, TypeVar

from luthier_api.task_settings import Settings
from luthier_api.tasks import REFERENCE

Item = TypeVar("Item")
SEEDS = 2**32  # seeds have 32 bits, as in the API, so that the seed of an output can be used as the seed of a row


@dataclass(frozen=True)
class Sample:
    """An output to make, with everything that decides it and differs between rows.

    Samples whose `variant` is the same have the same settings. An engine puts only such samples into one batch.
    """

    row: int
    """Number of its row in the inputs, from 0."""
    index: int
    """Number of the output within its row (`perPrompt`), from 0."""
    cells: Mapping[str, Any]
    """Role → content, of the columns that the task reads: prompt, negativePrompt, ..."""
    seed: int | None
    """None for a task that draws nothing."""
    settings: Settings = field(repr=False)
    """The task's block of the spec, with the values that the row overrides."""
    overrides: Mapping[str, Any] | None = None
    """What the row overrides, by the names of the fields in a manifest; None if it overrides nothing."""
    number: int = 0
    """Number of the output among all outputs of the job, in the order of the inputs."""
    id: str | None = None
    """Identifier of the row in the user's data."""
    input: Mapping[str, Any] | None = None
    """The other columns of its row, which are copied to its line. The output does not depend on them."""
    reference: Any = None
    """What the output should be, as `scores` compares it; None if its row does not say. The output does not depend on
    it.
    """
    problem: str | None = None
    """Why `prepare` could not read the row. Such a sample is never made."""

    @property
    def prompt(self) -> str:
        return str(self.cells["prompt"])

    @property
    def negative_prompt(self) -> str | None:
        return self.cells.get("negativePrompt")

    @property
    def key(self) -> tuple[int, int]:
        """Row and index, which identify the sample."""
        return self.row, self.index

    @cached_property
    def variant(self) -> str:
        """The same text for all samples with the same settings. Empty without overrides."""
        return json.dumps(self.overrides, sort_keys=True) if self.overrides else ""

    def facts(self) -> dict[str, Any]:
        """Return the fields of its line: which output it is, and what the output depends on."""
        about = {"row": self.row, "sample": self.index, "id": self.id}
        reference = {} if self.reference is None else {REFERENCE: self.reference}
        return {**about, **self.cells, **reference, "seed": self.seed, "settings": self.overrides}


class Unusable(Exception):
    """What the model has made is no output. The text is the error of its line."""


@dataclass(frozen=True)
class Output:
    """An output, or the reason why its sample cannot be made."""

    sample: Sample
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields of its line, besides those of the sample."""
    text: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """The output as values of JSON, such as scores."""
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


def derive_seed(job_seed: int, *identity: str) -> int:
    """Return the 32-bit seed of a row that has none of its own.

    It depends on the job's seed and on the row's identity, and not on its position, so that rows can be added or
    reordered without changing the outputs of the others.
    """
    text = "\0".join([str(job_seed), *identity])
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big")


def padded(samples: Sequence[Item], size: int) -> list[Item]:
    """Return exactly `size` samples, or what is made of samples, filled up with repeated ones.

    Libraries choose kernels by shape, so an output has the same bits in every batch only if all batches have one size.
    """
    return [*samples, *[samples[0]] * (size - len(samples))]
