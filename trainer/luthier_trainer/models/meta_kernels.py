"""What kernels hold that do not run on the meta device: each keeps and allocates what the kernel itself does.

Of attention, of products over experts, of dropout, and of TRL's log-probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch

Device = Literal["cpu", "cuda"]


class FusedAttention(torch.autograd.Function):
    """What a fused kernel of attention (flash, memory-efficient, or that of CPUs) keeps and allocates.

    Inputs have the shape [rows, heads, tokens, width]. Kept are the inputs, the output and one sum in fp32 for each row
    of the scores; the backward pass sums the gradient of the queries in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows, heads, tokens, _ = q.shape
        # Kernels write the output as [rows, tokens, heads, width], which the model's next step reads without a copy.
        out = q.new_empty((rows, tokens, heads, v.shape[-1])).transpose(1, 2)
        sums = q.new_empty((rows, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, sums, _ = ctx.saved_tensors
        summed = torch.empty_like(q, dtype=torch.float32), torch.empty_like(sums)
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del summed
        return *found, None


class GroupedProducts(torch.autograd.Function):
    """The products of tokens [tokens, inputs], sorted by experts, with weights [experts, inputs, outputs].

    torch's own function takes bf16 alone on the meta device.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, weights)
        return tokens.new_empty((tokens.shape[0], weights.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if wanted else None for tensor, wanted in needed)


def dropped(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """Return what dropout makes of `input` by the kernel of CUDA, which keeps one byte an element, and nothing else."""
    if not training or p in (0, 1) or inplace:
        return torch.dropout(input, p, training)
    made: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return made


def attention_of(device: Device) -> Callable[..., torch.Tensor]:
    """Return what stands for torch's `scaled_dot_product_attention` on this device."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        shared = enable_gqa and query.shape[1] != key.shape[1]
        learns = attn_mask is not None and attn_mask.requires_grad
        # Only the flash kernel takes fewer heads of keys, and it has no fp32; the one of CPUs has no dropout.
        plain = query.dim() != 4 or learns
        if device == "cuda":
            plain = plain or (shared and (query.dtype == torch.float32 or attn_mask is not None))
        else:
            plain = plain or dropout_p > 0
        if plain:
            if shared:
                groups = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal
            )[0]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # torch does so in each call
        out: torch.Tensor = FusedAttention.apply(query, key, value, attn_mask)
        return out

    return attend


LOG_PROB_TOKENS = 4096
"""Tokens whose logits TRL 1.16 computes at once (`TOKEN_CHUNK_SIZE` of trl.kernels.chunked_logprob)."""


def log_probs(device: Device) -> Any:
    """Return what stands for TRL's function of log-probabilities, by which tokens are computed some thousand at a time.

    TRL's own function computes the first tokens and the first part of the vocabulary, so that the number of operations
    does not depend on the number of tokens. On CUDA a kernel does the work of its tiles, and allocates nothing.
    """
    from trl.kernels import chunked_logprob

    whole = chunked_logprob.ChunkedLogProbFunction
    first = slice(0, LOG_PROB_TOKENS)

    @contextmanager
    def tiles() -> Iterator[None]:
        own = chunked_logprob._forward_tile, chunked_logprob._backward_tile
        if device == "cuda":
            chunked_logprob._forward_tile = chunked_logprob._backward_tile = lambda *_, **__: None
        try:
            yield
        finally:
            chunked_logprob._forward_tile, chunked_logprob._backward_tile = own

    class LogProbs(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            softcap: float | None,
            scale: float,
            outputs: tuple[str, ...],
        ) -> Any:
            ctx.set_materialize_grads(False)
            tried = SimpleNamespace(
                set_materialize_grads=lambda _: None,
                save_for_backward=lambda *_: None,
                mark_non_differentiable=lambda *_: None,
            )
            part = None if bias is None else bias[:chunk_size]
            others = (temperature, chunk_size, softcap, scale, outputs)
            with tiles():
                found = whole.forward(tried, hidden[first], weight[:chunk_size], part, targets[first], *others)
            ctx.tried = tried
            ctx.save_for_backward(
                hidden, weight, bias, targets, hidden.new_empty((2, len(hidden)), dtype=torch.float32)
            )
            made = tuple(None if each is None else each.new_empty(len(hidden)) for each in found)
            ctx.mark_non_differentiable(*(each for each in made[2:] if each is not None))
            return made

        @staticmethod
        def backward(ctx: Any, of_log_probs: torch.Tensor | None, of_entropy: torch.Tensor | None, *_: Any) -> Any:
            hidden, weight, bias, targets, sums = ctx.saved_tensors
            given = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            totals = [torch.zeros_like(each, dtype=torch.float32) if needed else None for each, needed in given]
            part = None if bias is None else bias[: ctx.tried.chunk_size]
            parts = (hidden[first], weight[: ctx.tried.chunk_size], part, targets[first], *sums[:, first])
            # Not kept by `ctx`, which outlasts this function.
            tried = SimpleNamespace(**vars(ctx.tried), saved_tensors=parts, needs_input_grad=(False, False, False))
            with tiles():
                whole.backward(tried, *(None if g is None else g[first] for g in (of_log_probs, of_entropy)))
            returned = (
                None if total is None else total.to(each.dtype)
                for total, each in zip(totals, (hidden, weight, bias), strict=True)
            )
            return *returned, *[None] * 6

    return LogProbs


@contextmanager
def in_place_of_trl(device: Device) -> Iterator[None]:
    """Let models with TRL's head compute log-probabilities by `log_probs` inside this context, if TRL is imported."""
    trl = sys.modules.get("trl.trainer.utils")
    if trl is None:
        yield
        return
    own = trl._ChunkedLogProbFunction
    trl._ChunkedLogProbFunction = log_probs(device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trl._ChunkedLogProbFunction = own  # type: ignore[attr-defined]
