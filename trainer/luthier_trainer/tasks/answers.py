"""What the tasks have in common that learn with TRL from pairs, or from answers with a label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier_trainer.tasks.base import Batch
from luthier_trainer.tasks.texts import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class AnswersTask(TextTask):
    """A task whose rows are answers to prompts, as the collators of TRL make batches of them."""

    def added_tokens(self, processor: PreTrainedTokenizerBase) -> int:
        return super().added_tokens(processor) + 1  # the end-of-text token

    def rows(self, batch: Batch) -> int:
        if "label" in batch:
            return len(batch["label"])
        return len(batch["input_ids"]) // 2  # the chosen sequences, then the rejected ones

    def tokens(self, batch: Batch) -> torch.Tensor:
        return batch["attention_mask"].sum()

    def computed_tokens(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def without_weight(self, batch: Batch) -> Batch:
        return batch  # TRL's loss does not count items
