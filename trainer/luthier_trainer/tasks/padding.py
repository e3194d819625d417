"""Batches of texts are padded on the right, whatever side the tokenizer was published with.

Models with absolute positions (GPT-2, BERT) number a batch's columns, not a row's tokens, so padding on the left would
move a row to other positions than it has alone, and a causal loss would also predict a row's first token from padding.
Many tokenizers pad on the left because generation needs that; the result is saved with the tokenizer's own side.
"""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerBase


def padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` for collators: it shares the vocabulary and pads on the right. `tokenizer` itself stays as
    it is.
    """
    copied = copy.copy(tokenizer)
    copied.padding_side = "right"
    return copied
