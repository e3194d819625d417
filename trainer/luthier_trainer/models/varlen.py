"""Attention over the documents of packed rows, each for itself, by torch's `varlen_attn` (FlashAttention 2).

transformers' `sdpa` gets a mask of length × length for packed rows, with which torch takes a slower kernel; and
flash-attn is a package that nobody wants to compile. This function needs neither. It is told where documents begin
(`cu_seq_lens_q`), as transformers' collators and models pass it on to flash-attn.

On a CPU it computes one document after the other. Training does not use that: `attention.cannot_varlen` does, to find
out with a small model whether an architecture passes on what is needed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "varlen"
WIDEST_HEAD = 256  # of FlashAttention 2
WIDTHS = 8  # it wants widths of heads that are a multiple of this
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some architectures add to the scores of attention, and torch's function does not know."""


def register() -> None:
    """Make the name `varlen` known to transformers. No mask is registered, so that transformers makes none."""
    AttentionInterface.register(NAME, attention)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the output of attention [rows, length, heads, width], and no weights, as transformers' functions do.

    `query`: [rows, heads, length, width]; `key` and `value` may have fewer heads. `cu_seq_lens_q`: where documents
    begin in all rows one after the other, and their end, int32 [documents + 1]. `max_length_q`: tokens of the longest.

    Raises ValueError for what `varlen_attn` cannot compute.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("its layers are not told where documents begin")
    if attention_mask is not None:
        raise ValueError("its attention has a mask of its own")
    if dropout:
        raise ValueError("its attention drops weights at random (dropout)")
    if unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise ValueError(f"its attention has {unknown[0]}")
    if query.shape[-1] > WIDEST_HEAD:
        raise ValueError(f"its heads of attention are wider than {WIDEST_HEAD}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # The window of transformers counts the token itself. A window of (-1, 0) is all tokens up to it.
    window = ((sliding_window or 0) - 1, 0) if causal else (-1, -1)
    if sliding_window and not causal:
        raise ValueError("its attention has a window to both sides")

    rows, heads, length, width = query.shape
    value_width = value.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    wide = max(width, value_width)
    wide += -wide % WIDTHS
    query, key, value = (_flat(part, wide) for part in (query, key, value))
    if query.is_cuda:
        output = _on_gpu(query, key, value, cu_seq_lens_q, max_length_q, scale, window)
    else:
        output = _one_by_one(query, key, value, cu_seq_lens_q, scale, window)
    return output[..., :value_width].reshape(rows, length, heads, value_width), None


def _flat(part: torch.Tensor, width: int) -> torch.Tensor:
    """Return [tokens of all rows, heads, width] of a tensor [rows, heads, length, up to width]."""
    flat = part.transpose(1, 2).flatten(0, 1)
    # Zeros beside a head change no product.
    return pad(flat, [0, width - flat.shape[-1]]) if flat.shape[-1] < width else flat


def _on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    longest: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # from torch 2.10 on

    if query.dtype == torch.float32:
        # Rotations of positions are computed in fp32 where the weights are; flash-attn gets the type of autocast, too.
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.bfloat16
        query, key, value = query.to(half), key.to(half), value.to(half)
    # The kernel has always known fewer heads of keys; torch 2.13 wants to be told, 2.11 does not know the word.
    fewer = {"enable_gqa": True} if "enable_gqa" in _parameters() and key.shape[1] != query.shape[1] else {}
    output: torch.Tensor = varlen_attn(
        query, key, value, begins, begins, longest, longest, scale=scale, window_size=window, **fewer
    )
    return output


def _parameters() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return inspect.signature(varlen_attn).parameters


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """The same, document by document."""
    outputs = []
    for begin, end in zip(begins.tolist(), begins.tolist()[1:], strict=False):
        places = torch.arange(end - begin)
        distance = places[:, None] - places[None, :]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if window[1] == 0:
            seen &= distance >= 0
        if window[0] >= 0:
            seen &= distance <= window[0]
        q, k, v = (part[begin:end].transpose(0, 1)[None] for part in (query, key, value))
        gqa = k.shape[1] != q.shape[1]
        output = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
