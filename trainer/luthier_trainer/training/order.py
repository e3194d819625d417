"""The sampler of `training.groupByLength`: the order of `data.lengths`, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
from torch.utils.data import Sampler

from luthier_trainer.data.lengths import by_length


class ByLength(Sampler[int]):
    """Yields the positions of the rows of an epoch, so that the rows of a step have similar lengths."""

    def __init__(self, lengths: Sequence[int], rows_a_step: int, seed: int) -> None:
        """`lengths`: tokens of each row. `rows_a_step`: over all processes and micro-batches."""
        self.lengths, self.rows_a_step, self.seed = numpy.asarray(lengths), rows_a_step, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(by_length(self.lengths, self.rows_a_step, self.seed, self.epoch).tolist())
