"""What tasks share whose batches have `labels`, and those whose batches are texts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from luthier_trainer.tasks.base import Batch, Metrics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that no loss of transformers counts


class LabelledBatches:
    """Counts batches whose tensor `labels` has one row for each row of the dataset."""

    def rows(self, batch: Batch) -> int:
        return len(batch["labels"])

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        mask = batch.get("attention_mask")
        return None if mask is None else mask.sum()

    def without_weight(self, batch: Batch) -> Batch:
        return batch | {"labels": batch["labels"].new_full(batch["labels"].shape, IGNORED)}


def measured_by(metrics: Metrics) -> dict[str, Any]:
    """Arguments of transformers' Trainer with which `metrics` see each batch of an evaluation."""

    def reduce(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        # Some models return more than logits; the logits come first.
        return metrics.reduce(logits[0] if isinstance(logits, tuple) else logits, labels)

    return {"compute_metrics": metrics, "preprocess_logits_for_metrics": reduce}


def padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` for collators: it shares the vocabulary and pads on the right. `tokenizer` itself stays as
    it is.

    Models with absolute positions (GPT-2, BERT) number a batch's columns, not a row's tokens, so padding on the left
    would move a row to other positions than it has alone, and a causal loss would also predict a row's first token from
    padding. Many tokenizers pad on the left because generation needs that; the result is saved with the tokenizer's own
    side.
    """
    copied = copy.copy(tokenizer)
    copied.padding_side = "right"
    return copied
