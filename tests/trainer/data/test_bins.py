"""Isolated packing: each document is whole in one bin, long ones are split and that is said, and no token is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pytest
from datasets import Dataset, Features, List, Value
from trl import pack_dataset

from luthier_trainer.data import bins
from luthier_trainer.data.bins import best_fit, packed, parts


def rows(lengths: list[int], masks: list[list[int]] | None = None) -> Dataset:
    """Rows of these lengths, whose tokens are all different."""
    ends = numpy.cumsum(lengths).tolist()
    columns: dict[str, Any] = {
        "input_ids": [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)],
        "length": lengths,
    }
    types: dict[str, Any] = {"input_ids": List(Value("int32")), "length": Value("int32")}
    if masks is not None:
        columns["loss_mask"], types["loss_mask"] = masks, List(Value("uint8"))
    return Dataset.from_dict(columns, features=Features(types))


def documents(made: Dataset) -> list[list[int]]:
    """The documents of all bins, by their first token."""
    found = []
    for row in made:
        assert sum(row["seq_lengths"]) == row["length"] == len(row["input_ids"])
        begin = 0
        for length in row["seq_lengths"]:
            found.append(row["input_ids"][begin : begin + length])
            begin += length
    return sorted(found)


@dataclass(frozen=True)
class Case:
    name: str
    lengths: list[int]
    expect: list[list[int]]
    """Lengths of the documents of each bin of 10 tokens."""


CASES = [
    Case(
        name="a document goes where it leaves the least space",
        lengths=[7, 5, 3, 5],
        expect=[[7, 3], [5, 5]],
    ),
    Case(
        name="documents of the size of a bin are alone",
        lengths=[10, 10],
        expect=[[10], [10]],
    ),
    Case(
        name="a space of one token is never used",
        lengths=[9, 9, 2],
        expect=[[9], [9], [2]],
    ),
    Case(
        name="a long document is split, and its rest shares a bin",
        lengths=[23, 6],
        expect=[[10], [10], [6, 3]],
    ),
    Case(
        name="a rest of one token would have nothing to predict",
        lengths=[21],
        expect=[[10], [9], [2]],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_documents_in_bins(case: Case) -> None:
    made = packed(rows(case.lengths), 10, "training")
    assert made["seq_lengths"][:] == case.expect
    assert sorted(token for row in made["input_ids"] for token in row) == list(range(sum(case.lengths)))


def test_as_many_bins_as_trl_needs() -> None:
    """And each document is whole in one of them."""
    lengths = numpy.random.default_rng(0).integers(2, 65, 3000)
    data = rows(lengths.tolist())
    made = packed(data, 64, "training")
    assert documents(made) == data["input_ids"][:]
    theirs = pack_dataset(data.remove_columns("length"), 64, "bfd", {"batch_size": len(data)})
    assert len(made) == len(theirs)


def test_the_bins_are_those_of_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(numpy.random.default_rng(1).integers(2, 200, 300).tolist())
    at_once = packed(data, 64, "training")[:]
    monkeypatch.setattr(bins, "TOKENS_AT_ONCE", 200)
    assert packed(data, 64, "training")[:] == at_once


def test_masks_stay_with_their_tokens() -> None:
    """A token is a label if it is odd. Some documents are split, and none of these parts is left out."""
    lengths = [30, 5, 17, 12, 40, 3]
    data = rows(lengths)
    masks = [[token % 2 for token in ids] for ids in data["input_ids"]]
    made = packed(rows(lengths, masks), 12, "training")
    assert made.features["loss_mask"] == List(Value("uint8"))
    assert made["loss_mask"][:] == [[token % 2 for token in ids] for ids in made["input_ids"]]
    assert sum(made["length"][:]) == sum(lengths)


def test_parts_without_a_label_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a long question with a short answer only the last part teaches something."""
    made = packed(rows([25, 4], [[0] * 23 + [1] * 2, [0, 0, 1, 1]]), 10, "training")
    assert documents(made) == [list(range(20, 25)), list(range(25, 29))]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "spec.training.maxLength: 1 of 2 training rows are longer than 10 tokens and are split; the model does not see"
        " one part while it reads another. 2 parts without a token to learn are left out"
    )
    assert lines[1] == (
        "spec.training.packing: 2 training rows are packed into 1 bins of at most 10 tokens, which are 90.0% full."
        " batchSize counts bins: each holds 2 rows on average"
    )


def test_parts_are_as_long_as_they_can_be() -> None:
    lengths = numpy.arange(1, 60)
    for most in (8, 9, 13):
        borders = numpy.append(parts(lengths, most), lengths.sum())
        sizes = numpy.diff(borders)
        assert set((numpy.cumsum(lengths) - lengths).tolist()) <= set(borders.tolist())
        assert sizes.max() == most
        assert sizes[1:].min() >= 2  # the first row has a single token
        assert len(sizes) == sum(-(-length // most) for length in lengths)


def test_no_bin_is_fuller_than_it_can_be() -> None:
    lengths = numpy.random.default_rng(3).integers(2, 1025, 20_000)
    bin_of = best_fit(lengths, 1024)
    held = numpy.bincount(bin_of, weights=lengths)
    assert held.max() <= 1024
    assert len(held) <= 1.01 * lengths.sum() / 1024
