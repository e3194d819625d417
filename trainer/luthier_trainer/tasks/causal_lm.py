"""causal-lm: predict the next token. The held-out loss is the mean over all tokens, whatever the batches and the number
of processes.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from luthier_trainer.tasks.base import LoadedModel, Loss, Task, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import IGNORED, LabelledBatches, measured_by, padding_right
from luthier_trainer.tasks.texts import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

MAX_PERPLEXING_LOSS = 100.0  # nats a token: beyond it, a perplexity is a number that tells nothing


class CausalLM(LabelledBatches, TextTask, Task):
    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(context.model_path, **context.weights)
        # Of GPT-2 and others transformers cannot tell it by the class's name, and would count a token a row that
        # nothing predicts.
        model.loss_type = "ForCausalLM"
        return LoadedModel(model)

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from transformers import Trainer

        model.config.pad_token_id = context.processor.pad_token_id
        options = {"compute_loss_func": self.loss(model), **measured_by(TokenLoss())}
        return TrainerSetup(Trainer, self.collator(context.processor), options)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        """Despite its name, the one collator of transformers that pads labels that are already there."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(padding_right(tokenizer), label_pad_token_id=IGNORED, padding=True)

    def loss(self, model: PreTrainedModel) -> Loss | None:
        """What training minimises; None where the model's own loss is exactly that.

        The models that call the loss function they are given do it right, and know what to add to it (experts' balance,
        say). The others (BART's and Pegasus' decoders, ...) average each micro-batch for itself, and compare a token
        with its own prediction.
        """
        calls_its_loss_function = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
        return None if calls_its_loss_function else next_token_loss


def next_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each token given those before it (nats), over the predicted tokens of the step."""
    from transformers.loss.loss_utils import ForCausalLMLoss

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
        import torch
        from torch.nn.functional import cross_entropy

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
        metrics = {"loss": mean}
        if mean < MAX_PERPLEXING_LOSS:
            metrics["perplexity"] = math.exp(mean)
        return metrics
