"""The cross-entropy of tokens whose logits never exist all at once, forward and backward: some tokens at a time.

The gradient of a cross-entropy follows from the same probabilities as its value. So the gradients of a chunk of tokens
are computed at once, before the logits of the next chunk replace its own. No product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

Operation = Callable[[torch.Tensor], torch.Tensor]
"""What a model does with its logits: it scales or caps each of them, or converts their dtype."""

CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**27}
"""Logits that exist at once, by the type of the device: on CPU what its caches hold, on GPUs 1 GiB of 8 bytes each."""
FEWEST_TOKENS = 256  # of a chunk; with fewer, reading the head's weights takes longer than multiplying with them


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Return the number of tokens whose logits exist at once. `device`: "cpu" or "cuda"."""
    return max(CHUNK_ENTRIES[device] // vocabulary, FEWEST_TOKENS)


class Head(Protocol):
    """Makes logits of hidden states, and sums the gradients of its own tensors."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [tokens, vocabulary] of hidden states [tokens, width], without a graph."""
        ...

    def gradient(self, hidden: torch.Tensor, of_logits: torch.Tensor) -> torch.Tensor:
        """Return the gradient of `hidden`, for which `logits` was called last, and add those of the head's tensors."""
        ...

    def sums(self) -> list[torch.Tensor | None]:
        """Return the gradients of the head's tensors, in their order; None for those that do not learn."""
        ...


class LinearHead:
    """A matrix and perhaps a bias. Their gradients are summed in fp32."""

    def __init__(self, dtype: torch.dtype, learns: Sequence[bool], weight: torch.Tensor, bias: Any = None) -> None:
        """`dtype`: in which logits are computed. `learns`: whether the matrix and the bias need gradients."""
        self._weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)
        tensors = (weight,) if bias is None else (weight, bias)
        self._sums = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip(tensors, learns, strict=True)
        ]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.to(self._weight.dtype), self._weight, self._bias)

    def gradient(self, hidden: torch.Tensor, of_logits: torch.Tensor) -> torch.Tensor:
        matrix, *bias = self._sums
        if matrix is not None:
            _add_product(matrix, of_logits.t(), hidden.to(of_logits.dtype))
        for total in bias:
            if total is not None:
                total += of_logits.sum(dim=0, dtype=torch.float32)
        return of_logits @ self._weight

    def sums(self) -> list[torch.Tensor | None]:
        return self._sums


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total` [fp32], on GPUs without rounding the product to 16 bits first."""
    if total.is_meta:
        return  # where memory is planned: on GPUs the sum takes none
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


class ModuleHead:
    """Any module, for example a matrix with an adapter. autograd computes its gradients, chunk by chunk."""

    def __init__(self, forward: Operation, learns: Sequence[bool], tensors: Sequence[torch.Tensor]) -> None:
        """`forward`: of the module. `tensors`: its parameters; `learns`: whether each of them needs a gradient."""
        self._forward = forward
        self._tensors, self._learns = tensors, learns
        self._sums = [torch.zeros_like(t) if needed else None for t, needed in zip(tensors, learns, strict=True)]
        self._input = self._output = torch.empty(0)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            self._input = hidden.detach().requires_grad_()
            self._output = self._forward(self._input)
        return self._output.detach()

    def gradient(self, hidden: torch.Tensor, of_logits: torch.Tensor) -> torch.Tensor:
        learning = [tensor for tensor, needed in zip(self._tensors, self._learns, strict=True) if needed]
        of_input, *others = torch.autograd.grad(self._output, [self._input, *learning], of_logits)
        for total, part in zip((t for t in self._sums if t is not None), others, strict=True):
            total += part
        return of_input

    def sums(self) -> list[torch.Tensor | None]:
        return self._sums


@dataclass(frozen=True)
class Sum:
    """What is summed over the tokens with a label."""

    head: Callable[..., Head]
    """(whether each tensor needs a gradient, *tensors) → the head that they are of."""
    tokens: int
    """Tokens whose logits exist at once."""
    operations: Sequence[Operation] = ()
    """What the model does with logits, in its order."""
    smoothing: float = 0.0
    """The share of each label that is spread evenly over the vocabulary."""


def cross_entropy(
    what: Sum, hidden: torch.Tensor, targets: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the sum of the losses, a scalar through which gradients flow; the losses [tokens]), in nats and fp32.

    `hidden`: [tokens, width]. `targets`: int64 [tokens]. `tensors`: of the head; those that require a gradient get one.
    """
    total, losses = _CrossEntropy.apply(what, hidden, targets, *tensors)
    return total, losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, what: Sum, hidden: torch.Tensor, targets: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, of_hidden, _, *learns = ctx.needs_input_grad
        head = what.head(learns, *tensors)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if of_hidden or any(learns) else None
        # On the meta device, where memory is planned, all chunks are alike, and each operation takes time.
        end = min(len(targets), what.tokens) if hidden.is_meta else len(targets)
        for start in range(0, end, what.tokens):
            rows = slice(start, start + what.tokens)
            losses[rows], of_logits = _chunk(what, head.logits(hidden[rows]), targets[rows], gradient is not None)
            if gradient is not None and of_logits is not None:
                gradient[rows] = head.gradient(hidden[rows], of_logits)
            del of_logits  # before the next logits are made
        ctx.gradients = None if gradient is None else [gradient, *head.sums()]
        ctx.dtypes = [hidden.dtype, *(tensor.dtype for tensor in tensors)]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, of_sum: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        """Raises RuntimeError if it is called a second time: the gradients are multiplied in place."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss have been taken already")
        # In place, because the gradient of a head is as large as the head.
        of_hidden, *others = [
            None if gradient is None else gradient.mul_(of_sum).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, of_hidden, None, *others


def _chunk(
    what: Sum, logits: torch.Tensor, targets: torch.Tensor, learns: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses [tokens] and, if the model `learns`, their gradient by logits [tokens, vocabulary]."""
    with torch.set_grad_enabled(learns and bool(what.operations)):
        leaf = logits.requires_grad_(torch.is_grad_enabled())
        values = leaf
        for operation in what.operations:
            values = operation(values)
    final = values.detach()
    probabilities = torch.softmax(final, dim=-1, dtype=torch.float32)
    # The probability of the most likely token is at least 1 / vocabulary, so that its logarithm is exact.
    log_sum = final.amax(dim=-1).float() - probabilities.amax(dim=-1).log()
    losses = log_sum - final.gather(1, targets[:, None])[:, 0].float()
    if what.smoothing:
        spread = log_sum - final.mean(dim=-1, dtype=torch.float32)
        losses = (1 - what.smoothing) * losses + what.smoothing * spread
    if not learns:
        return losses, None
    certain = probabilities.new_full((len(targets), 1), what.smoothing - 1)
    gradient = probabilities.scatter_add_(1, targets[:, None], certain)
    if what.smoothing:
        gradient -= what.smoothing / final.shape[-1]
    gradient = gradient.to(final.dtype)
    if what.operations:
        (gradient,) = torch.autograd.grad(values, leaf, gradient)
    return losses, gradient
