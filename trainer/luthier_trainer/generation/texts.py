"""`Text`: a text that is being written, from its prompt to the reason why it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from luthier_api.task_settings import TextSettings

FinishReason = Literal["stop", "length", "stop-string", "error"]
"""Why a text ends: the model ended it, it has `maxNewTokens`, a string of `stop` came, or it cannot be made."""
CONTEXT_TOKENS = 8  # before the tokens that are searched for a stop string, so that their text begins as in the whole


@dataclass(eq=False)
class Text:
    """A text that is being written. `work` is whatever the caller wants to find with it."""

    prompt: list[int]
    settings: TextSettings
    seed: int
    ends: frozenset[int]
    """Tokens that end a text."""
    tokenizer: PreTrainedTokenizerBase
    work: Any = None
    new: list[int] = field(default_factory=list)
    """Its tokens so far, without the one that ended it."""
    finish: FinishReason | None = None
    penalties: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    """What changes the scores by the tokens so far. They see this text alone."""

    @property
    def ended(self) -> bool:
        return self.finish is not None

    @cached_property
    def draws(self) -> list[float]:
        """Numbers uniform in [0, 1), one for each token. They depend on the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn: list[float] = torch.rand(self.settings.max_new_tokens, generator=generator, dtype=torch.float64).tolist()
        return drawn

    def take(self, token: int) -> None:
        """Add a token, and find out whether the text ends with it."""
        if token in self.ends:
            self.finish = "stop"
            return
        self.new.append(token)
        if self._stopped():
            self.finish = "stop-string"
        elif len(self.new) == self.settings.max_new_tokens:
            self.finish = "length"

    def text(self) -> str:
        """Return what was written, up to the first stop string."""
        whole = continuation(self.tokenizer, self.prompt, self.new)
        found = [at for stop in self.settings.stop if (at := whole.find(stop)) >= 0]
        return whole[: min(found)] if found else whole

    def _stopped(self) -> bool:
        """Return whether a stop string ends with the newest token.

        Each token but the special ones has a byte at least, so a stop string lies in as many tokens as it has bytes.
        """
        if not self.settings.stop:
            return False
        longest = max(len(stop.encode()) for stop in self.settings.stop)
        special = set(self.tokenizer.all_special_ids)
        first, seen = len(self.new), 0
        while first > 0 and seen <= longest:
            first -= 1
            seen += self.new[first] not in special
        before = (self.prompt + self.new[:first])[-CONTEXT_TOKENS:]
        tail = continuation(self.tokenizer, before, self.new[first:])
        return any(stop in tail for stop in self.settings.stop)


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return exactly the text that the tokens `new` add to the text of `prompt`.

    Both are decoded together, and the text of the prompt is cut off. If the new tokens were decoded alone,
    SentencePiece tokenizers would drop a leading blank, and a character whose bytes begin in the prompt would be lost.
    Blanks before punctuation stay as the model wrote them.
    """
    before, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for tokens in ([*prompt], [*prompt, *new])
    )
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return whole[shared:]
