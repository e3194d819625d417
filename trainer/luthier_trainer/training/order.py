"""Orders in which an epoch reads its rows, other than at random: samplers that know the number of the epoch.

What they yield depends on the rows, the spec and that number alone, so that a run that resumes goes on in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
from datasets import Dataset
from torch.utils.data import Sampler

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import Plan
from luthier_trainer.data.lengths import by_length
from luthier_trainer.tasks.base import Task


class EpochOrder(Sampler[int]):
    """Yields the positions of the rows of an epoch."""

    epoch = 0
    """Set before the rows of an epoch are read."""


class ByLength(EpochOrder):
    """The order of `data.lengths`: the rows of a step have similar lengths (`training.groupByLength`)."""

    def __init__(self, lengths: Sequence[int], rows_a_step: int, seed: int) -> None:
        """`lengths`: tokens of each row. `rows_a_step`: over all processes and micro-batches."""
        self.lengths, self.rows_a_step, self.seed = numpy.asarray(lengths), rows_a_step, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(by_length(self.lengths, self.rows_a_step, self.seed, self.epoch).tolist())


class InGroups(EpochOrder):
    """Yields rows so that each micro-batch has rows of one group (`Task.groups`).

    The last micro-batch of a group is filled up with repetitions of its last row, which the collator leaves out: so all
    have the same number of positions, by which accelerate deals them out to processes.
    """

    def __init__(self, groups: Sequence[int], micro_batch: int, seed: int) -> None:
        """`groups`: the group of each row. `micro_batch`: rows of one forward pass of a process."""
        self.groups, self.micro_batch, self.seed = numpy.asarray(groups), micro_batch, seed

    def __len__(self) -> int:
        sizes = numpy.unique(self.groups, return_counts=True)[1]
        return int((-(-sizes // self.micro_batch) * self.micro_batch).sum())

    def __iter__(self) -> Iterator[int]:
        random = numpy.random.default_rng([self.seed, self.epoch])
        shuffled = random.permutation(len(self.groups))
        batches = []
        for group in numpy.unique(self.groups):
            rows = shuffled[self.groups[shuffled] == group]
            lacking = -len(rows) % self.micro_batch
            batches.append(numpy.append(rows, numpy.repeat(rows[-1:], lacking)).reshape(-1, self.micro_batch))
        return iter(random.permutation(numpy.concatenate(batches)).reshape(-1).tolist())


def of_epochs(task: Task, spec: FineTuneJobSpec, plan: Plan, rows: Dataset) -> EpochOrder | None:
    """Return the order in which the training reads `rows`, which are encoded; None: at random."""
    training = spec.training
    if training.group_by_length:
        return ByLength(rows["length"][:], training.batch_size, training.seed)
    groups = task.groups(rows)
    return None if groups is None else InGroups(groups, plan.micro_batch_size or 1, training.seed)
