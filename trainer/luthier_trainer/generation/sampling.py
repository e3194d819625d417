"""Draws tokens so that a text depends only on its own seed, and not on the other texts of its batch or shard.

`generate` of transformers draws a whole batch from one generator of the device. Here each text has its own generator on
the CPU. A logits processor draws the token and makes it the most likely one, which a greedy `generate` then takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier_api.generate import TextSettings
from luthier_trainer.runtime.heartbeat import beat


class SeededChoice(LogitsProcessor):
    """Draws one token for each text, by inverse transform sampling with a number from the text's seed and the step."""

    def __init__(self, seeds: Sequence[int], prompt_length: int, steps: int, device: torch.device) -> None:
        draws = [
            torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
        ]
        self.draws = torch.stack(draws).to(device)
        """Numbers uniform in [0, 1), shape [texts, steps]."""
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # In float64, so that the order of a device's sums does not decide between two tokens.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        step = input_ids.shape[1] - self.prompt_length
        targets = self.draws[:, step : step + 1] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, targets, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class RepetitionPenalty(LogitsProcessor):
    """The penalty of transformers, but without padding: the padding token is often the end-of-text token."""

    def __init__(self, penalty: float, attention_mask: torch.Tensor) -> None:
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty)
        self.padding = attention_mask == 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        length = self.padding.shape[1]
        tokens = input_ids.clone()
        # The last token of the prompt is never padding, and a token that appears twice is penalised once.
        tokens[:, :length] = torch.where(self.padding, input_ids[:, length - 1 : length], input_ids[:, :length])
        return self.penalty(tokens, scores)


class TokenHeartbeat(LogitsProcessor):
    """Sends a heartbeat for each token: a batch of long texts can take longer than the supervisor waits."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        beat()
        return scores


def processors(settings: TextSettings, seeds: Sequence[int], attention_mask: torch.Tensor) -> LogitsProcessorList:
    """Return the processors with which a greedy `generate` samples as `settings` say.

    `attention_mask`: [texts, length], of prompts that are padded to the same length.
    """
    chain = LogitsProcessorList([TokenHeartbeat()])
    if settings.repetition_penalty != 1.0:
        chain.append(RepetitionPenalty(settings.repetition_penalty, attention_mask))
    if settings.temperature > 0:
        chain.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            chain.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            chain.append(TopPLogitsWarper(settings.top_p))
        chain.append(SeededChoice(seeds, attention_mask.shape[1], settings.max_new_tokens, attention_mask.device))
    return chain
