"""What embedding minimises: each text finds its own partner among those of its micro-batch; and how it is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import Trainer

from luthier_trainer.tasks.base import Batch
from luthier_trainer.tasks.measured import MeasuringTrainer

AT_ONCE = 256  # held-out texts whose similarities are computed at once


def vectors(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Return a vector of length 1 for each text, fp32 [texts, width].

    `states`: of the last layer, [texts, tokens, width]. `mask`: int64 [texts, tokens], 0 for padding on the right.
    """
    states = states.float()
    pools = {"mean": _mean, "cls": lambda states, mask: states[:, 0], "last": _last}
    return normalize(pools[mode](states, mask), dim=-1)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = (mask.sum(dim=1) - 1).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    return states.gather(1, last).squeeze(1)


def ranking_losses(texts: torch.Tensor, rows: int, scale: float) -> torch.Tensor:
    """Return the cross-entropy (nats) of choosing its own partner for each row, fp32 [rows].

    `texts`: vectors of the anchors, their partners, and perhaps texts that do not belong,
    [texts of a row × rows, width]. Similarities are multiplied by `scale`.
    """
    scores = scale * texts[:rows] @ texts[rows:].T
    return cross_entropy(scores, torch.arange(rows, device=texts.device), reduction="none")


def ranking_loss(
    texts: torch.Tensor, labels: torch.Tensor, scale: float, num_items_in_batch: Any = None
) -> torch.Tensor:
    """Return the sum of the losses of the rows of a micro-batch, divided by the rows of the whole step.

    `labels`: [rows]. Without `num_items_in_batch`, the mean over this batch.
    """
    losses = ranking_losses(texts, len(labels), scale)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


class RankingTrainer(MeasuringTrainer):
    """Trains an encoder of texts."""

    def __init__(self, *, mode: str, scale: float, **kwargs: Any) -> None:
        super().__init__(loss=self._of_outputs, **kwargs)
        self.mode, self.scale = mode, scale

    def _of_outputs(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        texts = vectors(outputs["last_hidden_state"], self.mask, self.mode)
        return ranking_loss(texts, labels, self.scale, num_items_in_batch)


class VectorScore:
    """Computes evalLoss in blocks of `training.batchSize` rows, and how often a text finds its partner among all.

    So none of these figures depends on the micro-batches and the number of processes.
    """

    beside = ()

    def __init__(self, mode: str, scale: float, block: int) -> None:
        self.mode, self.scale, self.block = mode, scale, block

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        """Return the vectors of all texts of a row beside each other, fp32 [rows, texts × width]."""
        texts = vectors(outputs["last_hidden_state"], batch["attention_mask"], self.mode)
        width = texts.shape[1]
        of_rows = texts.view(-1, len(batch["labels"]), width).transpose(0, 1)
        return torch.cat([of_rows.flatten(1), of_rows.new_full((len(of_rows), 1), width)], dim=1)

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        width = int(rows[0, -1])
        texts = rows[:, :-1].view(len(rows), -1, width).transpose(0, 1)  # [texts of a row, rows, width]
        losses = [
            ranking_losses(block.flatten(0, 1), block.shape[1], self.scale) for block in texts.split(self.block, dim=1)
        ]
        anchors, partners = texts[0], texts[1]
        ranks = torch.cat([_ranks(anchors, partners, i) for i in range(0, len(anchors), AT_ONCE)]).double()
        metrics = {
            "loss": torch.cat(losses).double().mean().item(),
            "recallAt1": (ranks == 1).double().mean().item(),
            "mrr": (1 / ranks).mean().item(),
        }
        if len(texts) > 2:
            nearer = cosine_similarity(anchors, partners) > cosine_similarity(anchors, texts[2])
            metrics["tripletAccuracy"] = nearer.double().mean().item()
        return metrics


def _ranks(anchors: torch.Tensor, partners: torch.Tensor, begin: int) -> torch.Tensor:
    """Return the place of their partners for `AT_ONCE` anchors, from 1; equal ones stand before it. int64 [anchors]"""
    scores = anchors[begin : begin + AT_ONCE] @ partners.T
    own = scores.gather(1, torch.arange(begin, begin + len(scores))[:, None])
    return (scores >= own).sum(dim=1)
