"""causal-lm: predict the next token. Held-out loss is the mean over all tokens, whatever the batches and the number of
processes.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from luthier_trainer.tasks.padding import padding_right

IGNORED = -100
PERPLEXING = 100.0  # nats a token: beyond, the perplexity is a number that says nothing, then none at all


class CausalLM:
    def load_model(self, path: str, labels: list[str] | None, **options: Any) -> tuple[PreTrainedModel, list[str]]:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        # Of GPT-2 and others transformers cannot tell it by the class's name, and would count a token a row that
        # nothing predicts.
        model.loss_type = "ForCausalLM"
        return model, []

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        # Despite its name, the one collator of transformers that pads labels that are already there.
        return DataCollatorForSeq2Seq(padding_right(processor), label_pad_token_id=IGNORED, padding=True)

    def idle(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> set[str]:
        return set()

    def loss(self, model: PreTrainedModel) -> Any:
        # The models that call the loss function they are given do it right, and know what to add to it (experts'
        # balance, say). The others (BART's and Pegasus' decoders, ...) average each micro-batch for itself, and compare
        # a token with its own prediction.
        return None if "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names else next_token_loss

    def figures(self) -> TokenLoss:
        return TokenLoss()


def next_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each token given those before it (nats), over the predicted tokens of the step."""
    return ForCausalLMLoss(
        outputs.logits, labels, vocab_size=outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch
    )


class TokenLoss:
    """evalLoss (nats a token) and perplexity. Rows are reduced to their sums where they are: logits are never
    gathered.
    """

    def __init__(self) -> None:
        self.loss = self.tokens = 0.0

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary] → [rows, 2]: summed loss and number of predicted tokens of each row."""
        targets = labels[:, 1:]
        losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return torch.stack([losses.sum(dim=1), (targets != IGNORED).sum(dim=1).to(losses.dtype)], dim=1).double()

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        loss, tokens = gathered.predictions.sum(dim=0).tolist()
        self.loss, self.tokens = self.loss + loss, self.tokens + tokens
        if not compute_result:
            return {}
        mean = self.loss / self.tokens if self.tokens else math.nan
        self.loss = self.tokens = 0.0
        return {"loss": mean} | ({"perplexity": math.exp(mean)} if mean < PERPLEXING else {})
