"""Chooses the next token of each text, so that a text depends only on its own seed, and not on the texts beside it.

What changes the scores are transformers' own processors, in transformers' own order. Those that look at the tokens so
far see one text alone, without padding. `generate` of transformers draws a whole batch from one generator of the
device; here each text has its own numbers, drawn on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from luthier_api.task_settings import TextSettings
from luthier_trainer.generation.texts import Text
from luthier_trainer.runtime.heartbeat import beat


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties: what a token loses if the text has it, and what it loses for each time. The prompt is not
    counted.
    """

    def __init__(self, text: Text, presence: float, frequency: float) -> None:
        self.text, self.presence, self.frequency = text, presence, frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counts = torch.bincount(torch.tensor(self.text.new, dtype=torch.long), minlength=scores.shape[-1])
        counts = counts.to(scores.device, scores.dtype)
        return scores - self.presence * (counts > 0) - self.frequency * counts


PENALTIES: Mapping[str, Callable[[Any, Text], LogitsProcessor]] = {
    "repetition_penalty": lambda value, text: RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, text: NoRepeatNGramLogitsProcessor(value),
    "min_new_tokens": lambda value, text: MinNewTokensLengthLogitsProcessor(
        len(text.prompt), value, sorted(text.ends) or [-1]
    ),
    "presence_penalty": lambda value, text: CountPenalty(text, value, 0.0),
    "frequency_penalty": lambda value, text: CountPenalty(text, 0.0, value),
}
"""Field of `TextSettings` → what changes the scores of one text by its tokens, in the order of calls."""
WARPERS: Mapping[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
"""Field of `TextSettings` → what changes the scores before a token is drawn, in the order in which they are called."""


def chain_of(
    table: Mapping[str, Callable[..., LogitsProcessor]], settings: TextSettings, *given: Any
) -> LogitsProcessorList:
    """Return the processors of a table for the fields that are not at their default, which is always without effect."""
    fields = type(settings).model_fields
    values = {name: getattr(settings, name) for name in table}
    return LogitsProcessorList(
        [table[name](value, *given) for name, value in values.items() if value != fields[name].default]
    )


class Choice:
    """Adds a token to each text of a batch, by its own settings."""

    def __init__(self) -> None:
        self.warpers: dict[str, LogitsProcessorList] = {}
        """Settings as JSON → the processors before a token is drawn."""

    def __call__(self, texts: Sequence[Text | None], logits: torch.Tensor) -> None:
        """Choose from logits [texts, vocabulary]. None, or a text that has ended, gets nothing."""
        beat()  # a batch of long texts can take longer than the supervisor waits
        at_work = [(row, text) for row, text in enumerate(texts) if text is not None and not text.ended]
        scores = logits.to(torch.float32, copy=True)
        for row, text in at_work:
            if text.penalties:
                tokens = torch.tensor([text.prompt + text.new], device=scores.device)
                scores[row : row + 1] = text.penalties(tokens, scores[row : row + 1])
        chosen = scores.argmax(-1)
        # All rows are computed for each of the settings, so that kernels have one shape whatever is in the batch.
        drawing = {id(text.settings): text.settings for _, text in at_work if text.settings.temperature > 0}
        for settings in drawing.values():
            rows = [(row, text) for row, text in at_work if text.settings is settings]
            numbers = torch.zeros(len(texts), dtype=torch.float64)
            mine = torch.zeros(len(texts), dtype=torch.bool)
            for row, text in rows:
                numbers[row], mine[row] = text.draws[len(text.new)], True
            warped = self._chain(settings)(None, scores)
            chosen = torch.where(mine.to(scores.device), drawn(warped, numbers.to(scores.device)), chosen)
        tokens = chosen.tolist()
        for row, text in at_work:
            text.take(tokens[row])

    def _chain(self, settings: TextSettings) -> LogitsProcessorList:
        key = settings.model_dump_json()
        if key not in self.warpers:
            self.warpers[key] = chain_of(WARPERS, settings)
        return self.warpers[key]


def drawn(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return one token for each row of `scores` [texts, vocabulary], by inverse transform sampling.

    `numbers`: [texts], uniform in [0, 1).
    """
    # In float64, so that the order of a device's sums does not decide between two tokens.
    cumulative = scores.double().softmax(-1).cumsum(-1)
    targets = numbers[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=scores.shape[-1] - 1)[:, 0]


class Heartbeat(LogitsProcessor):
    """Sends a heartbeat for each token of `generate`."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        beat()
        return scores


class Chosen(LogitsProcessor):
    """Lets `generate` take the tokens that `Choice` adds to the texts, for models that cannot be run in slots."""

    def __init__(self, texts: Sequence[Text], choice: Choice, padding: int) -> None:
        self.texts, self.choice, self.padding = texts, choice, padding

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.choice(self.texts, scores)
        # The token that ends a text is not kept. `Ended` ends it, whatever token is taken.
        taken = [self.padding if text.finish == "stop" else text.new[-1] for text in self.texts]
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, torch.tensor(taken, device=scores.device)[:, None], 0.0)


class Ended(StoppingCriteria):
    """Tells `generate` which texts have ended."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.tensor([text.ended for text in self.texts], device=input_ids.device)
