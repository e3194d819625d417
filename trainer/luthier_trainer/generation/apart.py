"""Attention of a step over each text by itself, on CPUs: over exactly its own tokens, without a mask.

What a text is next to then changes no shape of its kernels, so that texts of all lengths share the slots, and nothing
is computed over what no text has. On a GPU the kernels would be many and small.

A step runs with the attention `NAME`, for which transformers makes no mask and calls `attend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

NAME = "luthier_apart"
SMALLEST_ROOM = 64  # tokens that a text has room for; more are powers of two
CHANGED_SCORES = ("softcap", "position_bias", "s_aux")
"""Arguments of an attention that does more than products and a softmax."""


class Unfit(ValueError):
    """The model cannot be run in slots. The text says why."""


class ApartLayer(CacheLayerMixin):
    """Keys and values of one layer, of each slot by itself."""

    def __init__(self, lengths: list[int]) -> None:
        """`lengths`: of the text in each slot, with the token that is read; 0 for an empty slot. Others change it."""
        super().__init__()
        self.lengths = lengths
        self.held: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(lengths)
        """Keys and values of each slot, [1, heads, room, width]."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: texts bring their room with them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token to each text, and return what was given: `attend` finds the others here."""
        for slot, length in enumerate(self.lengths):
            if length:
                keys, values = self._room(slot, length, key_states, value_states)
                keys[0, :, length - 1] = key_states[slot, :, 0]
                values[0, :, length - 1] = value_states[slot, :, 0]
        return key_states, value_states

    def _room(
        self, slot: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a slot with room for `length` tokens."""
        held = self.held[slot]
        if held is not None and held[0].shape[2] >= length:
            return held
        room = room_for(length)
        keys, values = (s.new_empty(1, s.shape[1], room, s.shape[3]) for s in (key_states, value_states))
        if held is not None:
            for larger, before in zip((keys, values), held, strict=True):
                larger[:, :, : before.shape[2]] = before
        self.held[slot] = keys, values
        return keys, values

    def hold(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a prompt into a slot: keys and values [heads, tokens, width]."""
        self.held[slot] = None
        rooms = self._room(slot, keys.shape[1] + 1, keys[None], values[None])
        for room, states in zip(rooms, (keys, values), strict=True):
            room[0, :, : states.shape[1]] = states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self.lengths), 0

    def get_seq_length(self) -> int:
        return max(self.lengths) - 1

    def get_max_length(self) -> int:
        return -1


def room_for(tokens: int) -> int:
    """Return the tokens that a text of that many gets room for, which follows from it alone."""
    return max(SMALLEST_ROOM, 1 << (tokens - 1).bit_length())


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    apart: Cache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of one new token of each text, [slots, 1, heads, width].

    `query`, `key`, `value`: of that token, [slots, heads, 1, width]. `apart`: what was before. Raises Unfit.
    """
    if apart is None or attention_mask is not None or any(kwargs.get(name) is not None for name in CHANGED_SCORES):
        raise Unfit("its attention is of a kind of its own")
    layer = apart.layers[module.layer_idx]
    assert isinstance(layer, ApartLayer), "made by Slots"
    slots, heads, _, width = query.shape
    kept = key.shape[1]
    # Queries that share a head of keys are computed together, as if they were several tokens.
    grouped = query.reshape(slots, kept, heads // kept, width)
    made = query.new_zeros(slots, kept, heads // kept, value.shape[-1])
    for slot, (length, held) in enumerate(zip(layer.lengths, layer.held, strict=True)):
        if length and held is not None:
            keys, values = held
            made[slot : slot + 1] = scaled_dot_product_attention(
                grouped[slot : slot + 1], keys[:, :, :length], values[:, :, :length], scale=scaling
            )
    return made.reshape(slots, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, attend)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Let the model call `attend`."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
