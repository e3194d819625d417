"""What question-answering minimises, and how an answer is chosen from the windows of a context and measured."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from luthier_trainer.scoring.answers import exact_and_f1
from luthier_trainer.tasks.base import Batch
from luthier_trainer.tasks.measured import MeasuringTrainer
from luthier_trainer.tasks.question_answering import ANSWERS, BESIDE, CONTEXT, OFFSETS, ROW

EDGES = 2  # the labels of a window: the first and the last token of its answer


class SpanTrainer(MeasuringTrainer):
    """Trains a model to point to the first and the last token of an answer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(loss=self._of_outputs, **kwargs)

    def _of_outputs(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return span_loss(outputs, labels, num_items_in_batch, self.mask)


def span_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean cross-entropy of the first and the last token of answers (nats), a scalar.

    `outputs.start_logits`, `outputs.end_logits`: [rows, tokens]. `labels`: int64 [rows, 2]. `num_items_in_batch`: the
    labels of the whole optimiser step, two a window; without it, the mean is over those of this batch. `mask`: as for
    `window_losses`.
    """
    total = window_losses(outputs, labels, mask).sum() * EDGES
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def window_losses(outputs: Any, labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the loss of each window, fp32 [rows]: the mean of that of its first and of its last token.

    `mask`: int64 [rows, tokens]. No answer is at padding. transformers lets it be there, so that its loss depends on
    the length of the windows beside one.
    """
    parts = []
    for edge, name in enumerate(("start_logits", "end_logits")):
        logits = outputs[name].float()
        if mask is not None:
            logits = logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)
        parts.append(cross_entropy(logits, labels[:, edge], reduction="none"))
    return sum(parts) / EDGES


class AnswerScore:
    """Computes evalLoss (nats), and exact match and F1 of the answers by SQuAD's rules.

    A window has the answer with the highest sum of logits of its first and its last token, out of those with at most
    `longest` tokens. A row has the best one of its windows, or none, if the smallest sum of logits of the
    classification token in its windows is higher by more than `threshold`.
    """

    beside = BESIDE

    def __init__(self, longest: int, threshold: float) -> None:
        self.longest, self.threshold = longest, threshold

    def rows(self, outputs: Any, batch: Batch, trainer: Trainer) -> torch.Tensor:
        """Return for each window: loss, row, logits of the answer and of none, exact match and F1 of both, and whether
        the row has an answer.
        """
        start, end = (outputs[name].double() for name in ("start_logits", "end_logits"))
        losses, offsets = window_losses(outputs, batch["labels"], batch["attention_mask"]).double(), batch[OFFSETS]
        inside = (offsets[..., 0] >= 0) & (offsets[..., 0] < offsets[..., 1])
        # `input_ids` of all windows begin, or end, with the classification token; it is outside of the context.
        nowhere = self._nowhere(batch, trainer)
        none = start.gather(1, nowhere).squeeze(1) + end.gather(1, nowhere).squeeze(1)
        sums = start[:, :, None] + end[:, None, :]
        tokens = torch.arange(start.shape[1], device=start.device)
        distance = tokens[None, :] - tokens[:, None]
        allowed = inside[:, :, None] & inside[:, None, :] & ((distance >= 0) & (distance < self.longest))
        best, where = sums.masked_fill(~allowed, -torch.inf).flatten(1).max(dim=1)
        first, last = where // start.shape[1], where % start.shape[1]
        found = []
        for i, (begin, finish) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            answer = batch[CONTEXT][i][offsets[i, begin, 0] : offsets[i, finish, 1]] if best[i].isfinite() else ""
            wanted = batch[ANSWERS][i]
            found.append([*exact_and_f1(answer, wanted), *exact_and_f1("", wanted), float(bool(wanted))])
        numbers = torch.tensor(found, dtype=torch.float64, device=losses.device)
        return torch.cat([torch.stack([losses, batch[ROW].double(), best, none], dim=1), numbers], dim=1)

    def _nowhere(self, batch: Batch, trainer: Trainer) -> torch.Tensor:
        """Return the place of the classification token in each window, int64 [rows, 1]."""
        token = trainer.processing_class.cls_token_id
        return (batch["input_ids"] == token).int().argmax(dim=1, keepdim=True)

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        chosen: dict[int, list[float]] = {}
        for _, row, best, none, *figures in rows.tolist():
            before = chosen.get(int(row))
            if before is None:
                chosen[int(row)] = [best, none, *figures]
                continue
            lowest = min(before[1], none)
            chosen[int(row)] = [before[0], lowest, *before[2:]] if before[0] >= best else [best, lowest, *figures]
        answered, unanswerable, right = list[tuple[float, float, bool]](), 0, 0
        for best, none, exact, f1, exact_none, f1_none, has_answer in chosen.values():
            says_none = none - best > self.threshold
            answered.append((exact_none, f1_none, bool(has_answer)) if says_none else (exact, f1, bool(has_answer)))
            unanswerable += not has_answer
            right += says_none and not has_answer
        metrics = {
            "loss": rows[:, 0].mean().item(),
            "exactMatch": sum(exact for exact, _, _ in answered) / len(answered),
            "f1": sum(f1 for _, f1, _ in answered) / len(answered),
        }
        with_answer = [f1 for _, f1, has_answer in answered if has_answer]
        if with_answer:
            metrics["f1Answerable"] = sum(with_answer) / len(with_answer)
        if unanswerable:
            metrics["unanswerableAccuracy"] = right / unanswerable
        return metrics
