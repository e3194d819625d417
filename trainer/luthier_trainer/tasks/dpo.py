"""DPO and its kin, which learn from pairs of answers: TRL's DPOTrainer, exact metrics, and a reference that is kept.

Imports torch and TRL at the top, so the task imports this module inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

from luthier_api.preference import Preference
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.tasks.kept_reference import COLUMNS, KeptReference
from luthier_trainer.tasks.trl_trainer import AgainstReference

if TYPE_CHECKING:
    from transformers import EvalPrediction

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Preference], torch.Tensor]


def robust(margin: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, asked: Preference) -> torch.Tensor:
    """Return the loss of sigmoid as it would be without the wrong pairs (arXiv:2403.00409, Eq. 12), [pairs]."""
    wrong = asked.label_smoothing or 0.0
    return (wrong * logsigmoid(-margin) - (1 - wrong) * logsigmoid(margin)) / (1 - 2 * wrong)


LOSSES: dict[str, Loss] = {
    "sigmoid": lambda margin, chosen, rejected, asked: -logsigmoid(margin),
    "robust": robust,
    "hinge": lambda margin, chosen, rejected, asked: torch.relu(1 - margin),
    "ipo": lambda margin, chosen, rejected, asked: (chosen - rejected - 1 / (2 * asked.beta)) ** 2,
}
"""Loss of each pair, [pairs], by beta times the difference of the log-ratios, and both log-ratios a token."""


class PreferenceTrainer(AgainstReference, DPOTrainer):
    """TRL's trainer with exact evaluation metrics."""

    def __init__(self, *, kept_in: Path | None, preference: Preference, **options: Any) -> None:
        """`kept_in`: the folder for the reference's log-probabilities if they are computed before the training."""
        super().__init__(**options)
        self.preference = preference
        self.kept_in = kept_in
        self.precompute_ref_logps = kept_in is not None

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # `train` computes them, which can stop, and goes on where an earlier attempt was stopped

    def train(self, *args: Any, **options: Any) -> Any:
        if self.kept_in is not None:
            if self.is_deepspeed_enabled:
                self.model.to(self.args.device)  # as DeepSpeed does it later
            kept = KeptReference(self.kept_in, self)
            self.train_dataset = kept.with_reference(self.train_dataset, "train", self._reference_of)
            if self.eval_dataset is not None:
                self.eval_dataset = kept.with_reference(self.eval_dataset, "eval", self._reference_of)
        return super().train(*args, **options)

    def _reference_of(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        """Return the reference's log-probabilities of both answers of each row, [rows][2]."""
        batch = self._prepare_inputs(self.data_collator(rows))
        found = self.compute_ref_log_probs(self.model, batch)
        beat()
        return torch.stack(found, dim=1).float().tolist()

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        """Return the mean loss, and loss and both rewards of each pair, double [pairs, 3].

        TRL's own metrics are means over a batch that include the rows which fill it up. The third value is a
        placeholder for labels, because transformers computes metrics only if there are labels.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
            if self.kept_in is None:
                before = self.compute_ref_log_probs(self.ref_model or model, inputs)
            else:
                before = tuple(inputs[name] for name in COLUMNS)
        chosen, rejected = chosen.float() - before[0].float(), rejected.float() - before[1].float()
        lengths = inputs["completion_mask"].sum(dim=1).clamp(min=1).chunk(2)
        loss = LOSSES[self.preference.loss_type](
            self.beta * (chosen - rejected), chosen / lengths[0], rejected / lengths[1], self.preference
        )
        pairs = torch.stack([loss, self.beta * chosen, self.beta * rejected], dim=1).double()
        return loss.mean(), pairs, torch.zeros(len(pairs), device=pairs.device)


class PairMetrics:
    """Computes evalLoss and the rewards, each a mean over all held-out pairs."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.pairs, self.loss, self.right, self.chosen, self.rejected = 0, 0.0, 0, 0.0, 0.0

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        loss, chosen, rejected = gathered.predictions.unbind(dim=1)
        self.pairs += len(loss)
        self.loss += loss.sum().item()
        self.right += int((chosen > rejected).sum().item())
        self.chosen += chosen.sum().item()
        self.rejected += rejected.sum().item()
        if not compute_result:
            return {}
        metrics = {
            "loss": self.loss / self.pairs,
            "rewardAccuracy": self.right / self.pairs,
            "rewardMargin": (self.chosen - self.rejected) / self.pairs,
            "rewardChosen": self.chosen / self.pairs,
            "rewardRejected": self.rejected / self.pairs,
        }
        self._begin()
        return metrics
