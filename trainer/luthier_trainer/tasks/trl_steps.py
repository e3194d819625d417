"""What the trainers of TRL compute in a step, on the meta device, from which memory is planned.

TRL's own losses read values, which meta tensors lack. Here stands what they hold, in their order (TRL 1.16); tests
compare it with TRL's trainers on a CPU. Imports torch and TRL at the top, so tasks import this module in functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from trl.trainer.utils import add_fused_lm_head

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.models.generation_trace import Generation
from luthier_trainer.models.memory import Forward, LossStep, Trial
from luthier_trainer.models.meta_kernels import LOG_PROB_TOKENS
from luthier_trainer.tasks.base import Batch, Model
from luthier_trainer.tasks.texts import token_trial

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS_METRICS = ("log_probs", "entropy", "mean_logits", "is_top1")
RATED_METRICS = ("log_probs", "entropy", "mean_logits")
WRITTEN_METRICS = ("log_probs", "entropy")


def of_pairs(model: Model, task: str, spec: FineTuneJobSpec, data: Dataset | None) -> Trial:
    """Return a step over pairs of answers: both sequences of a pair are rows of the model (DPOTrainer)."""

    def step(forward: Forward, batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["input_ids"].clone()
        outputs = forward(**batch, labels=labels, use_cache=False, fused_lm_head=True)
        chosen, rejected = outputs["log_probs"].sum(dim=1).chunk(2)
        if spec.preference.precompute_reference:
            before = torch.empty_like(chosen), torch.empty_like(rejected)
        else:
            with forward.as_reference():
                reference = forward(**batch, labels=labels, use_cache=False, fused_lm_head=True)
            before = reference["log_probs"].sum(dim=1).chunk(2)
        return -logsigmoid(spec.preference.beta * ((chosen - before[0]) - (rejected - before[1]))).mean()

    trial = sequences(model, task, spec, data, step, rows_a_row=2)
    return with_log_probs(trial, PAIRS_METRICS)


def of_rated(model: Model, task: str, spec: FineTuneJobSpec, data: Dataset | None) -> Trial:
    """Return a step over answers that are good or bad, each also after another prompt (KTOTrainer)."""

    def log_probs(forward: Forward, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        given = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        found: torch.Tensor = forward(**given, labels=ids.clone(), use_cache=False, fused_lm_head=True)["log_probs"]
        return found.sum(dim=1)

    def step(forward: Forward, batch: dict[str, Any]) -> torch.Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        # An answer after another prompt may be longer than each of both.
        longer = ids.new_empty((len(ids), min(2 * ids.shape[1], spec.training.max_length)))
        more = None if mask is None else torch.empty_like(longer)
        with torch.no_grad():
            divergence = log_probs(forward, longer, more)
        own = log_probs(forward, ids, mask)
        with forward.as_reference():
            divergence = divergence - log_probs(forward, longer, more)
            before = log_probs(forward, ids, mask)
        return (1 - torch.sigmoid(spec.preference.beta * (own - before - divergence.mean().clamp(min=0)))).mean()

    return with_log_probs(sequences(model, task, spec, data, step), RATED_METRICS)


def of_rewards(model: Model, task: str, spec: FineTuneJobSpec, data: Dataset | None) -> Trial:
    """Return a step over pairs of answers that get a reward each (RewardTrainer)."""

    def step(forward: Forward, batch: dict[str, Any]) -> torch.Tensor:
        chosen, rejected = forward(**batch, use_cache=False)["logits"].squeeze(-1).chunk(2)
        loss = -logsigmoid(chosen - rejected).mean()
        if spec.reward.center_rewards_coefficient is not None:
            loss = loss + spec.reward.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        return loss

    return sequences(model, task, spec, data, step, rows_a_row=2, labels=1)


def of_completions(model: Model, task: str, spec: FineTuneJobSpec, data: Dataset | None) -> Trial:
    """Return a step over completions that the model writes itself (GRPOTrainer).

    What the reference says of them is computed before, some rows at a time, and holds less than the step.
    """
    grpo = spec.grpo
    room = spec.training.max_length - grpo.max_completion_length
    prompt = max(data["length"][:]) if data is not None else room

    def step(forward: Forward, batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["input_ids"].clone()
        outputs = forward(**batch, labels=labels, fused_lm_head=True)
        log_probs = outputs["log_probs"][:, -grpo.max_completion_length :]
        ratio = torch.exp(log_probs - log_probs.detach())
        clipped = torch.clamp(ratio, 0.8, 1.2)
        advantages = torch.empty(len(labels), 1, device=labels.device)
        loss = -torch.min(ratio * advantages, clipped * advantages)
        if grpo.beta:
            more = torch.empty_like(log_probs) - log_probs
            loss = loss + grpo.beta * (torch.exp(more) - more - 1)
        return (loss * torch.empty_like(log_probs)).sum() / 2

    def sample(scores: torch.Tensor) -> torch.Tensor:
        ids = torch.empty((len(scores), 1), dtype=torch.int64, device=scores.device)
        if grpo.temperature != 1:
            scores = TemperatureLogitsWarper(grpo.temperature)(ids, scores)
        if grpo.top_p < 1:
            scores = TopPLogitsWarper(grpo.top_p)(ids, scores)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)

    trial = sequences(model, task, spec, None, step, tokens=prompt + grpo.max_completion_length)
    writes = Generation(prompt, grpo.max_completion_length, sample)
    return with_log_probs(replace(trial, writes=writes), WRITTEN_METRICS)


def sequences(
    model: Model,
    task: str,
    spec: FineTuneJobSpec,
    data: Dataset | None,
    step: LossStep,
    *,
    rows_a_row: int = 1,
    labels: int = 0,
    tokens: int | None = None,
) -> Trial:
    """Return a step over the longest rows of tokens.

    `rows_a_row`: rows of the model for each of the dataset. `labels`: outputs of a head. `tokens`: of a row, if they
    are not told by the rows.
    """
    made = token_trial(model, task, spec, data, labels_of_tokens=True, labels=labels)
    longest = tokens or made.row_tokens

    def batch(rows: int) -> Batch:
        ids = torch.empty((rows * rows_a_row, longest), dtype=torch.int64, device="meta")
        return {"input_ids": ids, "attention_mask": torch.empty_like(ids)}

    # Both answers of a pair are padded to the longer one.
    mixed = made.mixed_lengths or rows_a_row > 1 or tokens is not None
    return replace(made, batch=batch, row_tokens=longest, mixed_lengths=mixed, step=step)


def with_log_probs(trial: Trial, outputs: tuple[str, ...]) -> Trial:
    """Return `trial` with TRL's head, which computes `outputs` of each token."""
    add_fused_lm_head(trial.model, outputs=outputs)
    return replace(trial, loss_tokens=LOG_PROB_TOKENS)
