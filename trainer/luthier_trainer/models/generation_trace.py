"""What a model holds while it writes: keys and values of all tokens, and the probabilities of the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput


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


@dataclass(frozen=True)
class Search:
    """What an encoder-decoder writes: a text for each row, by beam search or, with one beam, greedily."""

    inputs: Mapping[str, torch.Tensor]
    """What the encoder reads, on the meta device: [rows, ...] each."""
    text: int
    """Tokens of the longest text."""
    beams: int


def searched(forward: Any, search: Search) -> None:
    """Compute the encoder's pass, and the first and the last token of texts on the meta device.

    Each beam has the keys and values of its own text, and of a copy of the encoder's outputs (transformers 5.23).
    `forward`: a `models.memory.Forward`.
    """
    on_meta = {"dtype": torch.int64, "device": "meta"}
    rows = len(next(iter(search.inputs.values())))
    first = torch.empty((rows, 1), **on_meta)
    read = forward(**search.inputs, decoder_input_ids=first, use_cache=False)
    hidden = read["encoder_last_hidden_state"].repeat_interleave(search.beams, dim=0)
    del read
    beside = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
        "use_cache": True,
    }
    if (mask := search.inputs.get("attention_mask")) is not None:
        beside["attention_mask"] = mask.repeat_interleave(search.beams, dim=0)
    token = torch.empty((rows * search.beams, 1), **on_meta)
    found = forward(decoder_input_ids=token, **beside)
    before = choose_beams(search, found)
    kept = found["past_key_values"]
    del found
    for layer in kept.self_attention_cache.layers:
        grow(layer, search.text - 1)
    found = forward(decoder_input_ids=token, past_key_values=kept, **beside)
    choose_beams(search, found)
    del before
    if search.beams > 1:
        kept.reorder_cache(torch.empty(rows * search.beams, **on_meta))


def choose_beams(search: Search, outputs: Any) -> list[torch.Tensor]:
    """Choose the next tokens of each row's beams, as `generate` of transformers 5.23 does it.

    Returns what it keeps until the tokens after them are chosen.
    """
    logits = outputs["logits"][:, -1].to(torch.float32, copy=True)
    if search.beams == 1:
        torch.argmax(logits, dim=-1)
        return [logits]
    scores = torch.log_softmax(logits, dim=-1)
    scores = scores.view(-1, search.beams, scores.shape[-1]) + torch.empty(1, device=scores.device)
    torch.topk(scores.flatten(1), k=2 * search.beams)
    return [logits, scores]


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
