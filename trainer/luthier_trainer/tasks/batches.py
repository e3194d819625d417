"""Shared code of tasks whose batches have `labels`, and of tasks whose batches are texts or token ids."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier_trainer.tasks.base import Batch, Metrics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that all losses of transformers ignore


class LabelledBatches:
    """Implements `Batches` for batches with a tensor `labels` of shape [rows, ...], one entry for each dataset row."""

    def rows(self, batch: Batch) -> int:
        return len(batch["labels"])

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        mask = batch.get("attention_mask")
        return None if mask is None else mask.sum()

    def without_weight(self, batch: Batch) -> Batch:
        return batch | {"labels": batch["labels"].new_full(batch["labels"].shape, IGNORED)}


@dataclass(frozen=True)
class TokenCollator:
    """Makes batches of rows with `input_ids` and, where not every token is in the loss, `loss_mask`.

    Rows are padded on the right to the longest one (see `padding_right`). A label is the token itself where `loss_mask`
    is 1 or missing, and `IGNORED` elsewhere. Collators of transformers know no mask: they take labels that are stored,
    which would be a second copy of the tokens.
    """

    padding: int
    """Id of the token that fills up short rows."""

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids, attention_mask and labels, each an int64 tensor [rows, length]."""
        import torch

        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        ids = torch.full(shape, self.padding)
        attention = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            ids[i, : len(tokens)] = tokens
            attention[i, : len(tokens)] = 1
            mask = row.get("loss_mask")
            labels[i, : len(tokens)] = tokens if mask is None else torch.where(torch.tensor(mask) > 0, tokens, IGNORED)
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def measured_by(metrics: Metrics) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer that pass each batch of an evaluation to `metrics`."""

    def reduce(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        # Some models return a tuple of outputs, of which the first one holds the logits.
        return metrics.reduce(logits[0] if isinstance(logits, tuple) else logits, labels)

    return {"compute_metrics": metrics, "preprocess_logits_for_metrics": reduce}


def padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of `tokenizer` for collators that pads on the right. `tokenizer` itself does not change.

    Models with absolute positions (GPT-2, BERT) count positions by the columns of a batch. With padding on the left, a
    row would therefore have other positions than it has alone, and a causal loss would also predict the first token of
    a row from padding. Many tokenizers pad on the left because generation needs that, and the result is saved with the
    original side. The copy shares the vocabulary.
    """
    copied = copy.copy(tokenizer)
    copied.padding_side = "right"
    return copied
