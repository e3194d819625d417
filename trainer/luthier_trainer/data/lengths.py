"""The order in which an epoch reads rows of similar lengths (`training.groupByLength`), and what padding costs.

The order depends on the lengths, the rows of a step, the seed and the number of the epoch. It does not depend on the
number of processes, the micro-batch and the random numbers drawn so far, as that of transformers' sampler does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy

POOL = 50  # steps whose rows are sorted together; the more, the less padding, and the less random are the steps
WASTEFUL = 1.5  # computed tokens a real one, from which on `prepare` recommends something else
SAMPLED = 200_000  # rows from which the padding is estimated


def by_length(lengths: numpy.ndarray, rows_a_step: int, seed: int, epoch: int) -> numpy.ndarray:
    """Return the positions of the rows of an epoch, int64 of shape (rows,). `lengths`: tokens of each row.

    The rows are shuffled, and those of `POOL` steps sorted. Then the steps are shuffled, so that long and short ones
    alternate. Within a step the longest rows come first, so that processes work on similar lengths at the same time.
    The step with the longest row is the first, so that memory that is too small shows at once; a last step with fewer
    rows stays the last.
    """
    import numpy

    random = numpy.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = POOL * rows_a_step
    for begin in range(0, len(order), pool):
        rows = order[begin : begin + pool]
        order[begin : begin + pool] = rows[numpy.argsort(-lengths[rows], kind="stable")]
    whole = len(order) // rows_a_step * rows_a_step
    steps = random.permutation(order[:whole].reshape(-1, rows_a_step))
    if len(steps):
        longest = int(lengths[steps[:, 0]].argmax())
        steps[[0, longest]] = steps[[longest, 0]]
    return numpy.concatenate([steps.reshape(-1), order[whole:]])


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return the positions of all rows, the longest first: for evaluations, whose sums do not depend on the order."""
    import numpy

    return numpy.argsort(-numpy.asarray(lengths), kind="stable").tolist()


def computed_tokens(lengths: numpy.ndarray, order: numpy.ndarray, micro_batch: int) -> float:
    """Return the tokens that are computed for each real one, if the rows are read in `order` and padded.

    `lengths`: tokens of each row. `order`: positions of the rows. `micro_batch`: rows that are padded together.
    """
    import numpy

    begins = numpy.arange(0, len(order), micro_batch)
    sizes = numpy.minimum(micro_batch, len(order) - begins)
    return float((numpy.maximum.reduceat(lengths[order], begins) * sizes).sum() / lengths[order].sum())


def notice_padding(
    lengths: Sequence[int], rows_a_step: int, micro_batch: int, can_pack: bool, can_group: bool = True
) -> None:
    """Give notice if more than a third of what is computed would be padding, with what grouping by length saves.

    `can_pack`: whether the task has `training.packing`. `can_group`: whether the rows of an epoch are known.
    """
    import numpy

    sample = numpy.asarray(lengths[:SAMPLED])
    random = computed_tokens(sample, numpy.random.default_rng(0).permutation(len(sample)), micro_batch)
    if random < WASTEFUL:
        return
    grouped = computed_tokens(sample, by_length(sample, rows_a_step, 0, 0), micro_batch)
    if not can_group:
        notice(
            f"spec.training.packing: rows are padded to the longest of {micro_batch}, so that about {random:.1f} tokens"
            " are computed for each real one. Set it to isolated for hardly any padding"
        )
        return
    packing = ", or packing: isolated for hardly any padding" if can_pack else ""
    notice(
        f"spec.training.groupByLength: rows are padded to the longest of {micro_batch}, so that about {random:.1f}"
        f" tokens are computed for each real one. Set it to true for about {grouped:.1f}{packing}"
    )
