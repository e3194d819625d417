"""What a model holds while it writes: keys and values of all tokens, and the probabilities of the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Generation:
    """What a model writes: completions of prompts, all rows at once."""

    prompt: int
    """Tokens of the longest prompt."""
    completion: int
    """Tokens of the longest completion."""
    sample: Callable[[torch.Tensor], Any]
    """What chooses a token by its logits, fp32 [rows, vocabulary]."""


def written(forward: Any, generation: Generation, rows: int) -> None:
    """Compute the first and the last token of completions on the meta device.

    Between them, keys and values grow by a token in each pass. `forward`: a `models.memory.Forward`.
    """
    model = forward.model.get_base_model() if hasattr(forward.model, "get_base_model") else forward.model
    only_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    tokens = generation.prompt + generation.completion
    ids = torch.empty((rows, generation.prompt), dtype=torch.int64, device="meta")
    found = forward(input_ids=ids, attention_mask=torch.empty_like(ids), use_cache=True, **only_last)
    choose(generation, found)
    kept = found["past_key_values"]
    del found
    for layer in kept.layers:
        grow(layer, tokens - 1)
    ids = torch.empty((rows, tokens), dtype=torch.int64, device="meta")
    found = forward(
        input_ids=ids[:, -1:], attention_mask=torch.empty_like(ids), past_key_values=kept, use_cache=True, **only_last
    )
    choose(generation, found)


def choose(generation: Generation, outputs: Any) -> None:
    """Choose the next token, as `generate` of transformers 5.23 does it.

    It keeps the logits in fp32 until the token is chosen, and scores and probabilities of the token before.
    """
    logits = outputs["logits"][:, -1].to(torch.float32, copy=True)
    before = torch.empty_like(logits), torch.empty_like(logits)
    generation.sample(logits)
    del before


def grow(layer: Any, tokens: int) -> None:
    """Let a layer of a cache of transformers have the keys and values of `tokens` tokens, or of those in its window.

    Layers that keep a state of fixed size stay as they are.
    """
    if not isinstance(getattr(layer, "keys", None), torch.Tensor):
        return
    window = getattr(layer, "sliding_window", None)
    held = min(tokens, window - 1) if window else tokens
    for name in ("keys", "values"):
        before = getattr(layer, name)
        setattr(layer, name, before.new_empty((*before.shape[:-2], held, before.shape[-1])))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = tokens
