"""Batches of token ids: padding on the right, and labels where the loss mask says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from luthier_trainer.tasks.batches import IGNORED, LabelledBatches, TokenCollator

PADDING = 2


@dataclass(frozen=True)
class Case:
    name: str
    rows: list[dict[str, Any]]
    labels: list[list[int]]


CASES = [
    Case(
        name="every token",
        rows=[{"input_ids": [5, 6, 7]}, {"input_ids": [8]}],
        labels=[[5, 6, 7], [8, IGNORED, IGNORED]],
    ),
    Case(
        name="the tokens of a mask, among them the padding token at the end of a row",
        rows=[{"input_ids": [5, 6, PADDING], "loss_mask": [0, 1, 1]}, {"input_ids": [8, 9], "loss_mask": [0, 1]}],
        labels=[[IGNORED, 6, PADDING], [IGNORED, 9, IGNORED]],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_batches_are_those_of_trl(case: Case) -> None:
    batch = TokenCollator(PADDING)([row | {"length": 0} for row in case.rows])
    assert batch["labels"].tolist() == case.labels
    given = [
        {"input_ids": row["input_ids"], "labels": labels[: len(row["input_ids"])]}
        for row, labels in zip(case.rows, case.labels, strict=True)
    ]
    expect = DataCollatorForLanguageModeling(PADDING)(given)
    assert batch.keys() == expect.keys()
    assert all(torch.equal(batch[name], expect[name]) for name in batch)


def test_the_first_token_of_a_packed_document_is_no_label() -> None:
    """It has nothing before it from which it could be predicted. Padding is no token of a document."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [1, 0, 1, 1, 1], "seq_lengths": [3, 2]},
        {"input_ids": [5, 6], "loss_mask": [1, 1], "seq_lengths": [2]},
    ]
    batch = TokenCollator(PADDING)(rows)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9], [IGNORED, 6, *[IGNORED] * 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, *[PADDING] * 3]]
    assert batch["use_cache"] is False
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    batches = LabelledBatches()
    assert (batches.tokens(batch).item(), batches.computed_tokens(batch)) == (7, 10)
