"""KTO, which learns from answers that are good or bad each: TRL's KTOTrainer with rows in random order.

TRL pairs each prompt with the answer of the row before it, once, by the order of the rows, and then never shuffles
them; a file that begins with all good answers would be learnt so. Here the collator makes these pairs within each
micro-batch, so that the rows come in an order of their own in each epoch.

Imports torch and TRL at the top, so the task imports this module inside the functions that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.nn.functional import pad
from trl import KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from luthier_api.preference import Preference
from luthier_trainer.data import rated
from luthier_trainer.tasks.trl_trainer import AgainstReference

if TYPE_CHECKING:
    from transformers import EvalPrediction


class MismatchingCollator(DataCollatorForUnpairedPreference):
    """Adds to each row the answer of the row before it in the batch, of which the KL divergence is estimated."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        others = [examples[i - 1]["completion_ids"] for i in range(len(examples))]
        return dict(
            super().torch_call(
                [row | {"KL_completion_ids": other} for row, other in zip(examples, others, strict=True)]
            )
        )


class RatedTrainer(AgainstReference, KTOTrainer):
    """TRL's trainer with a KL divergence over all processes, and exact evaluation metrics."""

    def __init__(self, *, preference: Preference, **options: Any) -> None:
        super().__init__(**options)
        # TRL asks for the order of the file, by which it makes pairs. Here the collator makes them.
        self.args.train_sampling_strategy = "random"
        labels = options["train_dataset"]["label"][:]
        self.desirable_weight, self.undesirable_weight = rated.weights(labels, preference)
        self.compute_metrics = RatedMetrics(self.beta, self.desirable_weight, self.undesirable_weight)

    def _compute_kl_logps(self, model: Any, batch: Any) -> torch.Tensor:
        """Return the mean log-probability, [], of the answers after other prompts, over all processes.

        A row whose answer is the only one of its batch has no other prompt, and does not count.
        """
        logps, counts = super()._compute_kl_logps(model, batch), mismatched(batch)
        sums = torch.stack([(logps * counts).sum(), counts.sum().to(logps.dtype)])
        total, rows = self.accelerator.reduce(sums, reduction="sum")
        return total / rows.clamp(min=1)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        """Return a loss, and of each row the log-ratio of its answer, that of the answer after another prompt, whether
        that one counts, and the label, double [rows, 4].

        The loss is a placeholder: it depends on the KL divergence over all rows, which `RatedMetrics` computes. So are
        the labels, because transformers computes metrics only if there are labels.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            own, other = self._log_probs(model, inputs, ""), self._log_probs(model, inputs, "KL_")
            before, before_other = self.compute_ref_log_probs(self.ref_model or model, inputs)
        rows = torch.stack(
            [own - before, other - before_other, mismatched(inputs).to(own.dtype), inputs["label"].to(own.dtype)], dim=1
        )
        return rows.new_zeros(()), rows.double(), torch.zeros(len(rows), device=rows.device)

    def _log_probs(self, model: Any, inputs: Any, prefix: str) -> torch.Tensor:
        """Return the log-probability of each answer, [rows]. `prefix`: of the keys in the batch."""
        ids = inputs[f"{prefix}input_ids"]
        labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
        mask = inputs[f"{prefix}attention_mask"]
        found = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
        return found.log_probs.sum(dim=1).float()


def mismatched(batch: Any) -> torch.Tensor:
    """Return whether the answer after another prompt is not the row's own one, bool [rows]."""
    own, other = batch["input_ids"], batch["KL_input_ids"]
    width = max(own.shape[1], other.shape[1])
    filled = [
        pad(ids.masked_fill(batch[f"{prefix}attention_mask"] == 0, -1), (0, width - ids.shape[1]), value=-1)
        for prefix, ids in (("", own), ("KL_", other))
    ]
    return (filled[0] != filled[1]).any(dim=1)


class RatedMetrics:
    """Computes evalLoss, the KL divergence and the rewards over all held-out rows."""

    def __init__(self, beta: float, good_weight: float, bad_weight: float) -> None:
        self.beta, self.weights = beta, (bad_weight, good_weight)
        self.rows: list[torch.Tensor] = []

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.rows.append(gathered.predictions.cpu())
        if not compute_result:
            return {}
        rows, self.rows = torch.cat(self.rows).numpy(), []
        ratios, others, counts, good = rows[:, 0], rows[:, 1], rows[:, 2] > 0, rows[:, 3] > 0
        kl = max(float(others[counts].mean()), 0.0) if counts.any() else 0.0
        signs, weights = numpy.where(good, 1.0, -1.0), numpy.where(good, self.weights[1], self.weights[0])
        losses = weights / (1 + numpy.exp(signs * self.beta * (ratios - kl)))  # Eq. 7: 1 - sigmoid
        metrics = {"loss": float(losses.mean()), "kl": kl}
        if good.all() or not good.any():
            return metrics
        chosen, rejected = self.beta * ratios[good], self.beta * ratios[~good]
        lower = numpy.searchsorted(numpy.sort(rejected), chosen, side="left")  # bad answers with a lower reward
        return metrics | {
            "rewardAccuracy": float(lower.sum() / (len(chosen) * len(rejected))),
            "rewardMargin": float(chosen.mean() - rejected.mean()),
            "rewardChosen": float(chosen.mean()),
            "rewardRejected": float(rejected.mean()),
        }
