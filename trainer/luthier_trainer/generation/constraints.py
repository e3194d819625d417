"""Lets a text take only the tokens that a JSON schema or a regular expression allows.

llguidance compiles them, and says after each token which ones may follow.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from llguidance import LLMatcher, grammar_from, hf
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier_api.task_settings import TextSettings
from luthier_trainer.generation.texts import Text


class Constraints:
    """Compiles constraints for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.words: Any = None
        """The vocabulary, as llguidance reads it."""
        self.compiled: dict[tuple[str, str], Any] = {}
        """Kind and text of a constraint → a matcher that has read nothing."""

    def matcher(self, settings: TextSettings) -> Any:
        """Return what follows the tokens of a text, or None without a constraint.

        Raises ValueError, with the field, if the constraint cannot be compiled, or not be used with the tokenizer.
        """
        kind, text = constraint_of(settings)
        if text is None:
            return None
        if (kind, text) not in self.compiled:
            self.compiled[kind, text] = self._compile(kind, text)
        return self.compiled[kind, text].deep_copy()

    def _compile(self, kind: str, text: str) -> Any:
        """Return a matcher. Raises ValueError."""
        field = FIELDS[kind]
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{field}: needs a fast tokenizer, and the model's is a {type(self.tokenizer).__name__}")
        if self.words is None:
            self.words = hf.from_tokenizer(self.tokenizer)
        try:
            matcher = LLMatcher(self.words, grammar_from(kind, text))  # type: ignore[arg-type]
            error = matcher.get_error()
        except ValueError as problem:
            error = str(problem)
        if error:
            raise ValueError(f"{field}: cannot be used: {' '.join(error.split())[:300]}")
        return matcher


FIELDS = {"json_schema": "text.jsonSchema", "regex": "text.regex"}
"""llguidance's name of a kind of constraint → our field."""


def constraint_of(settings: TextSettings) -> tuple[str, str | None]:
    """Return the kind and the text of the constraint; None as the text if there is none."""
    if settings.json_schema is not None:
        return "json_schema", settings.json_schema
    return "regex", settings.regex


class Constrained(LogitsProcessor):
    """Leaves the tokens that may follow. Where the text may end, those that end it are among them."""

    def __init__(self, text: Text, matcher: Any) -> None:
        self.text, self.matcher, self.read = text, matcher, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for token in self.text.new[self.read :]:
            self.matcher.consume_token(token)
        self.read = len(self.text.new)
        bits = numpy.unpackbits(numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8), bitorder="little")
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        count = min(len(bits), len(allowed))
        allowed[:count] = torch.from_numpy(bits[:count].astype(bool))
        # Also the tokens that end a turn, of which llguidance knows nothing.
        allowed[sorted(self.text.ends)] = self.matcher.is_accepting()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)
