"""Shared code of tasks whose batches have `labels`, and of tasks whose batches are texts or token ids."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier_trainer.models.attention import documents
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
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if mask is not None:
            return mask.sum()
        # In packed rows padding has position 0. A document has two tokens at least, so that its first one, which also
        # has position 0, is counted by its second one.
        return None if positions is None else (positions > 0).sum() + (positions == 1).sum()

    def computed_tokens(self, batch: Batch) -> int | None:
        ids = batch.get("input_ids")
        return None if ids is None else ids.numel()

    def without_weight(self, batch: Batch) -> Batch:
        return batch | {"labels": batch["labels"].new_full(batch["labels"].shape, IGNORED)}


@dataclass(frozen=True)
class TokenCollator:
    """Makes batches of rows with `input_ids` and, where not every token is in the loss, `loss_mask`.

    Rows are padded on the right to the longest one (see `padding_right`). A label is the token itself where `loss_mask`
    is 1 or missing, and `IGNORED` elsewhere. Collators of transformers know no mask: they take labels that are stored,
    which would be a second copy of the tokens.

    Packed rows also have `seq_lengths`, the lengths of their documents, which must not see each other (`data.bins`).
    """

    padding: int
    """Id of the token that fills up short rows."""
    tells_documents: bool = False
    """Whether batches of packed rows say where documents begin, for attention that computes each for itself."""

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return input_ids and labels, and what tells padding or documents apart, each an int64 tensor [rows, length].

        That is attention_mask, or for packed rows position_ids. With position ids, without a mask and without a cache,
        transformers lets no document attend to another one.
        """
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [label_ids(row, tokens) for row, tokens in zip(rows, ids, strict=True)]
        batch: Batch = {"input_ids": padded(ids, self.padding), "labels": padded(labels, IGNORED)}
        if "seq_lengths" not in rows[0]:
            return batch | {"attention_mask": padded([torch.ones_like(tokens) for tokens in ids], 0)}
        positions = [torch.cat([torch.arange(length) for length in row["seq_lengths"]]) for row in rows]
        batch |= {"position_ids": padded(positions, 0), "use_cache": False}
        if not self.tells_documents:
            return batch
        return batch | documents([row["seq_lengths"] for row in rows], batch["input_ids"].shape[1])


def label_ids(row: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Return the labels of a row, int64 [tokens]: its token ids, or `IGNORED` for tokens that are not learnt."""
    import torch

    mask, lengths = row.get("loss_mask"), row.get("seq_lengths")
    labels = ids.clone() if mask is None else torch.where(torch.tensor(mask) > 0, ids, IGNORED)
    if lengths is not None:
        # The first token of a document would be predicted from the last one of the document before it.
        labels[list(itertools.accumulate(lengths[:-1], initial=0))] = IGNORED
    return labels


def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Return [rows, length], padded on the right with `value`."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence(rows, batch_first=True, padding_value=value)


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
