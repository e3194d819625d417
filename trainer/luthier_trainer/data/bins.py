"""Packs encoded rows into bins of at most `maxLength` tokens, so that the model computes hardly any padding.

A row is a document: it is whole in one bin, and only a row that is longer than a bin is split. Each bin keeps the
lengths of its documents (`seq_lengths`), from which the collator makes positions that begin at 0 in each document. The
attention of a model in `models.isolation` then does not cross from one document to the next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from luthier_trainer.data.tokens import MAX_LENGTH, SHORTEST, mapped
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from datasets import Dataset

PACKING = "spec.training.packing"
TOKENS_AT_ONCE = 1 << 22  # of the bins that are in memory at once


def packed(rows: Dataset, max_length: int, use: str) -> Dataset:
    """Return the bins, with the columns of the rows, joined, and `seq_lengths`: the number of tokens of each document.

    `rows` have the columns input_ids, length and perhaps loss_mask. `use` is training or held-out, for notices. Memory
    is needed for the lengths of all rows, and for the tokens of some bins.
    """
    import numpy

    documents = split(rows, max_length, use)
    lengths = numpy.asarray(documents["length"][:], dtype=numpy.int64)
    bin_of = best_fit(lengths, max_length)
    bins = _gathered(documents, bin_of, max_length)
    _tell_packed(len(rows), int(lengths.sum()), len(bins), max_length, use)
    return bins


def best_fit(lengths: numpy.ndarray, space: int) -> numpy.ndarray:
    """Return the bin of each document, int64 of shape (documents,): best fit, in the order of decreasing lengths.

    `lengths`, int64 of the same shape, are at most `space`, which is the size of a bin. Each document goes into the
    fullest bin that has space for it. The result depends only on the lengths and their order.
    """
    import numpy

    free: list[int] = []  # the different amounts of free space in the bins so far, in increasing order
    bins_with: dict[int, list[int]] = defaultdict(list)  # free space → bins
    sizes, bin_of, bins = lengths.tolist(), numpy.empty(len(lengths), dtype=numpy.int64), 0
    for document in numpy.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(free, sizes[document])
        if at < len(free):
            before = free[at]
            chosen = bins_with[before].pop()
            if not bins_with[before]:
                del free[at]
        else:
            before, chosen = space, bins
            bins += 1
        bin_of[document] = chosen
        left = before - sizes[document]
        if left >= SHORTEST:
            if not bins_with[left]:
                insort(free, left)
            bins_with[left].append(chosen)
    return bin_of


def split(rows: Dataset, max_length: int, use: str) -> Dataset:
    """Return the rows, where those that are longer than `max_length` tokens are split into several. Says so.

    A part without a token to learn is left out.
    """
    import numpy

    longer = int((numpy.asarray(rows["length"][:]) > max_length).sum())
    if not longer:
        return rows
    left_out = 0

    def cut(batch: pyarrow.Table) -> pyarrow.Table:
        nonlocal left_out
        lengths = batch["length"].to_numpy().astype(numpy.int64)
        begins = parts(lengths, max_length)
        ends = numpy.append(begins[1:], lengths.sum())
        learnt = numpy.ones(len(begins), dtype=bool)
        if "loss_mask" in batch.column_names:
            labels = numpy.append(0, numpy.cumsum(_values(batch["loss_mask"]).to_numpy(), dtype=numpy.int64))
            learnt = labels[ends] > labels[begins + 1]  # the first token of a part cannot be predicted
        left_out += int((~learnt).sum())
        return _regrouped(batch, numpy.append(begins, lengths.sum())).filter(learnt)

    arrow = rows.with_format("arrow")
    result: Dataset = mapped(arrow, cut, rows.features).with_format(None)
    notice(
        f"{MAX_LENGTH}: {longer} of {len(rows)} {use} rows are longer than {max_length} tokens and are split; the model"
        " does not see one part while it reads another"
        + (f". {left_out} parts without a token to learn are left out" if left_out else "")
    )
    return result


def parts(lengths: numpy.ndarray, most: int) -> numpy.ndarray:
    """Return where the parts of rows begin in the tokens of all rows, int64 of shape (parts,).

    `lengths`: tokens of each row, int64 of shape (rows,). All parts of a row but the last have `most` tokens; one fewer
    where the last would have a single token, from which nothing can be learnt.
    """
    import numpy

    counts = -(-lengths // most)
    row = numpy.repeat(numpy.arange(len(lengths)), counts)
    number = numpy.arange(len(row)) - (numpy.cumsum(counts) - counts)[row]
    begins = number * most
    latest = numpy.where(number > 0, lengths[row] - SHORTEST, 0)
    return numpy.minimum(begins, latest) + (numpy.cumsum(lengths) - lengths)[row]


def _gathered(documents: Dataset, bin_of: numpy.ndarray, max_length: int) -> Dataset:
    """Return a row for each bin, of the documents in it, the longest first."""
    import datasets
    import numpy

    lengths = numpy.asarray(documents["length"][:], dtype=numpy.int64)
    order = numpy.lexsort((-lengths, bin_of))
    counts = numpy.bincount(bin_of)
    source = documents.with_format("arrow")
    features = datasets.Features({**documents.features, "seq_lengths": datasets.List(datasets.Value("int32"))})

    def gather(batch: dict[str, list[int]]) -> pyarrow.Table:
        import pyarrow

        begin, end = batch["begin"][0], batch["begin"][-1] + batch["count"][-1]
        table = source[order[begin:end].tolist()]
        sizes = table["length"].to_numpy().astype(numpy.int64)
        borders = numpy.append(numpy.array(batch["begin"]), end) - begin  # of the bins, in documents
        tokens = numpy.append(0, numpy.cumsum(sizes))[borders]
        of_bins = pyarrow.array(borders.astype(numpy.int32))
        seq_lengths = pyarrow.ListArray.from_arrays(of_bins, pyarrow.array(sizes.astype(numpy.int32)))
        return _regrouped(table, tokens).append_column("seq_lengths", seq_lengths)

    bins = datasets.Dataset.from_dict({"begin": numpy.cumsum(counts) - counts, "count": counts})
    return mapped(bins, gather, features, batch_size=max(TOKENS_AT_ONCE // max_length, 1))


def _regrouped(table: pyarrow.Table, borders: numpy.ndarray) -> pyarrow.Table:
    """Return the tokens of `table`, in their order, as rows that begin and end at other tokens.

    `borders`: where the rows begin in the tokens of all rows, and the end, int64 of shape (rows + 1,).
    """
    import numpy
    import pyarrow

    offsets = pyarrow.array(borders.astype(numpy.int32))
    columns: dict[str, Any] = {
        name: pyarrow.ListArray.from_arrays(offsets, _values(table[name]))
        for name in table.column_names
        if name != "length"
    }
    return pyarrow.table(columns | {"length": pyarrow.array(numpy.diff(borders).astype(numpy.int32))})


def _values(lists: pyarrow.ChunkedArray) -> pyarrow.Array:
    """Return the items of all lists, one after the other."""
    import pyarrow

    return pyarrow.concat_arrays([chunk.flatten() for chunk in lists.chunks])


def _tell_packed(rows: int, tokens: int, bins: int, max_length: int, use: str) -> None:
    """Give notice of how many rows share a bin, because batchSize counts bins."""
    if bins:
        notice(
            f"{PACKING}: {rows} {use} rows are packed into {bins} bins of at most {max_length} tokens, which"
            f" are {tokens / (bins * max_length):.1%} full. batchSize counts bins: each holds"
            f" {rows / bins:.3g} rows on average"
        )
